"""Checks of the fused cross entropy in Triton's interpreter; run as a program, with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from linattn.backends.triton import loss as kernels
from linattn.nn import linear_cross_entropy
from linattn.nn import loss as module
from tests.triton.programs import main, notices
from tests.triton.scored import IGNORED, compare, exact, given, through_products, turned

WIDTHS = (1, 7, 64, 100, 1000)
DTYPES = (torch.float32, torch.float16)  # the interpreter's bfloat16 is wrong


@contextlib.contextmanager
def narrow(of: Any = kernels) -> Iterator[None]:
    """Launches whose blocks are much narrower than their rows."""

    def shape(width: int) -> Any:
        return of.Shape(max(16, 1 << (width - 1).bit_length() >> 2), 1)

    with mock.patch.object(of, "shape", shape):
        yield


def holds(of: Any, widths: tuple[int, ...] = WIDTHS, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Results of a module of kernels, with and without gradients, in launches of both kinds."""
    for width, dtype, cut in itertools.product(widths, dtypes, (False, True)):
        logits, labels = given(width, dtype)
        with narrow(of) if cut else contextlib.nullcontext():
            block = of.shape(width).block
            losses, slopes = turned(of, logits, labels)
            compare(losses, slopes, logits, labels, block)
            alone, _ = turned(of, logits, labels, gradient=False)
            assert torch.equal(alone, losses)


def formula() -> None:
    """Every width and dtype, and a row wider than what is worked on at a time."""
    holds(kernels)
    logits, labels = given(kernels.WIDEST + 5, torch.float32, rows=3)
    compare(*turned(kernels, logits, labels), logits, labels, kernels.WIDEST)
    nothing = torch.zeros(0, 5)
    assert turned(kernels, nothing, torch.zeros(0, dtype=torch.int64))[0].shape == (0,)


WRONG = {
    "the label's own share stays": ("tl.where(first + v == label, p - 1.0, p)", "p"),
    "one column of a block is taken for the label": ("first + v == label", "v == label"),
    "the last column is lost": ("tl.where(v < V,", "tl.where(v < V - 1,"),
    "what lies between rows counts": ("tl.where(v < V,", "tl.where(v < S,"),
    "later blocks have their own maximum": (
        "sums = sums * tl.exp(most - at) + tl.exp(x - at)",
        "sums = sums + tl.exp(x - at)",
    ),
    "the last block's maximum is the row's": ("tl.maximum(most, tl.max(x, 0))", "tl.max(x, 0)"),
    "the maximum is left out": ("(own - most)", "own"),
    "sums are in the dtype of the logits": ("tl.sum(sums, 0)", "tl.sum(sums.to(kind), 0).to(tl.float32)"),
    "shares are not divided": ("share = 1.0 / total", "share = 1.0"),
    "nothing asked is asked": ("if label == ignored:", "if label == ignored - 1:"),
    "the gradient of nothing asked is left": ("tl.zeros([BLOCK], kind)", "tl.zeros([BLOCK], kind) + 1"),
    "only the first block has a gradient": (
        "for first in range(0, V, BLOCK):\n                x = part_of",
        "for first in range(0, BLOCK, BLOCK):\n                x = part_of",
    ),
    "rows are V apart": ("row_ptr = logits_ptr + n * S", "row_ptr = logits_ptr + n * V"),
}


def mutants() -> None:
    """Kernels with one thing wrong each are noticed, where the right ones pass."""
    sizes = (7, 100), DTYPES
    notices(lambda of: holds(of, *sizes), kernels, WRONG)


def not_finite() -> None:
    """As torch's cross_entropy has it: NaN stays in its row, -inf is no choice, nothing asked is 0."""
    nan, inf = float("nan"), float("inf")
    for cut, bad in itertools.product((False, True), (nan, inf, -inf)):
        logits, labels = given(100, torch.float32, rows=8)
        assert labels[3] == IGNORED
        logits[2, 40] = logits[3, 40] = logits[5, :40] = bad
        labels[5] = 60
        leaf = logits.clone().requires_grad_()
        want = torch.nn.functional.cross_entropy(leaf, labels, reduction="none", ignore_index=IGNORED)
        (slopes,) = torch.autograd.grad(want.sum(), leaf)
        with narrow() if cut else contextlib.nullcontext():
            losses, got = turned(kernels, logits, labels)
        assert torch.equal(losses.isfinite(), want.isfinite())
        assert torch.equal(losses.isnan(), want.isnan())
        assert losses[3] == 0 and not got[3].any()
        others = torch.arange(8) != 3  # there torch has NaN
        assert torch.equal(got[others].isnan(), slopes[others].isnan())
        if bad == -inf:
            compare(losses[[2, 5]], None, logits[[2, 5]].clamp(min=-1e30), labels[[2, 5]], 16)
            assert not got[5, :40].any()
    logits, labels = torch.full((2, 100), -inf), torch.tensor([1, 2])
    logits[1, :] = 0
    logits[1, 2] = -inf
    losses, slopes = turned(kernels, logits, labels)
    assert losses[0].isnan() and losses[1] == inf and slopes[0].isnan().all() and slopes[1].isfinite().all()


def out_of_range() -> None:
    """A label that is none gives NaN, and reads and writes nothing elsewhere."""
    logits, labels = given(100, torch.float32, rows=9)
    want, slopes = turned(kernels, logits, labels)
    for wrong in (-1, 100, 1 << 40, -(1 << 40)):
        changed = labels.clone()
        changed[4] = wrong
        losses, got = turned(kernels, logits, changed)
        others = torch.arange(9) != 4
        assert torch.equal(losses[others], want[others]) and torch.equal(got[others], slopes[others])
        assert losses[4].isnan() and got[4].isnan().all()


def alone() -> None:
    """A row keeps its bits whatever other rows there are; what lies between rows does not matter."""
    logits, labels = given(100, torch.float16, rows=30)
    whole = turned(kernels, logits, labels)
    for n in (0, 7, 29):
        one = turned(kernels, logits[n : n + 1], labels[n : n + 1])
        assert torch.equal(one[0], whole[0][n : n + 1]) and torch.equal(one[1], whole[1][n : n + 1])
    room = kernels.room(30, 100, logits)
    assert room.stride() == (128, 1)
    room._base.fill_(torch.nan)
    room.copy_(logits)
    losses = torch.empty(30)
    kernels.turned(room, labels, labels == IGNORED, losses, IGNORED, True)
    assert torch.equal(losses, whole[0]) and torch.equal(room, whole[1])


def whole() -> None:
    """The function with the kernel between its products: the sum, and both gradients."""

    def plain(logits: Any, labels: Any, ignored: Any, losses: Any, ignore_index: int, gradient: bool) -> Any:
        room = kernels.room(*logits.shape, logits).copy_(logits)
        return kernels.turned(room, labels, ignored, losses, ignore_index, gradient)

    generator = torch.Generator().manual_seed(0)
    for dtype, width in itertools.product(DTYPES, (7, 100)):
        x, weight = (torch.randn(n, 12, generator=generator).to(dtype) for n in (21, width))
        _, labels = given(width, dtype)
        logits = torch.mm(x, weight.T)
        losses, slopes = exact(logits, labels)
        bounds = through_products(x, weight, labels, slopes, 32, logits)
        for chunk in (None, 4, 21):
            with mock.patch.object(module, "_turned", plain):
                leaves = [part.clone().requires_grad_() for part in (x, weight)]
                total = linear_cross_entropy(*leaves, labels, chunk=chunk)
                got = torch.autograd.grad(total, leaves)
            assert abs(total.double() - losses.sum()) <= 64 * torch.finfo(torch.float32).eps * losses.sum()
            for mine, (want, room) in zip(got, bounds.values(), strict=True):
                assert mine.dtype == dtype and bool((abs(mine.double() - want) <= room).all())


if __name__ == "__main__":
    main(globals())
