"""Logits turned into the losses of their rows, and in place into the gradient: softmax less a unit vector."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from linattn.backends.triton.launcher import Launcher
from linattn.backends.triton.norm import on

Tensor = torch.Tensor

# Letters: N rows, V numbers in a row, S >= V numbers from one row to the next. Upper case is a size, lower
# case the index vector along it. b is the number of bytes of one logit.
#
#               reads, writes                bytes     operations (multiplications, additions, comparisons)
# loss          logits                       b N V     5 N V, and N V exponentials
#   gradient    logits, logits -> gradient   3 b N V   8 N V, and 2 N V exponentials
#
# A GPU's cache may still hold a row when it is read again: then 2 b N V pass through its memory.


@triton.jit
def part_of(row_ptr, v, V, S):
    """Logits in float32, -inf outside of the row; what lies between two rows is read and dropped.

    S is a multiple of 16, so loads stay wide whatever V is.
    """
    return tl.where(v < V, tl.load(row_ptr + v, mask=v < S, other=0.0).to(tl.float32), -float("inf"))


@triton.jit(do_not_specialize=["ignored"])
def cross_entropy(
    logits_ptr,  # [N V], rows S numbers apart; becomes the gradient if GRADIENT, up to column S
    labels_ptr,  # [N], int64
    losses_ptr,  # [N], float32
    V, S, ignored,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """loss = log(sum(exp(x - m))) - (x[label] - m) with m = max(x); one row in a program."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK)
    row_ptr = logits_ptr + n * S
    kind = logits_ptr.dtype.element_ty
    label = tl.load(labels_ptr + n)
    if label == ignored:
        tl.store(losses_ptr + n, 0.0)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                tl.store(row_ptr + first + v, tl.zeros([BLOCK], kind), mask=first + v < S)
    else:
        known = (label >= 0) & (label < V)
        own = tl.load(row_ptr + label, mask=known, other=0.0).to(tl.float32)
        most = -float("inf")
        sums = tl.zeros([BLOCK], tl.float32)  # of each block's columns, relative to exp(most)
        for first in range(0, V, BLOCK):
            x = part_of(row_ptr, first + v, V, S)
            higher = tl.maximum(most, tl.max(x, 0))
            at = tl.where(higher == -float("inf"), 0.0, higher)  # -inf less -inf is NaN
            sums = sums * tl.exp(most - at) + tl.exp(x - at)
            most = higher
        total = tl.where(known, tl.sum(sums, 0), float("nan"))
        tl.store(losses_ptr + n, tl.log(total) - (own - most))
        if GRADIENT:
            tl.debug_barrier()  # all have read the label's logit
            share = 1.0 / total
            for first in range(0, V, BLOCK):
                x = part_of(row_ptr, first + v, V, S)
                p = tl.exp(x - most) * share
                p = tl.where(first + v == label, p - 1.0, p)
                tl.store(row_ptr + first + v, p.to(kind), mask=first + v < S)


@dataclass(frozen=True)
class Shape:
    """What a launch looks like: a row in blocks of `block` numbers."""

    block: int
    warps: int


WIDEST = 4096  # numbers of a row that a program works on at a time
OF_A_THREAD = 16
APART = 64  # rows of logits begin at multiples of so many numbers


@functools.lru_cache(maxsize=256)
def shape(width: int) -> Shape:
    """The launch for rows of `width` numbers; how many rows there are has no say in a row's bits."""
    block = min(max(32, triton.next_power_of_2(width)), WIDEST)
    return Shape(block, max(1, block // (32 * OF_A_THREAD)))


start = Launcher(cross_entropy)


def room(rows: int, width: int, like: Tensor) -> Tensor:
    """Memory for logits [rows width] of the dtype and on the device of `like`."""
    return like.new_empty(rows, max(1, triton.cdiv(width, APART)) * APART)[:, :width]


def turned(
    logits: Tensor, labels: Tensor, ignored: Tensor, losses: Tensor, ignore_index: int, gradient: bool
) -> Tensor:
    """Write each row's loss, and over the logits, if asked for, the gradient of the losses' sum.

    logits [N V] lie in a `room`, labels [N] int64, losses [N] float32 without gaps. A label of ignore_index
    gives 0 and 0 (`ignored`, the same said otherwise, is not read), another one outside of 0 … V - 1 NaN and
    NaN. Returns the logits. Starts one kernel on their device and its current stream.
    """
    n, width = logits.shape
    if n == 0:
        return logits
    how, apart = shape(width), logits.stride(0)
    constants = how.block, gradient
    labels = labels.contiguous()
    wide = not -(1 << 31) <= ignore_index < 1 << 31
    with on(logits.device):
        start(
            n, (logits.dtype, logits.device, width, apart, constants, how.warps, wide),
            (logits, labels, losses, width, apart, ignore_index), constants,
            num_warps=how.warps, num_stages=1,
        )  # fmt: skip
    return logits
