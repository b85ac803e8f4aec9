"""Starting the kernels: what surrounds a call, and how `product` and `scan` are told of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from linattn.backends.triton import plan
from linattn.backends.triton import product as kernels
from linattn.backends.triton import segments as between
from linattn.backends.triton.launcher import Launcher, one
from linattn.backends.triton.overlap import ALONE, BEHIND, BESIDE
from linattn.problem import Problem

Tensor = torch.Tensor
ANGLES = {None: 0, "cosine": 1, "lrpe": 2}
DECAY = {None: 0, "head": 1, "token": 2}


@dataclass(frozen=True)
class Side:
    """What surrounds q, k and v in a call: tables, masks, borders."""

    problem: Problem
    log_decay: Tensor | None
    theta: Tensor | None
    key_mask: Tensor | None
    borders: Tensor | None  # lengths or cu_seqlens
    units: int = 0  # programs over sequences and segments; 0: one for each sequence
    segments: int = 1
    size: int = 1  # tokens in a segment

    @property
    def split(self) -> bool:
        return self.units > 0


@dataclass(frozen=True)
class Pool:
    """Rows of a pool of states, and the tokens that each row of the pool has seen."""

    rows: Tensor  # [S]
    lengths: Tensor  # [pool]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int]:
        return self.rows, self.lengths, self.lengths.shape[0]


product = Launcher(kernels.product)
scan = Launcher(between.scan)


def do_dtype(*parts: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of operands, which may be wider than q's in a backward pass."""
    return tuple(x.dtype for x in parts)


OPERANDS = {"bfloat16": tl.bfloat16, "float16": tl.float32, "float32": tl.float32}


def precision(problem: Problem) -> str:
    """Of products of float32 operands: float16 values are exact in tf32, and so are sums of any size."""
    narrow = problem.dtype == "float16" and problem.device != "cpu"  # an interpreter has no narrow products
    return "tf32" if narrow or problem.precision == "tf32" else "ieee"


def run(
    side: Side,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    blocks: plan.Blocks,
    raw: Tensor | None = None,
    extra: Tensor | None = None,
    extra_on: int = 0,
    start: Tensor | None = None,
    start_z: Tensor | None = None,
    final: Tensor | None = None,
    final_z: Tensor | None = None,
    rows: Tensor | None = None,
    turn: Tensor | None = None,
    centre: float = 0.0,
    reverse: bool = False,
    strict: bool = False,
    gradient: bool = False,
    normalize: bool = False,
    mask: int = 1,
    total: bool = False,
    output: bool = True,
    sums: int = 0,
    want_rows: bool = False,
    n: int | None = None,
    scale: float | None = None,
    all_parts: bool = True,
    slots: Pool | None = None,
    fold: bool = False,
    overlap: int = ALONE,
) -> None:
    """Launch `product` once; shapes as it says, `sums` is its RAW, `overlap` as in overlap.py."""
    problem = side.problem
    blocks = plan.fitting(
        blocks, normalize or extra_on > 0, out.dtype == torch.float32 and problem.dtype != "float32"
    )
    d, e = y.shape[3] if not total else x.shape[3], out.shape[3] if output else w.shape[3]
    n, m = x.shape[1] if n is None else n, y.shape[1]
    decay, mask_ptr = side.log_decay, side.key_mask
    if decay is None or total:
        g, kind = x, 0
        g_strides: tuple[int, ...] = (0, 0, 0)
    elif decay.ndim == 1:
        g, g_strides, kind = decay, (0, 0, decay.stride(0)), 1
    else:
        g, g_strides, kind = decay, decay.stride(), 2
    if mask_ptr is None or not mask:
        mask_ptr, mask = x, 0
        mask_strides: tuple[int, ...] = (0, 0)
    else:
        mask_strides = mask_ptr.stride()
    raw = x if raw is None else raw
    angles = ANGLES[problem.reweight]
    borders = 2 if problem.packed else int(problem.lengths)
    slices = -(-e // blocks.block_e)
    units = side.units or problem.sequences
    if units == 0 or slices == 0:
        return
    out_strides = out.stride()
    strides = x.stride(), y.stride(), w.stride(), raw.stride(), out_strides, g_strides, mask_strides
    states = angles != 2 or start is not None or final is not None  # compiled away where that pays
    theta, marks, none = side.theta, side.borders, one(torch.float32, x.device)  # none: of the right type
    constants = (
        d, e, blocks.c, plan.padded(d), blocks.block_e, OPERANDS[problem.dtype], precision(problem),
        problem.feature_map or "none", angles, kind, reverse, strict, gradient, normalize, extra_on, mask,
        borders, side.split, total, output, sums, want_rows, turn is not None, slots is not None,
        fold, blocks.stages, blocks.across, states, overlap,
    )  # fmt: skip
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    if overlap in (BESIDE, BEHIND):
        options["launch_pdl"] = True
    product(
        units * problem.heads * slices,
        (x.dtype, do_dtype(y, w), out.dtype, g.dtype, None if marks is None else marks.dtype,
         None if theta is None else theta.dtype, None if slots is None else slots.rows.dtype, x.device,
         strides, constants, blocks.warps),
        (
            x, *strides[0], y, *strides[1], w, *strides[2], raw, *strides[3], out, *out_strides,
            g, *g_strides, x if theta is None else theta, problem.angle, mask_ptr, *mask_strides,
            x if extra is None else extra, 0 if extra is None else extra.shape[2],
            none if start is None else start, none if start_z is None else start_z,
            int(start is not None and not fold),
            none if final is None else final, none if final_z is None else final_z, int(final is not None),
            *((x, x, 0) if slots is None else slots.arguments), x if rows is None else rows,
            x if turn is None else turn, x if marks is None else marks,
            problem.batch, problem.sequences, n, m, problem.heads, side.segments, side.size, int(all_parts),
            float(centre), float(problem.scale if scale is None else scale), problem.eps,
        ),
        constants, **options,
    )  # fmt: skip


def through(
    side: Side,
    parts: Tensor,
    length: int,
    start: Tensor | None,
    final: Tensor | None,
    log_decay: Tensor | None,
    *,
    reverse: bool = False,
    total: bool = False,
    slots: Pool | None = None,
    counts: bool = False,
) -> None:
    """Carry states [units H F E] through the segments of every sequence, in place."""
    problem = side.problem
    angles = ANGLES[problem.reweight]
    f, e = parts.shape[2], parts.shape[3]
    d = f // 2 if angles else f
    kind = 0 if log_decay is None else DECAY[problem.decay]
    block = min(1024, triton.next_power_of_2(d * e))
    grid = triton.cdiv(d * e, block) * problem.heads * problem.sequences
    if grid == 0:
        return
    borders = 2 if problem.packed else int(problem.lengths)
    g = parts if log_decay is None else log_decay
    constants = (block, angles, kind, reverse, borders, total, slots is not None, counts)
    scan(
        grid,
        (g.dtype, side.borders is not None and side.borders.dtype, slots is not None and slots.rows.dtype,
         parts.device, constants),
        (
            parts, parts if start is None else start, int(start is not None),
            parts if final is None else final, int(final is not None), g, 0 if kind != 1 else g.stride(0),
            parts if side.theta is None else side.theta, problem.angle,
            *((parts, parts, 0) if slots is None else slots.arguments),
            parts if side.borders is None else side.borders,
            problem.sequences, length, problem.heads, d, e, side.segments, side.size,
        ),
        constants, num_warps=4, num_stages=2,
    )  # fmt: skip
