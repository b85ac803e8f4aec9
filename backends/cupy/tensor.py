"""The product on tensor cores (tensor.cu): which launches it takes, in what shape, and what they need."""

from __future__ import annotations

from dataclasses import dataclass

from linattn.problem import Problem

CAPABILITY = 80  # times ten: the first with bfloat16 and tf32 products
C, THREADS = 64, 128
SIZES = {"bfloat16": (2, 2), "float16": (2, 4), "float32": (4, 4)}
"""Bytes of a number in memory, and of an operand: bfloat16 or tf32."""
TABLES = 2 * 9 * C * 4 + (2 * C + 4) * 4


@dataclass(frozen=True)
class Shape:
    """`columns` of w to a block of threads; chunks of the state in registers, 0: it is in shared memory."""

    columns: int
    held: int

    def shared(self, dtype: str, f: int, turns: int, *, normalize: bool) -> int:
        """Bytes of shared memory, for f contracted features and angles of `turns` features (tensor.cu)."""
        raw, size = SIZES[dtype]
        chunks = self.held or -(-f // C)
        slots = C * (2 * C + self.columns) * raw
        tiles = 2 * C * (C * size + 16) + C * (self.columns * size + 16) + 16
        copy = chunks * C * (self.columns * size + 16)
        state = chunks * C * (self.columns + 1) * 4
        front = -(-max(tiles + TABLES + slots + copy + 8 * turns + 16, state) // 16) * 16
        return front + (0 if self.held else chunks * (self.columns // 8 + normalize) * THREADS * 16)


SHAPES = (
    Shape(64, 1), Shape(64, 2), Shape(32, 1), Shape(32, 2), Shape(32, 3), Shape(32, 4), Shape(64, 0),
    Shape(32, 0),
)  # fmt: skip


def shape(
    choices: tuple[Shape, ...], most: int, dtype: str, f: int, columns: int, turns: int, *, normalize: bool
) -> Shape | None:
    """The first choice that holds the state or need not, in `most` bytes, no wider than it needs to be.

    Of tf32 a block holds half as much as of bfloat16, so that two of them have room on a multiprocessor.
    """
    fitting = [
        one
        for one in choices
        if (one.held == 0 or f <= one.held * C)
        and one.held * one.columns * SIZES[dtype][1] <= 256
        and one.shared(dtype, f, turns, normalize=normalize) <= most
    ]
    return next((one for one in fitting if one.columns < 2 * columns), fitting[-1] if fitting else None)


def refusal(problem: Problem, capability: int) -> str | None:
    """None if a call's products may run on tensor cores, else what these do not do."""
    if capability < CAPABILITY:
        return f"need compute capability 8.0, got {capability / 10:.1f}"
    if problem.dtype == "float64":
        return "round operands to bfloat16 or tf32, got float64"
    if problem.dtype == "float32" and problem.precision != "tf32":
        return f"round float32 to tf32, got precision {problem.precision!r}"
    return None


def describe(problem: Problem, capability: int) -> str:
    """Which kernels compute a call, and why not on tensor cores, where they do not."""
    why = refusal(problem, capability)
    if why is not None:
        return f"without tensor cores (product.cu): these {why}"
    if problem.needs_grad and problem.reweight == "lrpe":
        return "on tensor cores (tensor.cu), gradients of angles in float64 (product.cu)"
    return "on tensor cores (tensor.cu)"
