"""Checks of few rows times weights in Triton's interpreter; run as a program, with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from linattn import tolerance
from linattn.backends.triton import rows, rows_shape
from tests.triton.mapped import exact
from tests.triton.normed import EPS
from tests.triton.programs import main, notices

DTYPE = torch.float16  # the interpreter's bfloat16 is wrong
LARGE = 0.5  # eps that is seen in every result
SHAPES = ((1, 16), (7, 272), (130, 48), (20, 528))


def drawn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def holds(of: Any, batches: tuple[int, ...] = (1, 4, 5, 17), shapes: Any = SHAPES) -> None:
    """Every combination of options within the bound: float32 sums, rounded once, a gated row before them."""
    unit, fine = tolerance.UNIT["float16"], tolerance.UNIT["float32"]
    for b, (n, k) in itertools.product(batches, shapes):
        x, gate = drawn(b, 4 * k)[:, :k], drawn(b, 4 * k, seed=1)[:, 3 * k :]
        weights = [(w.float() / k**0.5).to(DTYPE) for w in (drawn(n, k, seed=2), drawn(n, k, seed=3))]
        added, done = drawn(b, n, seed=4), of.counters(x)
        for eps, gated, two, residual in itertools.product(
            (None, LARGE), (False, True), (1, 2), (None, added)
        ):
            given, g = tuple(weights[:two]), gate if gated else None
            got = of.products(x, given, eps=eps, gate=g, residual=residual, done=done)
            want, size = exact(x, given, eps, g, residual)
            rounded = gated and of.rows_shape.shape(b, n, k, two > 1, gated).block  # once for each factor
            room = (k + 32) * fine * two * size + unit * (abs(want) + size * (two if rounded else 0))
            over = float((abs(got.double() - want) - room - tolerance.SUBNORMAL["float16"]).max())
            assert over <= 0, (b, n, k, eps, gated, two, residual is not None, over)
            assert not done.any()


@contextlib.contextmanager
def chosen(**values: Any) -> Iterator[None]:
    """Other limits for what is chosen."""
    with mock.patch.multiple(rows_shape, **values):
        rows_shape.shape.cache_clear()
        yield
    rows_shape.shape.cache_clear()


def formula() -> None:
    """By the kernel that is chosen, and by products of matrices for few rows too."""
    holds(rows)
    with chosen(FEW=0):
        assert rows_shape.shape(1, 100, 48, False, False).block
        holds(rows, (1, 4))


def parts() -> None:
    """At once and in stages; K in one part and in several, with a rest and without; gates in the kernel."""
    seen, shapes = set(), ((7, 144), (70, 256))
    for most, room in ((4, rows_shape.ROOM), (1, rows_shape.ROOM), (4, 0)):
        with chosen(MOST=most, ROOM=room), mock.patch.object(rows, "GATED", (DTYPE,)):
            rows.room.cache_clear()
            for n, k in shapes:
                found = rows_shape.shape(17, n, k, False, True, room)
                seen.add((found.blocks > 0, found.parts > 1, found.whole))
            holds(rows, (16, 17), shapes)
    rows.room.cache_clear()
    assert len(seen) == 6, seen


def not_finite() -> None:
    """A bad number stays in its row of the batch, a bad weight in its output."""
    for b in (4, 6):
        x, w = drawn(b, 48), drawn(33, 48, seed=1)
        want = rows.products(x, (w,), eps=EPS)
        for bad in (float("nan"), float("inf")):
            wrong, others = x.clone(), torch.arange(b) != 1
            wrong[1, 3] = bad
            got = rows.products(wrong, (w,), eps=EPS)
            assert torch.equal(got[others], want[others]) and not got[1].isfinite().all()
            broken, outputs = w.clone(), torch.arange(33) != 5
            broken[5, 7] = bad
            got = rows.products(x, (broken,), eps=EPS)
            assert torch.equal(got[:, outputs], want[:, outputs]) and not got[:, 5].isfinite().any()


def layouts() -> None:
    """Wherever the numbers lie, and whatever sign bit is pending: the same bits."""

    def moved(x: Any) -> Any:
        return torch.empty(x.numel() + 1, dtype=DTYPE)[1:].view(x.shape).copy_(x)

    def spread(x: Any) -> Any:
        room = torch.empty(len(x) * (x.shape[1] + 3), dtype=DTYPE)
        return room.as_strided(x.shape, (x.shape[1] + 3, 1)).copy_(x)

    kinds = (
        moved, spread, lambda x: x.T.contiguous().T, lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch._neg_view(-x),  # z.conj().imag is one
    )  # fmt: skip
    for b in (1, 3, 5):
        given, w = [drawn(b, 48), drawn(b, 48, seed=1), drawn(b, 30, seed=2)], drawn(30, 48, seed=3)
        want = rows.products(given[0], (w,), eps=EPS, gate=given[1], residual=given[2])
        for place, kind in itertools.product(range(3), kinds):
            x, gate, residual = (kind(part) if i == place else part for i, part in enumerate(given))
            assert torch.equal(rows.products(x, (w,), eps=EPS, gate=gate, residual=residual), want)
    far = torch.empty(rows.APART + 16, dtype=DTYPE, device="meta").as_strided((2, 16), (rows.APART, 1))
    assert rows.rows_of(far).stride() == (16, 1)  # offsets in the kernels have 32 bits


SQUARES = """            if NORM:
                squares = tl.fma(first, first, tl.fma(second, second, squares))
"""
GATE = """            if GATED:
                first, second = first * low(g[p], HALF), second * high(g[p], HALF)
"""
OTHER = "                other *= {}\n            o"
SUMS = "    if NORM:\n        wide = x"
ADDED = "tl.load(to_sum + inner, cache"
WRONG = {
    "the mean is over pairs": ("/ (2 * K) + eps", "/ K + eps"),
    "the second of a pair is left out": ("tl.fma(high(w[p], HALF), second, y)", "y"),
    "the norm is that of gated numbers": (SQUARES + GATE, GATE + SQUARES),
    "no eps": ("/ (2 * K) + eps", "/ (2 * K)"),
    "only one factor is normed": (OTHER.format("r"), OTHER.format(1)),
    "one factor alone": ("            o *= other\n", "            o *= 1\n"),
    "no residual": ("            o += residual\n", "            o += 0\n"),
    "the residual of the first row": ("r_ptr + b * r_b + n", "r_ptr + n"),
    "the first row for all": ("pieces(x_ptr + b * x_b + of_all", "pieces(x_ptr + of_all"),
    "the end of a row is left out": ("-(-k // 256)", "max(1, k // 256)"),
    "columns beyond the row": ("mask=there & (k < K)", "mask=there & (k < K + 8)"),
    "many: no norm": ("        y *= r\n", "        y *= 1\n"),
    "many: no eps": ("total / K + eps", "total / K"),
    "many: totals lie in the next sums": ("(2 if PRODUCT else 1) + BATCH", "(2 if PRODUCT else 1)"),
    "many: squares of the last block": ("total += tl.sum(wide", "total = tl.sum(wide"),
    "many: weights of the first block": ("of_weights(from_w, n, k + p * BLOCK", "of_weights(from_w, n, k"),
    "many: from 32 rows on, one matrix twice": ("read_as(others,", "read_as(weights,"),
    "many: the first part for all": ("part * (BLOCKS * BLOCK)", "0"),
    "many: rows of the first tile": ("n = tile * ROWS", "n = 0 * ROWS"),
    "many: no residual": ("        y += tl.load(r_ptr", "        y += 0 * tl.load(r_ptr"),
    "many: no gate": ("        x *= g\n", "        x *= 1\n"),
    "many: the gate of the first block": ("of_rows(g_ptr, g_b, b, k + p * BLOCK", "of_rows(g_ptr, g_b, b, k"),
    "many: gated numbers are normed": (SUMS, "    if GATED:\n        x *= g\n" + SUMS),
    "many: the last part alone": ("y += " + ADDED, "y = " + ADDED),
    "many: the last part's squares alone": ("total += tl.load(to_sum", "total = tl.load(to_sum"),
    "many: parts of the first tile": ("sum_ptr + (tile * PARTS + p)", "sum_ptr + p"),
    "many: nothing is counted back": ("tl.store(done_ptr + tile, 0)", "tl.store(done_ptr + tile, 1)"),
    "many: the last part is not waited for": ("== PARTS - 1", "== PARTS - 2"),
}  # fmt: skip


def mutants() -> None:
    """Kernels with one thing wrong each are noticed, where the right ones pass."""

    def seen(of: Any) -> None:
        with mock.patch.object(of, "GATED", (DTYPE,)):
            holds(of, (3, 5, 16, 17), ((39, 528),))

    notices(seen, rows, WRONG)


if __name__ == "__main__":
    main(globals())
