"""Forward passes: which kernels run, on which arrays, over how many programs."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from linattn.backends.triton import plan
from linattn.backends.triton import product as kernels
from linattn.backends.triton import segments as between
from linattn.backends.triton.launcher import Launcher
from linattn.problem import Problem
from linattn.state import State

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


NOTHING = contextlib.nullcontext()


def on(problem: Problem) -> Any:
    """Make the tensors' device the current one, if it is not: kernels start on the current device."""
    if not problem.device.startswith("cuda"):
        return NOTHING
    index = int(problem.device.partition(":")[2] or 0)
    return NOTHING if torch.cuda.current_device() == index else torch.cuda.device(index)


def side_of(problem: Problem, x: Any) -> Side:
    """The surroundings of a call, from the arrays of a backend's call."""
    borders = x.cu_seqlens if problem.packed else x.lengths
    theta = None if x.theta is None else x.theta.contiguous()  # tables are small
    return Side(problem, x.log_decay, theta, x.key_mask, None if borders is None else borders.contiguous())


@functools.lru_cache(maxsize=64)
def multiprocessors(device: str) -> int:
    """How many of them a device has; an interpreted kernel gets a number that makes it split sequences."""
    if not device.startswith("cuda"):
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_side(side: Side, count: int, size: int) -> Side:
    """The same surroundings with every sequence cut into segments of `size` tokens."""
    problem = side.problem
    units = problem.n // size + problem.sequences if problem.packed else problem.sequences * count
    return Side(problem, side.log_decay, side.theta, side.key_mask, side.borders, units, count, size)


def planned(side: Side, blocks: plan.Blocks, e: int, size: int = 0) -> Side:
    """Cut sequences into segments where programs are few; `size` asks for segments of that length."""
    problem = side.problem
    length = plan.length_of(problem)
    if size:
        return split_side(side, max(1, -(-length // size)), size)
    if problem.batch_invariant:
        return side
    programs = problem.sequences * problem.heads * -(-e // blocks.block_e)
    count, size = plan.segments(programs * blocks.warps, length, multiprocessors(problem.device))
    return side if count == 1 else split_side(side, count, size)


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
) -> None:
    """Launch `product` once; shapes as it says, `sums` is its RAW."""
    problem = side.problem
    d, e = y.shape[3] if not total else x.shape[3], out.shape[3] if output else w.shape[3]
    n, m = x.shape[1] if n is None else n, y.shape[1]
    decay, mask_ptr = side.log_decay, side.key_mask
    if decay is None or total:
        g, g_strides, kind = x, (0, 0, 0), 0
    elif decay.ndim == 1:
        g, g_strides, kind = decay, (0, 0, decay.stride(0)), 1
    else:
        g, g_strides, kind = decay, decay.stride(), 2
    if mask_ptr is None or not mask:
        mask_ptr, mask_strides, mask = x, (0, 0), 0
    else:
        mask_strides = mask_ptr.stride()
    raw = x if raw is None else raw
    angles = ANGLES[problem.reweight]
    angle = math.pi / (2 * problem.max_len) if angles == 1 and problem.max_len else 0.0
    borders = 2 if problem.packed else int(problem.lengths)
    slices = -(-e // blocks.block_e)
    units = side.units or problem.sequences
    if units == 0 or slices == 0:
        return
    out_strides = out.stride()
    strides = x.stride(), y.stride(), w.stride(), raw.stride(), out_strides, g_strides, mask_strides
    theta, marks = side.theta, side.borders
    constants = (
        d, e, blocks.c, plan.padded(d), blocks.block_e, OPERANDS[problem.dtype], precision(problem),
        problem.feature_map or "none", angles, kind, reverse, strict, gradient, normalize, extra_on, mask,
        borders, side.split, total, output, sums, want_rows, turn is not None, blocks.stages,
    )  # fmt: skip
    product(
        units * problem.heads * slices,
        (x.dtype, do_dtype(y, w), out.dtype, g.dtype, None if marks is None else marks.dtype,
         None if theta is None else theta.dtype, x.device, strides, constants, blocks.warps),
        (
            x, *strides[0], y, *strides[1], w, *strides[2], raw, *strides[3], out, *out_strides,
            g, *g_strides, x if theta is None else theta, angle, mask_ptr, *mask_strides,
            x if extra is None else extra, 0 if extra is None else extra.shape[1],
            x if start is None else start, x if start_z is None else start_z, int(start is not None),
            x if final is None else final, x if final_z is None else final_z, int(final is not None),
            x if rows is None else rows, x if turn is None else turn, x if marks is None else marks,
            problem.batch, problem.sequences, n, m, problem.heads, side.segments, side.size, int(all_parts),
            float(centre), float(problem.scale if scale is None else scale), problem.eps,
        ),
        constants,
        num_warps=blocks.warps, num_stages=blocks.stages,
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
) -> None:
    """Carry states [units H F E] through the segments of every sequence, in place."""
    problem = side.problem
    angles = ANGLES[problem.reweight]
    angle = math.pi / (2 * problem.max_len) if angles == 1 and problem.max_len else 0.0
    f, e = parts.shape[2], parts.shape[3]
    d = f // 2 if angles else f
    kind = 0 if log_decay is None else DECAY[problem.decay]
    block = min(1024, triton.next_power_of_2(d * e))
    grid = triton.cdiv(d * e, block) * problem.heads * problem.sequences
    if grid == 0:
        return
    borders = 2 if problem.packed else int(problem.lengths)
    g = parts if log_decay is None else log_decay
    constants = (block, angles, kind, reverse, borders, total)
    scan(
        grid, (g.dtype, side.borders is not None and side.borders.dtype, parts.device, constants),
        (
            parts, parts if start is None else start, int(start is not None),
            parts if final is None else final, int(final is not None), g, 0 if kind != 1 else g.stride(0),
            parts if side.theta is None else side.theta, angle,
            parts if side.borders is None else side.borders,
            problem.sequences, length, problem.heads, d, e, side.segments, side.size,
        ),
        constants, num_warps=4, num_stages=2,
    )  # fmt: skip


NO_STATE = State(None, None, None)


@dataclass(frozen=True)
class Carried:
    """States at every segment's border [units H F E], and beside them z [units H F]."""

    kv: Tensor
    z: Tensor | None


def carried(
    side: Side,
    y: Tensor,
    w: Tensor,
    start: State | None,
    final: State | None,
    *,
    extra: Tensor | None = None,
    normalize: bool = False,
    reverse: bool = False,
    mask: int = 1,
    total: bool = False,
) -> Carried:
    """States of segments, carried through each sequence; `total` sums them up instead, [S H F E]."""
    problem = side.problem
    h, f, e = problem.heads, problem.f, w.shape[3]
    summed = normalize or extra is not None
    kv = torch.empty(side.units, h, f, e, dtype=torch.float32, device=y.device)
    z = torch.empty(side.units, h, f, 1, dtype=torch.float32, device=y.device) if summed else None
    per_token = problem.decay == "token"
    logs = torch.empty(side.units, h, dtype=torch.float32, device=y.device) if per_token else None
    blocks = plan.blocks(operand_name(problem), y.shape[3], e, problem.reweight is not None, False)
    length = y.shape[1] if total else plan.length_of(problem)
    run(
        side, y, y, w, w, n=length, blocks=blocks, extra=extra, extra_on=0 if extra is None else 2,
        final=kv, final_z=z, rows=logs, reverse=reverse, normalize=normalize, mask=mask, output=False,
        all_parts=total or final is not None,
    )  # fmt: skip
    decay = None if total else logs if per_token else side.log_decay
    if total:
        sums = torch.zeros(problem.sequences, h, f, e, dtype=torch.float32, device=y.device)
        sums_z = (
            torch.zeros(problem.sequences, h, f, 1, dtype=torch.float32, device=y.device) if summed else None
        )
        through(side, kv, length, None, sums, None, total=True)
        if z is not None:
            through(side, z, length, None, sums_z, None, total=True)
        return Carried(sums, sums_z)
    begin, end = start or NO_STATE, final or NO_STATE
    through(side, kv, length, begin.kv, end.kv, decay, reverse=reverse)
    if z is not None:
        begin_z, end_z = (None if p.z is None else p.z[..., None] for p in (begin, end))
        through(side, z, length, begin_z, end_z, decay, reverse=reverse)
    return Carried(kv, z)


def operand_name(problem: Problem) -> str:
    """What blocks are planned for: bfloat16 products, or those of float32."""
    return "bfloat16" if problem.dtype == "bfloat16" else "float32"


def dense(state: State | None) -> State | None:
    """A state whose arrays lie without gaps, as the kernels take them."""
    if state is None:
        return None
    z = None if state.z is None else state.z.contiguous()
    return State(state.kv.contiguous(), z, state.length, state.feature_map, state.reweight, state.d)


def empty_state(problem: Problem, like: Tensor, e: int, z: bool) -> State:
    """Room for one state a sequence; lengths are not in it."""
    kv = torch.empty(problem.sequences, problem.heads, problem.f, e, dtype=torch.float32, device=like.device)
    return State(kv, torch.empty(kv.shape[:3], dtype=torch.float32, device=like.device) if z else None, kv)


def sums(
    side: Side,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    start: State | None,
    final: State | None,
    normalize: bool,
) -> None:
    """o of a whole call into `out`, and its final state into `final`."""
    problem = side.problem
    e = v.shape[3]
    blocks = plan.blocks(operand_name(problem), q.shape[3], e, problem.reweight is not None, False)
    if not problem.causal:
        _two_sided(side, q, k, v, out, blocks, normalize)
        return
    side = planned(side, blocks, e)
    if not side.split:
        run(
            side, q, k, v, out, blocks=blocks, start=None if start is None else start.kv,
            start_z=None if start is None else start.z, final=None if final is None else final.kv,
            final_z=None if final is None else final.z, normalize=normalize,
        )  # fmt: skip
        return
    states = carried(side, k, v, start, final, normalize=normalize)
    run(side, q, k, v, out, blocks=blocks, start=states.kv, start_z=states.z, normalize=normalize)


def fresh(problem: Problem, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for results; zeros where kernels skip tokens that do not exist."""
    make = torch.zeros if problem.lengths or problem.packed else torch.empty
    return make(shape, dtype=dtype, device=like.device)


def _two_sided(
    side: Side, q: Tensor, k: Tensor, v: Tensor, out: Tensor, blocks: plan.Blocks, normalize: bool
) -> None:
    """A call that is not causal: one state for everybody without decay, a sum from either side with it."""
    problem = side.problem
    if problem.decay is None:
        keys = planned(side, blocks, v.shape[3], size=total_size(problem))
        states = carried(keys, k, v, None, None, normalize=normalize, total=True)
        queries = keys if q.shape[1] == k.shape[1] else planned_for(side, q.shape[1], keys.size)
        run(
            queries, q, k, v, out, blocks=blocks, start=states.kv, start_z=states.z, normalize=normalize,
            total=True, mask=0,
        )  # fmt: skip
        return
    both = fresh(problem, q, (*q.shape[:3], v.shape[3]), torch.float32)
    den = fresh(problem, q, tuple(q.shape[:3]), torch.float32) if normalize else None
    run(side, q, k, v, both, blocks=blocks, normalize=normalize, sums=1, rows=den)
    run(side, q, k, v, both, blocks=blocks, normalize=normalize, sums=2, rows=den, reverse=True, strict=True)
    if den is not None:
        both /= torch.where(den <= problem.eps, problem.eps, den)[..., None]
    out.copy_(both)


def total_size(problem: Problem) -> int:
    """Tokens of a segment whose sums are only added up: enough of them to fill the GPU."""
    room = max(
        1, plan.FULL * multiprocessors(problem.device) // max(1, 4 * problem.sequences * problem.heads)
    )
    length = max(1, plan.length_of(problem))
    return max(256, triton.cdiv(triton.cdiv(length, room), 128) * 128)


def planned_for(side: Side, length: int, size: int) -> Side:
    """Segments for one side of a cross call, whose lengths differ."""
    return split_side(side, max(1, -(-length // size)), size)


def forward(problem: Problem, x: Any) -> tuple[Tensor, State | None]:
    """The whole call of a backend: o [B, N, H, E] in q's dtype, and the final state if it is asked for."""
    o = fresh(problem, x.q, (problem.batch, problem.n, problem.heads, problem.e), x.q.dtype)
    start, final = dense(x.state), None
    if problem.return_state:
        final = empty_state(problem, x.q, problem.e, problem.normalize)
    if problem.n or problem.return_state:
        sums(side_of(problem, x), x.q, x.k, x.v, o, start, final, problem.normalize)
    if final is None:
        return o, None
    length = _lengths(problem, x)
    return o, State(final.kv, final.z, length, problem.feature_map, problem.reweight, problem.d)


def _lengths(problem: Problem, x: Any) -> Tensor:
    """Tokens that each sequence has seen: [S] int64."""
    if x.cu_seqlens is not None:
        tokens = x.cu_seqlens[1:].to(torch.int64) - x.cu_seqlens[:-1]
    elif x.lengths is not None:
        tokens = x.lengths.to(torch.int64, copy=True)
    elif x.state is not None:
        return x.state.length + problem.n
    else:
        return torch.full((problem.batch,), problem.n, dtype=torch.int64, device=x.q.device)
    return tokens if x.state is None else tokens + x.state.length
