"""How an axis is cut: blocks of positions, groups of blocks that share scratch memory, tails."""

from __future__ import annotations

from dataclasses import dataclass

from linattn.problem import Problem

# Bytes of scratch that one group of blocks may take, at least and at most: about a core's share of cache on
# a CPU, and enough work for one launch on a GPU. Between them it is as large as the output, so that memory
# stays a small multiple of what the caller asked for.
SCRATCH = {"cpu": (4 << 20, 16 << 20), "cuda": (256 << 20, 256 << 20)}


@dataclass(frozen=True)
class Group:
    """`blocks` blocks of `size` positions each, from position (or, packed, block number) `start`."""

    start: int
    blocks: int
    size: int


def block_size(problem: Problem) -> int:
    """Positions in a block: products inside it cost C per token, those with the state D or E."""
    longest = max(problem.n, problem.m)
    if problem.packed and problem.sequences:
        longest = min(longest, 2 * longest // problem.sequences)  # mostly short sequences: short blocks
    size = 64 if problem.decay != "token" else 32  # per-token decay makes a C x C table for every block
    while size > 16 and size >= 2 * longest:
        size //= 2
    return size


def blocks_per_group(problem: Problem, size: int) -> int:
    """Blocks that are worked on at once, within the scratch limit; at least one."""
    item = 8 if problem.accumulate == "float64" else 4
    tokens = 2 * problem.d + 3 * problem.f + 4 * problem.e + 3 * size  # q, k, features, values, pairs
    states = 3 * problem.f * (problem.e + 1) * (2 if problem.reweight else 1)  # rotated in float64
    width = tokens + states // size
    rows = problem.sequences if not problem.packed else 1
    one = max(1, rows) * problem.heads * size * width * item
    least, most = SCRATCH["cuda" if problem.device.startswith("cuda") else "cpu"]
    output = problem.batch * problem.n * problem.heads * problem.e * item
    limit = min(max(output, least), most)
    return max(1, limit // one)


def groups(total: int, size: int, per_group: int) -> list[Group]:
    """Cut `total` positions into groups of whole blocks, and the ragged tail into a block of its own length.

    Every position belongs to exactly one block, in order.
    """
    whole = total // size
    cut = [Group(b * size, min(per_group, whole - b), size) for b in range(0, whole, per_group)]
    if total % size:
        cut.append(Group(whole * size, 1, total % size))
    return cut


def packed_groups(blocks: int, size: int, per_group: int) -> list[Group]:
    """Groups of a packed batch's block table; `start` counts blocks, every block has room for `size`
    positions.
    """
    return [Group(b, min(per_group, blocks - b), size) for b in range(0, blocks, per_group)]
