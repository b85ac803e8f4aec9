"""A few rows times a weight matrix, as decoding has them: the weights are under way before the rows exist."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from linattn.backends.triton import norm
from linattn.backends.triton.launcher import Launcher, chained
from linattn.prepared import PLAIN

Tensor = torch.Tensor

# Letters: B rows, K numbers in a row, N numbers in an output row; upper case is a size, lower case the index
# vector along it; a trailing [n k] is the shape of the block on that line. Numbers have 2 bytes.
#
# One launch moves the weights, 2 N K bytes (4 N K for a product of two), and for B rows does 2 B N K
# operations: up to B = 100 or so the bytes decide. What else a layer of a decoder does to a row rides along:
# the norm of the row is a factor r = 1 / sqrt(mean(x^2) + eps) of the result, a gate is a product as the row
# is read, a residual one more number to add.
#
# CHAINED kernels start before the one in front of them has ended (programmatic dependent launches, compute
# capability 9.0): each lets the next one begin, asks for its weights, which nobody writes, and only then
# waits for the rows. So the weights of the next product travel while this one adds up.


@triton.jit
def low(pair, HALF: tl.constexpr):
    """The first of two numbers in 32 bits, in float32; HALF: float16, else bfloat16."""
    if HALF:
        return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(pair, HALF: tl.constexpr):
    """The second one."""
    if HALF:
        return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (pair & -65536).to(tl.float32, bitcast=True)


# A row lies in pieces of 128 pairs, which a warp reads in one go; whole rows belong to one warp, so that sums
# need no other. Numbers stay in pairs until after the wait: taking them apart would wait for them. The size
# of a row is known when it is compiled, so that all loads are asked for at once.
LANES = tl.constexpr(128)


@triton.jit
def pieces(ptr, there, PIECES: tl.constexpr, K: tl.constexpr):
    """Blocks [n l] of pairs, as many as a row has; ptr [n 1] are the rows' beginnings. 0 outside."""
    found = ()
    for p in tl.static_range(PIECES):
        k = (tl.arange(0, LANES) + p * LANES)[None, :]
        found = found + (tl.load(ptr + k, mask=there & (k < K), other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit(do_not_specialize=["N"])
def few(
    x_ptr, x_b,  # [B K], in pairs; rows x_b pairs apart
    g_ptr, g_b,  # [B K], the gate; read only if GATED
    w_ptr, v_ptr,  # [N K], in pairs, without gaps; v is read only if PRODUCT
    r_ptr, r_b,  # [B N], the residual; read only if RESIDUAL
    y_ptr,  # [B N], without gaps
    N, eps,
    K: tl.constexpr,  # in pairs
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,  # of the weights, in a program
    PIECES: tl.constexpr,  # of a row
    HALF: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    PRODUCT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """y = r x W^T, or r^2 (x W^T) (x V^T), + residual; r is 1 without NORM, x is x times gate with one."""
    if CHAINED:
        gdc_launch_dependents()
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < N
    to_w = (n.to(tl.int64) * K)[:, None]
    w = pieces(w_ptr + to_w, there[:, None], PIECES, K)
    v = w
    if PRODUCT:
        v = pieces(v_ptr + to_w, there[:, None], PIECES, K)
    if CHAINED:
        gdc_wait()
    of_all = (n * 0)[:, None]  # each warp reads all of x
    for b in tl.static_range(BATCH):
        x = pieces(x_ptr + b * x_b + of_all, of_all == 0, PIECES, K)
        g = x
        if GATED:
            g = pieces(g_ptr + b * g_b + of_all, of_all == 0, PIECES, K)
        residual = there.to(tl.float32)
        if RESIDUAL:
            residual = tl.load(r_ptr + b * r_b + n, mask=there, other=0.0).to(tl.float32)
        y = tl.zeros([ROWS, LANES], tl.float32)
        y_other, squares = y, y
        for p in tl.static_range(PIECES):
            first, second = low(x[p], HALF), high(x[p], HALF)
            if NORM:
                squares += first * first + second * second
            if GATED:
                first, second = first * low(g[p], HALF), second * high(g[p], HALF)
            y += low(w[p], HALF) * first + high(w[p], HALF) * second
            if PRODUCT:
                y_other += low(v[p], HALF) * first + high(v[p], HALF) * second
        o = tl.sum(y, 1)
        if NORM:
            r = tl.rsqrt(tl.sum(squares, 1) / (2 * K) + eps)
            o *= r
        if PRODUCT:
            other = tl.sum(y_other, 1)
            if NORM:
                other *= r
            o *= other
        if RESIDUAL:
            o += residual
        tl.store(y_ptr + b * N + n, o.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["B", "N"])
def many(
    x_ptr, x_b,  # [B K]; rows x_b numbers apart
    w_ptr, v_ptr,  # [N K], without gaps; v is read only if PRODUCT
    r_ptr, r_b,  # [B N], the residual; read only if RESIDUAL
    y_ptr,  # [B N], without gaps
    B, N, K, eps,
    BATCH: tl.constexpr,  # a power of two from B on
    ROWS: tl.constexpr,  # of the weights, in a program
    BLOCK: tl.constexpr,  # of K
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    PRODUCT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The same by matrix products, without a gate."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    to_w = n.to(tl.int64) * K  # [n]
    b, k = tl.arange(0, BATCH), tl.arange(0, BLOCK)
    to_x = (b * x_b)[:, None]
    y = tl.zeros([BATCH, ROWS], tl.float32)
    y_other, total = y, tl.zeros([BATCH], tl.float32)
    for first in tl.range(0, K, BLOCK, num_stages=STAGES):
        at = first + k
        x = tl.load(x_ptr + to_x + at[None, :], mask=(b < B)[:, None] & (at < K)[None, :], other=0.0)  # [b k]
        inside = (n < N)[None, :] & (at < K)[:, None]
        w = tl.load(w_ptr + to_w[None, :] + at[:, None], mask=inside, other=0.0)  # [k n]
        y = tl.dot(x, w, y, input_precision="ieee")
        if PRODUCT:
            v = tl.load(v_ptr + to_w[None, :] + at[:, None], mask=inside, other=0.0)
            y_other = tl.dot(x, v, y_other, input_precision="ieee")
        if NORM:
            wide = x.to(tl.float32)
            total += tl.sum(wide * wide, 1)
    if NORM:
        r = tl.rsqrt(total / K + eps)[:, None]
        y *= r
        if PRODUCT:
            y_other *= r
    if PRODUCT:
        y *= y_other
    kept = (b < B)[:, None] & (n < N)[None, :]
    if RESIDUAL:
        y += tl.load(r_ptr + (b * r_b)[:, None] + n[None, :], mask=kept, other=0.0).to(tl.float32)
    tl.store(y_ptr + (b * N)[:, None] + n[None, :], y.to(y_ptr.dtype.element_ty), mask=kept)


FEW = 4  # rows that are added up one after the other; more go through matrix products
MANY = 128  # rows beyond which a matrix product is no longer bound by its weights
WIDEST = 8192  # numbers of weights that a warp can hold in registers; wider rows are products as well
WIDE = 5120  # the same for more than one row
APART = 1 << 24  # numbers between rows, MANY times which fits into 32 bits


@dataclass(frozen=True)
class Shape:
    """What a launch looks like: `rows` rows of the weights in a program; block and stages are of `many`."""

    rows: int
    warps: int
    block: int = 0
    stages: int = 1


@functools.lru_cache(maxsize=256)
def shape(b: int, n: int, k: int, two: bool) -> Shape:
    """The launch for b rows of k numbers and n outputs from one matrix, or two."""
    numbers = k * (2 if two else 1)
    if b <= FEW and numbers <= (WIDEST if b == 1 else WIDE):
        return Shape(16 if numbers <= 2048 else 8, 8)  # two rows in a warp, or one
    return Shape(32 if two or n >= 2048 else 16, 4, 128, 5 if k > 2048 else 3)


start_few, start_many = Launcher(few), Launcher(many)


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether `products` takes rows x [B, K] of this dtype with weights [N, K]."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.ndim == 2
        and 1 <= x.shape[0] <= MANY
        and all(
            type(w) in PLAIN and w.layout is torch.strided and w.dtype == x.dtype and w.device == x.device
            and w.is_contiguous() and w.shape[1] % 16 == 0 and w.data_ptr() % 16 == 0
            for w in weights
        )
    )  # fmt: skip


def products(
    x: Tensor,
    weights: tuple[Tensor, ...],
    *,
    eps: float | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """norm(x) W^T for x [B, K] and W [N, K]; for two matrices the product of both, number by number.

    eps: of the norm x / sqrt(mean(x^2) + eps); None for none. gate [B, K]: the normed row is multiplied by
    it. residual [B, N]: added at the end. All have one dtype; x, gate and residual any strides. Sums in
    float32, rounded once, to that dtype; where matrix products form them, a gated row is rounded before as
    well. Starts one kernel, then two, on the device of x, which must be the current one, and its current
    stream.
    """
    w, other = weights[0], weights[-1]
    (b, k), n = x.shape, w.shape[0]
    y = torch.empty(b, n, dtype=x.dtype, device=x.device)
    how, early = shape(b, n, k, len(weights) > 1), chained()
    if gate is not None and how.block:
        x, gate, eps = (x * gate if eps is None else norm.forward(x, gate, eps)), None, None
    x, gate = rows_of(x), None if gate is None else rows_of(gate)
    g, r = x if gate is None else gate, y if residual is None else rows_of(residual)
    flags = eps is not None, len(weights) > 1, residual is not None
    kind = (x.dtype, x.device, k, x.stride(0), g.stride(0), r.stride(0), how.warps)
    tail = y, n, 0.0 if eps is None else eps
    programs, options = triton.cdiv(n, how.rows), {"num_warps": how.warps, "num_stages": 1}
    if not how.block:
        i, half = torch.int32, x.dtype == torch.float16
        held = x.view(i), x.stride(0) // 2, g.view(i), g.stride(0) // 2, w.view(i), other.view(i)
        constants: tuple[Any, ...] = (
            k // 2, b, how.rows, triton.cdiv(k, 256), half, gate is not None, *flags, early,
        )  # fmt: skip
        if early:
            options["launch_pdl"] = True
        start_few(programs, (kind, constants), (*held, r, r.stride(0), *tail), constants, **options)
    else:
        constants = max(16, triton.next_power_of_2(b)), how.rows, how.block, how.stages, *flags
        arguments = x, x.stride(0), w, other, r, r.stride(0), y, b, n, k, tail[-1]
        start_many(programs, (kind, constants), arguments, constants, **options)
    return y


def rows_of(x: Tensor) -> Tensor:
    """[B K] with the numbers of a row side by side, rows beginning at multiples of 16 bytes; else a copy."""
    even = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) < APART
    if even and x.stride(1) == 1 and not x.is_neg():
        return x
    return x.resolve_neg().clone(memory_format=torch.contiguous_format)
