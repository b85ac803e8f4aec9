"""How few rows times weights are cut into programs, by their sizes and by what a program can hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass

FEW = 3  # rows that are added up one after the other; more go through matrix products
MANY = 128  # rows beyond which a matrix product is no longer bound by its weights
WIDEST = 8192  # numbers of weights that a warp can hold in registers; wider rows are products as well
WIDE = 5120  # the same for more than one row
PROGRAMS = 176  # of a launch that lets the next one's in beside its own
MOST = 4  # parts of K, as adding them up takes time, too
ROOM = 227 << 10  # bytes of shared memory of a program; compute capability 9.0
SPARE = 8 << 10  # of them, for what the compiler puts there


@dataclass(frozen=True)
class Shape:
    """What a launch looks like: `rows` rows of the weights in a program; what follows warps is of `many`.

    A program has a part of K in blocks: so many under way at once, or, of all of K if blocks is 0, so many
    stages.
    """

    rows: int
    warps: int
    block: int = 0
    blocks: int = 0
    parts: int = 1
    stages: int = 1
    whole: bool = False

    @property
    def chains(self) -> bool:
        """Whether it can ask for all of its weights before kernels in front have ended."""
        return not self.block or self.blocks > 0


@functools.lru_cache(maxsize=256)
def shape(b: int, n: int, k: int, two: bool, gated: bool, room: int = ROOM) -> Shape:
    """The launch for b rows of k numbers, with a gate or without, and n outputs from one matrix, or two.

    Small programs, as the next kernel's come in beside the last of them.
    """
    numbers = k * (2 if two else 1)
    if b <= FEW and numbers <= (WIDEST if b == 1 else WIDE):
        warps = 2 if numbers > 2048 else 4 if two else 8
        return Shape(warps * (2 if numbers <= 2048 and n >= 2 * warps * 128 else 1), warps)
    return _at_once(height(b), n, k, two, gated, room) or _in_stages(height(b), n, k, two, gated, room)


def height(b: int) -> int:
    """Rows of a matrix product that holds b."""
    return max(16, 1 << (b - 1).bit_length())


def _at_once(tall: int, n: int, k: int, two: bool, gated: bool, room: int) -> Shape | None:
    """Parts of K for programs that ask for everything at once; None where they could not hold it."""
    if tall > 64:
        return None
    high = k > 2048 and tall < 64 and not two and not gated
    narrow = (n < 2048 and not high) or (two and tall == 64)
    rows, block = 32 if narrow else 64, 64 if high else 128
    blocks = -(-k // block)
    blocks = -(-blocks // max(1, min(MOST, PROGRAMS // -(-n // rows))))
    parts = -(-k // (block * blocks))
    held = 2 * block * blocks * (tall + rows * (2 if two else 1))
    if held > room - SPARE or (gated and blocks > 2):  # a gate and what it is for meet in registers
        return None
    return Shape(rows, 8 if high else 4, block, blocks, parts, whole=k == parts * blocks * block)


def _in_stages(tall: int, n: int, k: int, two: bool, gated: bool, room: int) -> Shape:
    """All of K in every program."""
    rows, block = 32 if two or n >= 2048 else 16, 128
    of_a_stage = 2 * block * (tall * (2 if gated else 1) + rows * (2 if two else 1))
    stages = max(1, min(5 if k > 2048 else 3, (room - SPARE) // of_a_stage))
    return Shape(rows, 8 if gated and tall > 64 else 4, block, stages=stages, whole=k % block == 0)
