"""What a launch looks like: block shapes from sizes and dtype, segments from the room on the GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from linattn.problem import Problem


@dataclass(frozen=True)
class Blocks:
    """One configuration of `product`: C tokens a block, a slice of value features, and how it is compiled.

    c: tokens of a block. block_e: value features that a program takes. warps, stages: as Triton compiles it.
    across: the state is kept transposed, which pays where it is wide.
    """

    c: int
    block_e: int
    warps: int
    stages: int
    across: bool = True


def padded(size: int) -> int:
    """The power of two that a block of `size` features takes; matrix products need 16."""
    return max(16, 1 << (size - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def blocks(operand: str, d: int, e: int, two: bool, gradient: bool, device: str = "cpu") -> Blocks:
    """For contracted features d and value features e, one state or two (angles): tuned, or shipped."""
    from linattn.backends.triton import tuned

    found = tuned.lookup(device, operand, d, e, two, gradient)
    return shipped(operand, d, e, two, gradient) if found is None else found


def shipped(operand: str, d: int, e: int, two: bool, gradient: bool) -> Blocks:
    """The library's own configuration."""
    wide, slices = padded(d), padded(e)
    if operand == "bfloat16":
        if wide <= 64:
            if two:
                if gradient:
                    return Blocks(64, min(slices, 64), 4, 2)
                return Blocks(32, min(slices, 64), 4, 3) if slices > 16 else Blocks(64, 16, 8, 3)
            if slices < 64:
                return Blocks(64, slices, 4, 3)
            return Blocks(64, 64, 4, 3, across=False) if gradient else Blocks(128, 64, 8, 3, across=False)
        if wide <= 128:
            if slices < 128:
                return Blocks(32, slices, 4, 3)
            return Blocks(32, 128, 8, 3) if two else Blocks(64, 128, 8, 3)
        return Blocks(32, min(slices, 64), 8, 2)
    if wide <= 64:
        return Blocks(32, min(slices, 32), 4, 1)
    return Blocks(16, min(slices, 32 if wide <= 128 else 16), 4, 1)


def for_states(operand: str, d: int, e: int, two: bool, alone: bool, device: str = "cpu") -> Blocks:
    """For a launch that only sums up states: nothing of an output has to fit beside them.

    alone: no two of its programs meet on one multiprocessor.
    """
    found = blocks(operand, d, e, two, False, device)
    if found != shipped(operand, d, e, two, False):
        return found
    sizes = operand, padded(d), padded(e), two
    if sizes == ("bfloat16", 128, 128, False):
        return replace(found, stages=4)
    if sizes == ("bfloat16", 64, 64, True):
        return Blocks(128, 64, 8, 2) if alone else Blocks(64, 64, 4, 3)
    return found


UPRIGHT = 64
"""Values of a slice that may be held upright."""


def fitting(blocks: Blocks, summed: bool, wide_output: bool) -> Blocks:
    """A configuration as a launch takes it: beside a second state, or for an output in float32.

    A second state, and values that are few, are only held across: upright, their matrix products are 16 or 32
    wide, and some of those come out wrong on Hopper (docs/triton.md).
    """
    if not blocks.across and (summed or blocks.block_e != UPRIGHT):
        blocks = Blocks(min(blocks.c, 64), blocks.block_e, 4, blocks.stages)
    if wide_output and blocks.stages > 2 and max(blocks.c, blocks.block_e) == 128:
        blocks = replace(blocks, stages=2)  # or there is no room for it in shared memory
    return blocks


GRAIN = 128
"""Segments are multiples of this many tokens."""

FOLDED = 8
"""Segments up to which each adds up what those before it add: another launch would cost more."""

LEAST_SEGMENT = 256
"""Tokens below which a segment more than FOLDED is not worth the state that it costs."""

FULL = 8
"""Warps for each multiprocessor with which it is busy."""


@functools.lru_cache(maxsize=4096)
def segments(warps: int, length: int, multiprocessors: int, least: int) -> tuple[int, int]:
    """How many segments a sequence is cut into, and how long each is (a multiple of GRAIN).

    warps: how many run side by side without any cut. least: fewer segments than this are not worth the pass
    over the states.
    """
    room = FULL * multiprocessors // max(warps, 1)

    def most(tokens: int) -> int:
        return min(room, max(tokens // LEAST_SEGMENT, min(FOLDED, tokens // GRAIN)))

    if most(length) < least:
        return 1, max(length, 1)
    size = -(-length // most(length + GRAIN - 1))
    size = -(-size // GRAIN) * GRAIN
    return -(-length // size), size


def length_of(problem: Problem) -> int:
    """The longest way through a sequence."""
    return max(problem.n, problem.m)


def cut(problem: Problem, blocks: Blocks, e: int, multiprocessors: int) -> tuple[int, int]:
    """How many segments a call is cut into, of how many tokens, if outputs have e features."""
    least = 3 if problem.reweight is None else 2  # with angles, states cost less beside outputs
    length = length_of(problem)
    if problem.batch_invariant:
        return 1, max(length, 1)
    programs = problem.sequences * problem.heads * -(-e // blocks.block_e)
    return segments(programs * blocks.warps, length, multiprocessors, least)


def folds(problem: Problem, count: int) -> bool:
    """Whether segments' states may be added up by those who read them."""
    return count <= FOLDED and problem.decay != "token" and not problem.slots


SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


def described(problem: Problem, multiprocessors: int) -> dict[str, str]:
    """What a forward pass is on a GPU with so many multiprocessors, in words, and the least that it moves."""
    operand = "bfloat16" if problem.dtype == "bfloat16" else "float32"
    found = blocks(operand, problem.d, problem.e, problem.reweight is not None, False, problem.device)
    shape = fitting(found, problem.normalize, False)
    slices = -(-problem.e // shape.block_e)
    programs = problem.sequences * problem.heads * slices
    way = "across" if shape.across else "upright"
    if problem.causal:
        count, size = cut(problem, found, problem.e, multiprocessors)
        steps = "one launch"
        if count > 1:
            alone = folds(problem, count) and not (problem.initial_state or problem.return_state)
            step = "" if alone else "carried through, "
            steps = f"{count} segments of {size} tokens: their states, {step}then outputs"
            programs *= count
    elif problem.decay is None:
        steps = "segments of keys into one state for each head, which every query reads"
    else:
        steps = "one launch in each direction, added up"
    cells = problem.batch * problem.heads * (problem.n + problem.m) * (problem.d + problem.e)
    return {
        "blocks": f"{shape.c} tokens, {shape.block_e} values, {way}",
        "compiled for": f"{shape.warps} warps, {shape.stages} stages",
        "programs": f"{programs} on {multiprocessors} multiprocessors",
        "passes": steps,
        "least bytes": f"{cells * SIZES[problem.dtype] / 1e6:.1f} MB (q, k, v and o once)",
    }
