"""Rows divided by their root mean square, and by a gate multiplied: one pass over memory each way."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from linattn.backends.triton.launcher import Launcher

Tensor = torch.Tensor

# Letters: N rows, W numbers in a row. Upper case is a size, lower case the index vector along it; a trailing
# [n w] is the shape of the block on that line. b is the number of bytes of one number.
#
#                   reads, writes               bytes     operations (a multiplication or an addition is one)
# forward           x -> y                      2 b N W   3 N W
#   gated           x, u -> y                   3 b N W   4 N W
# backward          x, dy -> dx                 3 b N W   8 N W
#   added, again    x, dy, more -> dx, y        5 b N W   9 N W
#   gated           x, u, dy -> dx, du          5 b N W   10 N W
#   gated, again    x, u, dy -> dx, du, y       6 b N W   11 N W
#
# The backward pass reads x anyway, so it forms r = 1 / sqrt(mean(x^2) + eps) again: 2 operations a number, no
# byte. A kept r would be 4 bytes a row written and 4 read, and a tensor that lives until then. So y can be
# formed again for b N W, by those who need it then and have not kept it. A gradient that x has from elsewhere
# is one more read here; an addition of its own would be 3 b N W.


EARLY = tl.constexpr(8192)  # wider blocks have threads with too few registers to hold a fourth number


@triton.jit
def rows_at(ptr, at, inside):
    """A block of numbers in float32; 0 outside."""
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def norm(
    x_ptr, x_n,  # [N W], rows x_n numbers apart
    u_ptr, u_n,  # [N W]; read only if GATED
    y_ptr,  # [N W], without gaps
    N, W, eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MORE: tl.constexpr,  # W > BLOCK: all blocks but the first are read twice
    GATED: tl.constexpr,
):  # fmt: skip
    """y = x r, or u x r, with r = 1 / sqrt(mean(x^2) + eps) of the row; ROWS rows in a program."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, BLOCK)
    there = (n < N)[:, None]
    inside = there & (w < W)[None, :]  # [n w]
    to_x, to_u, to_y = (n * x_n)[:, None], (n * u_n)[:, None], (n * W)[:, None]  # [n 1]
    x = rows_at(x_ptr, to_x + w[None, :], inside)  # [n w]
    u = x
    if GATED:
        u = rows_at(u_ptr, to_u + w[None, :], inside)
    squares = x * x
    if MORE:
        for first in range(BLOCK, W, BLOCK):
            later = first + w
            z = rows_at(x_ptr, to_x + later[None, :], there & (later < W)[None, :])
            squares += z * z
    r = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / W + eps)  # [n 1]
    y = x * r
    if GATED:
        y *= u
    tl.store(y_ptr + to_y + w[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    if MORE:
        for first in range(BLOCK, W, BLOCK):
            later = first + w
            within = there & (later < W)[None, :]
            y = rows_at(x_ptr, to_x + later[None, :], within) * r
            if GATED:
                y *= rows_at(u_ptr, to_u + later[None, :], within)
            tl.store(y_ptr + to_y + later[None, :], y.to(y_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["N"])
def norm_backward(
    x_ptr, x_n,  # [N W], rows x_n numbers apart
    u_ptr, u_n,  # [N W]; read only if GATED
    dy_ptr, dy_n,  # [N W]
    more_ptr, more_n,  # [N W]; read only if ADDED
    dx_ptr,  # [N W], without gaps
    du_ptr,  # [N W], without gaps; written only if GATED
    y_ptr,  # [N W], without gaps; written only if AGAIN
    N, W, eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MORE: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,  # dx has a part from elsewhere: `more`; not if GATED
    AGAIN: tl.constexpr,  # y is formed again
):  # fmt: skip
    """dx = r (g - x r^2 mean(g x)) with g = dy, or u dy if there is a gate, whose du = dy x r."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, BLOCK)
    there = (n < N)[:, None]
    inside = there & (w < W)[None, :]  # [n w]
    to_x, to_u, to_dy = (n * x_n)[:, None], (n * u_n)[:, None], (n * dy_n)[:, None]  # [n 1]
    to_more, to_dx = (n * more_n)[:, None], (n * W)[:, None]
    x = rows_at(x_ptr, to_x + w[None, :], inside)  # [n w]
    dy = rows_at(dy_ptr, to_dy + w[None, :], inside)
    u, more = x, x
    if GATED:
        u = rows_at(u_ptr, to_u + w[None, :], inside)
    if ADDED and BLOCK <= EARLY:
        more = rows_at(more_ptr, to_more + w[None, :], inside)
    g = dy
    if GATED:
        g *= u
    squares, products = x * x, g * x
    if MORE:
        for first in range(BLOCK, W, BLOCK):
            later = first + w
            within = there & (later < W)[None, :]
            z = rows_at(x_ptr, to_x + later[None, :], within)
            slope = rows_at(dy_ptr, to_dy + later[None, :], within)
            if GATED:
                slope *= rows_at(u_ptr, to_u + later[None, :], within)
            squares += z * z
            products += slope * z
    r = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / W + eps)  # [n 1]
    along = tl.sum(products, 1, keep_dims=True) / W * r  # [n 1], the mean of g times the normed row
    x *= r
    dx = (g - x * along) * r
    if ADDED:
        if BLOCK > EARLY:
            more = rows_at(more_ptr, to_more + w[None, :], inside)
        dx += more
    tl.store(dx_ptr + to_dx + w[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(du_ptr + to_dx + w[None, :], (dy * x).to(du_ptr.dtype.element_ty), mask=inside)
    if AGAIN:
        if GATED and BLOCK > EARLY:
            u = rows_at(u_ptr, to_u + w[None, :], inside)
        y = x * u if GATED else x
        tl.store(y_ptr + to_dx + w[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    if MORE:
        for first in range(BLOCK, W, BLOCK):
            later = first + w
            within = there & (later < W)[None, :]
            x = rows_at(x_ptr, to_x + later[None, :], within) * r
            dy = rows_at(dy_ptr, to_dy + later[None, :], within)
            g = dy
            if GATED:
                u = rows_at(u_ptr, to_u + later[None, :], within)
                g *= u
            dx = (g - x * along) * r
            if ADDED:
                dx += rows_at(more_ptr, to_more + later[None, :], within)
            tl.store(dx_ptr + to_dx + later[None, :], dx.to(dx_ptr.dtype.element_ty), mask=within)
            if GATED:
                du = dy * x
                tl.store(du_ptr + to_dx + later[None, :], du.to(du_ptr.dtype.element_ty), mask=within)
            if AGAIN:
                y = x * u if GATED else x
                tl.store(y_ptr + to_dx + later[None, :], y.to(y_ptr.dtype.element_ty), mask=within)


@dataclass(frozen=True)
class Shape:
    """What a launch looks like: `rows` rows in a program, each in blocks of `block` numbers."""

    rows: int
    block: int
    warps: int


NUMBERS = 2048  # in a program, if its rows are narrow
OF_A_THREAD = 16
WIDEST = 16384  # numbers of a row that a program keeps in registers
IN_TURN = 4096  # numbers in a block of a row that is wider


@functools.lru_cache(maxsize=256)
def shape(width: int) -> Shape:
    """The launch for rows of `width` numbers; how many rows there are has no say in a row's bits."""
    block = triton.next_power_of_2(width) if width <= WIDEST else IN_TURN
    rows = max(1, NUMBERS // block)
    return Shape(rows, block, max(1, rows * block // (32 * OF_A_THREAD)))


start = Launcher(norm)
start_backward = Launcher(norm_backward)


def forward(x: Tensor, u: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times u if there is one; rounded once, to dtype or x's.

    x and u [... W] of one shape, in any layout; float32 arithmetic. Starts one kernel on the device of x and
    its current stream.
    """
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if not x.numel():
        return y
    flat, gate = rows_of(x), None if u is None else rows_of(u)
    n, width = flat.shape
    how = shape(width)
    strides = flat.stride(0), 0 if gate is None else gate.stride(0)
    constants = how.rows, how.block, width > how.block, gate is not None
    with on(x.device):
        start(
            triton.cdiv(n, how.rows), _key((flat, gate, y), strides, constants, how),
            (flat, strides[0], flat if gate is None else gate, strides[1], y, n, width, eps),
            constants, num_warps=how.warps, num_stages=1,
        )  # fmt: skip
    return y


def backward(
    x: Tensor,
    u: Tensor | None,
    dy: Tensor,
    eps: float,
    more: Tensor | None = None,
    again: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, and of u if there is one, from the gradient of `forward`'s result; and that result.

    more: a gradient that x has from elsewhere, added to this one; not where there is a gate. again: the dtype
    of the result, which is None unless asked for.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    du = None if u is None else torch.empty_like(u, memory_format=torch.contiguous_format)
    y = None if again is None else torch.empty_like(dx, dtype=again)
    if not x.numel():
        return dx, du, y
    flat, slope = rows_of(x), rows_of(dy)
    gate, other = (None if part is None else rows_of(part) for part in (u, more))
    n, width = flat.shape
    how = shape(width)
    strides = tuple(0 if part is None else part.stride(0) for part in (flat, gate, slope, other))
    constants = (
        how.rows, how.block, width > how.block, gate is not None, other is not None, y is not None
    )  # fmt: skip
    with on(x.device):
        start_backward(
            triton.cdiv(n, how.rows), _key((flat, gate, slope, other, y), strides, constants, how),
            (
                flat, strides[0], flat if gate is None else gate, strides[1], slope, strides[2],
                flat if other is None else other, strides[3], dx, dx if du is None else du,
                dx if y is None else y, n, width, eps,
            ),
            constants, num_warps=how.warps, num_stages=1,
        )  # fmt: skip
    return dx, du, y


def _key(parts: tuple[Tensor | None, ...], strides: tuple[int, ...], constants: Any, how: Shape) -> Any:
    """What a compiled variant depends on; of the number of rows, only whether 32 bits hold it."""
    (n, width), device = parts[0].shape, parts[0].device  # type: ignore[union-attr]
    dtypes = tuple(None if part is None else part.dtype for part in parts)
    return dtypes, device, width, strides, constants, how.warps, n >= 1 << 31


def rows_of(x: Tensor) -> Tensor:
    """[N W] with the numbers of a row side by side; a copy only where no view has that."""
    flat = x.resolve_neg().reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def on(device: torch.device) -> Any:
    """Kernels start on the current device: make it the tensors'."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
