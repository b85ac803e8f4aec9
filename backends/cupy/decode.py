"""One token of every sequence: how its launch looks, and what it is told."""

from __future__ import annotations

import functools
from functools import partial
from typing import NamedTuple

from linattn.arrays import Array
from linattn.backends.cupy import sources
from linattn.backends.cupy.launch import SIZES, Runner
from linattn.backends.cupy.memory import address, dense, room, strides
from linattn.backends.cupy.sources import ANGLES, DECAY, FEATURES
from linattn.backends.cupy.tape import Parts, repeatable
from linattn.errors import UnsupportedError
from linattn.problem import Problem
from linattn.state import State

MOST = 1024  # threads of a block
WIDEST = 1024  # features with an angle each, whose constants fit in shared memory
NARROW, WIDE = 8, 16  # threads beside each other: to fill the device, and once it is full


class Shape(NamedTuple):
    """Blocks of `threads`, `lanes` of them beside each other in a row, each with `at_once` rows."""

    threads: int
    lanes: int
    at_once: int

    def slices(self, e: int, wide: int) -> int:
        """Blocks of a head."""
        return -(-e // (self.lanes * wide))


@functools.lru_cache(maxsize=1024)
def shape(
    heads: int, d: int, e: int, wide: int, turned: bool, normalize: bool, multiprocessors: int
) -> Shape:
    """Blocks that ask for all of their rows at once; heads: B H of them.

    A normalized head is never cut: each of its blocks would need the z that another one overwrites.
    """
    lanes, at_once = power(-(-e // wide)), 4 if turned else 8
    if not normalize:
        lanes = min(lanes, WIDE if heads > 8 * multiprocessors else NARROW)
        if heads * -(-e // (lanes * wide)) < multiprocessors:
            lanes, at_once = max(1, lanes // 2), at_once // 2
    most = 512 if normalize and heads < multiprocessors else 256
    threads = min(most, max(64, power(d) * lanes // at_once))
    return Shape(max(threads, lanes), lanes, at_once)


def power(x: int) -> int:
    """The power of 2 from x on."""
    return 1 << (x - 1).bit_length()


def inverse(x: int) -> int:
    """What `divided` of decode.cu takes for a divisor."""
    of = -(-(1 << 64) // x) % (1 << 64)
    return of - (of >> 63 << 64)  # as a signed number


def decode_step(
    problem: Problem, runner: Runner, q: Array, k: Array, v: Array, log_decay: Array | None,
    theta: Array | None, state: State, slots: Array | None,
) -> Array:  # fmt: skip
    """q, k [B, H, D], v [B, H, E] -> o [B, H, E] in q's dtype; `state` changes in place."""
    theta = None if theta is None else dense(theta, "float64")
    slots = None if slots is None else dense(slots, "int64")
    inputs = (q, k, v, log_decay, theta, slots, state.kv, state.z, state.length)
    return repeatable("decode", problem, runner, inputs, partial(_step, problem))[0]


def _step(
    problem: Problem, runner: Runner, q: Array, k: Array, v: Array, log_decay: Array | None,
    theta: Array | None, slots: Array | None, kv: Array, z: Array | None, length: Array,
) -> Parts:  # fmt: skip
    b, h, d = q.shape
    e = v.shape[2]
    o = room(q, (b, h, e), problem.dtype)
    steps = strides(kv)
    size = SIZES[problem.accumulate]
    wide = 16 // size
    if steps[3] != 1 or e % wide or any(step % wide for step in steps[:3]) or address(kv) % 16:
        wide = 1
    if not b * h:
        return (o,)
    angles = ANGLES[problem.reweight]
    form = shape(b * h, d, e, wide, angles > 0, problem.normalize, runner.multiprocessors(q))
    if form.threads > MOST:
        why = f"a normalized step has at most {MOST} threads for a head; E = {e} needs {form.threads}"
        raise UnsupportedError(problem, {"cupy": why})
    if problem.reweight == "lrpe" and d > WIDEST:
        raise UnsupportedError(problem, {"cupy": f"a step with LRPE has at most {WIDEST} features; D = {d}"})
    slices, widest = form.slices(e, wide), max(32, power(d))
    values: dict[str, float] = {
        "q": address(q), "k": address(k), "v": address(v), "o": address(o),
        "log_decay": address(log_decay), "theta": address(theta), "angle": problem.angle,
        "slots": address(slots), "kv": address(kv), "z": address(z),
        "length": address(length), "length_s": strides(length)[0],
        "slices_of": inverse(slices), "heads_of": inverse(h), "S": kv.shape[0], "H": h, "D": d, "E": e,
        "scale": problem.scale, "eps": problem.eps,
    }  # fmt: skip
    arrays = [("q", "bhd", q), ("k", "bhd", k), ("v", "bhe", v), ("kv", "shfe", kv)]
    if z is not None:
        arrays.append(("z", "shf", z))
    for name, letters, array in arrays:
        values |= {f"{name}_{p}": step for p, step in zip(letters, strides(array), strict=True)}
    if log_decay is not None:
        values |= dict(zip(("g_b", "g_h"), (0, *strides(log_decay))[-2:], strict=True))
    full = d == widest and e == slices * form.lanes * wide
    numbers = (
        form.threads, wide, form.lanes, form.at_once, widest, FEATURES[problem.feature_map],
        angles, min(1, DECAY[problem.decay]), problem.normalize, full,
    )  # fmt: skip
    kernel = sources.expression("decode", (problem.dtype,), numbers, "Choice")
    packed = sources.packed("decode.cu", "Step", values)
    runner("decode.cu", kernel, packed, b * h * slices, form.threads, 0, q)
    return (o,)
