"""A few rows times a weight matrix, as decoding has them: the weights are under way before the rows exist."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from linattn.backends.triton import norm, rows_shape
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
PAIR, BITS = tl.constexpr(tl.pointer_type(tl.int32)), tl.constexpr(tl.pointer_type(tl.int16))


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
    x_ptr, x_b,  # [B K]; rows x_b pairs of numbers apart
    g_ptr, g_b,  # [B K], the gate; read only if GATED
    w_ptr, v_ptr,  # [N K], without gaps; v is read only if PRODUCT
    r_ptr, r_b,  # [B N], the residual; read only if RESIDUAL
    y_ptr,  # [B N], without gaps
    N, eps,
    K: tl.constexpr,  # in pairs
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,  # of the weights, in a program
    PIECES: tl.constexpr,  # of a row
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    PRODUCT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """y = r x W^T, or r^2 (x W^T) (x V^T), + residual; r is 1 without NORM, x is x times gate with one."""
    if CHAINED:
        gdc_launch_dependents()
    x_ptr, g_ptr = x_ptr.to(PAIR, bitcast=True), g_ptr.to(PAIR, bitcast=True)
    w_ptr, v_ptr = w_ptr.to(PAIR, bitcast=True), v_ptr.to(PAIR, bitcast=True)
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
                squares = tl.fma(first, first, tl.fma(second, second, squares))
            if GATED:
                first, second = first * low(g[p], HALF), second * high(g[p], HALF)
            y = tl.fma(low(w[p], HALF), first, tl.fma(high(w[p], HALF), second, y))
            if PRODUCT:
                y_other = tl.fma(low(v[p], HALF), first, tl.fma(high(v[p], HALF), second, y_other))
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


@triton.jit
def of_rows(ptr, step, b, k, B, K, WHOLE: tl.constexpr):
    """Numbers k of rows b: [b k]. 0 outside, which no k is if WHOLE."""
    inside = (b < B)[:, None]
    if not WHOLE:
        inside = inside & (k < K)[None, :]
    return tl.load(ptr + (b * step)[:, None] + k[None, :], mask=inside, other=0.0)


@triton.jit
def of_weights(ptr, n, k, N, K, WHOLE: tl.constexpr):
    """Numbers k of the weights' rows n, which have as many bits as offsets: [k n]. 0 outside."""
    inside = (n < N)[None, :]
    if not WHOLE:
        inside = inside & (k < K)[:, None]
    return tl.load(ptr + (n * K)[None, :] + k[:, None], mask=inside, other=0)


@triton.jit
def read_as(blocks, ptr, BLOCKS: tl.constexpr):
    """Blocks of bits as numbers of ptr's dtype."""
    found = ()
    for p in tl.static_range(BLOCKS):
        found = found + (blocks[p].to(ptr.dtype.element_ty, bitcast=True),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def with_block(y, other, total, x, g, w, v, NORM: tl.constexpr, GATED: tl.constexpr, PRODUCT: tl.constexpr):
    """The sums x W^T and x V^T [b n] and those of squares [b], a block of K later."""
    if NORM:
        wide = x.to(tl.float32)
        total += tl.sum(wide * wide, 1)
    if GATED:
        x *= g
    y = tl.dot(x, w, y, input_precision="ieee")
    if PRODUCT:
        other = tl.dot(x, v, other, input_precision="ieee")
    return y, other, total


@triton.jit(do_not_specialize=["B", "N"])
def many(
    x_ptr, x_b,  # [B K]; rows x_b numbers apart
    g_ptr, g_b,  # [B K], the gate; read only if GATED
    w_ptr, v_ptr,  # [N K], without gaps; v is read only if PRODUCT
    r_ptr, r_b,  # [B N], the residual; read only if RESIDUAL
    y_ptr,  # [B N], without gaps
    sum_ptr,  # float32, what parts of K add up to: y, other, total, of each part of a tile; unless PARTS is 1
    done_ptr,  # [tiles], int32, how many of a tile's parts are there: 0 before and after
    B, N, K, eps,
    BATCH: tl.constexpr,  # a power of two from B on
    ROWS: tl.constexpr,  # of the weights, in a tile
    BLOCK: tl.constexpr,  # of K
    BLOCKS: tl.constexpr,  # in a part of K, all under way at once; 0: one part, whose blocks are so in STAGES
    PARTS: tl.constexpr,  # of K, each of which is a program's
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,  # K fills all blocks
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    PRODUCT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHAINED: tl.constexpr,  # only with BLOCKS
):  # fmt: skip
    """The same by matrix products. A tile's part that is there last adds all of them up, in one order."""
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    n = tile * ROWS + tl.arange(0, ROWS)
    b, k = tl.arange(0, BATCH), part * (BLOCKS * BLOCK) + tl.arange(0, BLOCK)
    y = tl.zeros([BATCH, ROWS], tl.float32)
    other, total = y, tl.zeros([BATCH], tl.float32)
    if BLOCKS:
        # The compiler moves a block to shared memory, and waits for it, where it becomes numbers. Read as
        # bits, all blocks are under way first: faster from 32 rows on, slower below. Letting the next kernel
        # in before the loads is faster for 5, 8 and 32 rows, slower for 16 and 64.
        if CHAINED and BATCH < 64:
            gdc_launch_dependents()
        weights, others = (), ()
        from_w, from_v = w_ptr, v_ptr
        if BATCH > 16:
            from_w, from_v = w_ptr.to(BITS, bitcast=True), v_ptr.to(BITS, bitcast=True)
        for p in tl.static_range(BLOCKS):
            w = of_weights(from_w, n, k + p * BLOCK, N, K, WHOLE)
            weights = weights + (w,)  # type: ignore[assignment]  # noqa: RUF005
            if PRODUCT:
                w = of_weights(from_v, n, k + p * BLOCK, N, K, WHOLE)
            others = others + (w,)  # type: ignore[assignment]  # noqa: RUF005
        if BATCH > 16:
            tl.debug_barrier()
            weights, others = read_as(weights, x_ptr, BLOCKS), read_as(others, x_ptr, BLOCKS)
        if CHAINED:
            if BATCH >= 64:
                gdc_launch_dependents()
            gdc_wait()
        numbers, gates = (), ()
        for p in tl.static_range(BLOCKS):
            x = of_rows(x_ptr, x_b, b, k + p * BLOCK, B, K, WHOLE)
            numbers = numbers + (x,)  # type: ignore[assignment]  # noqa: RUF005
            if GATED:
                x = of_rows(g_ptr, g_b, b, k + p * BLOCK, B, K, WHOLE)
            gates = gates + (x,)  # type: ignore[assignment]  # noqa: RUF005
        for p in tl.static_range(BLOCKS):
            y, other, total = with_block(
                y, other, total, numbers[p], gates[p], weights[p], others[p], NORM, GATED, PRODUCT
            )
    else:
        wide = n.to(tl.int64)
        for first in tl.range(0, K, BLOCK, num_stages=STAGES):
            x = of_rows(x_ptr, x_b, b, first + k, B, K, WHOLE)
            g = x
            if GATED:
                g = of_rows(g_ptr, g_b, b, first + k, B, K, WHOLE)
            w = of_weights(w_ptr, wide, first + k, N, K, WHOLE)
            v = w
            if PRODUCT:
                v = of_weights(v_ptr, wide, first + k, N, K, WHOLE)
            y, other, total = with_block(y, other, total, x, g, w, v, NORM, GATED, PRODUCT)
    last = True
    if PARTS > 1:
        SIZE: tl.constexpr = BATCH * ROWS
        ALL: tl.constexpr = SIZE * (2 if PRODUCT else 1) + BATCH
        to_sum = sum_ptr + (tile * PARTS + part) * ALL
        inner = b[:, None] * ROWS + tl.arange(0, ROWS)[None, :]  # [b n]
        tl.store(to_sum + inner, y)
        if PRODUCT:
            tl.store(to_sum + SIZE + inner, other)
        if NORM:
            tl.store(to_sum + ALL - BATCH + b, total)
        tl.debug_barrier()  # one thread counts, for all of them
        last = tl.atomic_add(done_ptr + tile, 1) == PARTS - 1
    if last:
        if PARTS > 1:
            y = tl.zeros([BATCH, ROWS], tl.float32)
            other, total = y, tl.zeros([BATCH], tl.float32)
            for p in tl.static_range(PARTS):
                to_sum = sum_ptr + (tile * PARTS + p) * ALL
                y += tl.load(to_sum + inner, cache_modifier=".cg")
                if PRODUCT:
                    other += tl.load(to_sum + SIZE + inner, cache_modifier=".cg")
                if NORM:
                    total += tl.load(to_sum + ALL - BATCH + b, cache_modifier=".cg")
            tl.store(done_ptr + tile, 0)
        if NORM:
            r = tl.rsqrt(total / K + eps)[:, None]
            y *= r
            if PRODUCT:
                other *= r
        if PRODUCT:
            y *= other
        kept = (b < B)[:, None] & (n < N)[None, :]
        if RESIDUAL:
            y += tl.load(r_ptr + (b * r_b)[:, None] + n[None, :], mask=kept, other=0.0).to(tl.float32)
        tl.store(y_ptr + (b * N)[:, None] + n[None, :], y.to(y_ptr.dtype.element_ty), mask=kept)


FEW, MANY = rows_shape.FEW, rows_shape.MANY  # rows from which others take over
APART = 1 << 24  # numbers between rows, MANY times which fits into 32 bits
GATED = (torch.bfloat16,)  # dtypes with float32's range: a number is multiplied by its gate before the norm

start_few, start_many = Launcher(few), Launcher(many)


def counters(x: Tensor) -> Tensor:
    """What `products` counts in, for all calls behind one another on x's device and stream."""
    return torch.zeros(rows_shape.PROGRAMS, dtype=torch.int32, device=x.device)


@functools.cache
def room(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return rows_shape.ROOM
    found: Any = torch.cuda.get_device_properties(device)
    return int(found.shared_memory_per_block_optin)


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether `products` takes rows x [B, K] of this dtype with weights [N, K]."""
    if not (x.dtype in (torch.bfloat16, torch.float16) and x.ndim == 2 and 1 <= x.shape[0] <= MANY):
        return False
    # in columns, as a step of a model asks for 120 matrices
    return (
        {*map(type, weights)} <= {*PLAIN}
        and {*map(_KIND, weights)} <= {(x.dtype, torch.strided)}
        and {*map(Tensor.get_device, weights)} <= {x.get_device()}
        and all(map(Tensor.is_contiguous, weights))
        and not any(map(Tensor.is_neg, weights))
        and not any(address % 16 for address in map(Tensor.data_ptr, weights))
        and not any(len(shape) != 2 or shape[1] % 16 for shape in {*map(_SHAPE, weights)})
    )


_KIND, _SHAPE = operator.attrgetter("dtype", "layout"), operator.attrgetter("shape")


def products(
    x: Tensor,
    weights: tuple[Tensor, ...],
    *,
    eps: float | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    done: Tensor | None = None,
) -> Tensor:
    """norm(x) W^T for x [B, K] and W [N, K]; for two matrices the product of both, number by number.

    eps: of the norm x / sqrt(mean(x^2) + eps); None for none. gate [B, K]: the normed row is multiplied by
    it. residual [B, N]: added at the end. All have one dtype; x, gate and residual any strides. done:
    `counters(x)`, to be used again; None for new ones. Sums in float32, rounded once, to that dtype; where
    matrix products form them, a gated row is rounded before as well. Starts one kernel (more for a gate in
    float16, and to fill new counters) on the device of x, which must be the current one, and its current
    stream.
    """
    w, other = weights[0], weights[-1]
    (b, k), n = x.shape, w.shape[0]
    y = torch.empty(b, n, dtype=x.dtype, device=x.device)
    how = rows_shape.shape(b, n, k, len(weights) > 1, gate is not None, room(x.device))
    if gate is not None and how.block and x.dtype not in GATED:
        x, gate, eps = (x * gate if eps is None else norm.forward(x, gate, eps)), None, None
        how = rows_shape.shape(b, n, k, len(weights) > 1, False, room(x.device))
    early = chained() and how.chains
    x, gate = rows_of(x), None if gate is None else rows_of(gate)
    g, r = x if gate is None else gate, y if residual is None else rows_of(residual)
    flags = eps is not None, gate is not None, len(weights) > 1, residual is not None
    kind = (x.dtype, x.device, k, x.stride(0), g.stride(0), r.stride(0), how.warps)
    tiles, options = -(-n // how.rows), {"num_warps": how.warps, "num_stages": 1}
    if early:
        options["launch_pdl"] = True
    eps = 0.0 if eps is None else eps
    constants: tuple[Any, ...]
    arguments: tuple[Any, ...]
    if not how.block:
        constants = k // 2, b, how.rows, -(-k // 256), x.dtype == torch.float16, *flags, early
        arguments = x, x.stride(0) // 2, g, g.stride(0) // 2, w, other, r, r.stride(0), y, n, eps
        start_few(tiles, (kind, constants), arguments, constants, **options)
        return y
    height, sums, count = rows_shape.height(b), y, y
    if how.parts > 1:
        count = counters(x) if done is None else done
        size = height * (how.rows * len(weights) + 1)
        sums = torch.empty(tiles * how.parts * size, dtype=torch.float32, device=x.device)
    constants = height, how.rows, how.block, how.blocks, how.parts, how.stages, how.whole, *flags, early
    arguments = (
        x, x.stride(0), g, g.stride(0), w, other, r, r.stride(0), y, sums, count, b, n, k, eps,
    )  # fmt: skip
    start_many(tiles * how.parts, (kind, constants), arguments, constants, **options)
    return y


def rows_of(x: Tensor) -> Tensor:
    """[B K] with the numbers of a row side by side, rows beginning at multiples of 16 bytes; else a copy."""
    even = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) < APART
    if even and x.stride(1) == 1 and not x.is_neg():
        return x
    return x.resolve_neg().clone(memory_format=torch.contiguous_format)
