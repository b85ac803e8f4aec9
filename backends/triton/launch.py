"""Forward passes: which kernels run, on which arrays, over how many programs."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch

from linattn.backends.triton import plan
from linattn.backends.triton.launcher import repeatable, room, spoil
from linattn.backends.triton.overlap import ALONE, possible
from linattn.backends.triton.starts import Pool, Side, run, through
from linattn.problem import Problem
from linattn.state import State, tokens_seen

Tensor = torch.Tensor
NOTHING = contextlib.nullcontext()


def on(problem: Problem) -> Any:
    """Make the tensors' device the current one, if it is not: kernels start on the current device."""
    index = _index(problem.device)
    return NOTHING if index is None or torch.cuda.current_device() == index else torch.cuda.device(index)


@functools.cache
def _index(device: str) -> int | None:
    """The number of a CUDA device; None for others."""
    return int(device.partition(":")[2] or 0) if device.startswith("cuda") else None


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
    if size:
        return split_side(side, max(1, -(-plan.length_of(problem) // size)), size)
    count, size = plan.cut(problem, blocks, e, multiprocessors(problem.device))
    return side if count == 1 else split_side(side, count, size)


def shared(side: Side, blocks: plan.Blocks, e: int) -> bool:
    """Whether launches of a pass may run side by side: one alone leaves multiprocessors without work."""
    problem = side.problem
    programs = (side.units or problem.sequences) * problem.heads * -(-e // blocks.block_e)
    return programs <= multiprocessors(problem.device) and possible(problem.device)


NO_STATE = State(None, None, None)


@dataclass(frozen=True)
class Carried:
    """States at every segment's border [units H F E], and beside them z [units H F].

    fold: they are what each segment adds, and whoever reads them adds them up.
    """

    kv: Tensor
    z: Tensor | None
    fold: bool = False


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
    pool: Pool | None = None,
    fold: bool = False,
    overlap: int = ALONE,
) -> Carried:
    """States of segments, carried through each sequence; `total` sums them up instead, [S H F E].

    fold: the caller's kernels may add them up, where that costs less.
    """
    problem = side.problem
    h, f, e = problem.heads, problem.f, w.shape[3]
    summed = normalize or extra is not None
    kv = room((side.units, h, f, e), torch.float32, y.device)
    z = room((side.units, h, f, 1), torch.float32, y.device) if summed else None
    per_token = problem.decay == "token"
    logs = room((side.units, h), torch.float32, y.device) if per_token else None
    everywhere = total or final is not None
    working = side.units - (0 if everywhere else problem.sequences)
    alone = working * h <= multiprocessors(problem.device) and not problem.batch_invariant
    blocks = plan.for_states(
        operand_name(problem), y.shape[3], e, problem.reweight is not None, alone, problem.device
    )
    length = y.shape[1] if total else plan.length_of(problem)
    run(
        side, y, y, w, w, n=length, blocks=blocks, extra=extra, extra_on=0 if extra is None else 2,
        final=kv, final_z=z, rows=logs, reverse=reverse, normalize=normalize, mask=mask, output=False,
        all_parts=everywhere, slots=pool, overlap=overlap,
    )  # fmt: skip
    if fold and start is None and final is None and plan.folds(problem, side.segments):
        return Carried(kv, z, True)
    decay = None if total else logs if per_token else side.log_decay
    if total:
        sums = room((problem.sequences, h, f, e), torch.float32, y.device, zero=True)
        sums_z = room((problem.sequences, h, f, 1), torch.float32, y.device, zero=True) if summed else None
        through(side, kv, length, None, sums, None, total=True)
        if z is not None:
            through(side, z, length, None, sums_z, None, total=True)
        return Carried(sums, sums_z)
    begin, end = start or NO_STATE, final or NO_STATE
    through(side, kv, length, begin.kv, end.kv, decay, reverse=reverse, slots=pool, counts=pool is not None)
    if z is not None:
        begin_z, end_z = (None if p.z is None else p.z[..., None] for p in (begin, end))
        through(side, z, length, begin_z, end_z, decay, reverse=reverse, slots=pool)
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
    shape = (problem.sequences, problem.heads, problem.f)
    kv = room((*shape, e), torch.float32, like.device)
    return State(kv, room(shape, torch.float32, like.device) if z else None, kv)


def sums(
    side: Side,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    start: State | None,
    final: State | None,
    normalize: bool,
    pool: Pool | None = None,
    kept: Tensor | None = None,
) -> None:
    """o of a whole call into `out`, and its final state into `final`; with `pool`, both are rows of one.

    kept: denominators [B N H] are written there.
    """
    problem = side.problem
    e = v.shape[3]
    blocks = plan.blocks(
        operand_name(problem), q.shape[3], e, problem.reweight is not None, False, problem.device
    )
    if not problem.causal:
        _two_sided(side, q, k, v, out, blocks, normalize, kept)
        return
    side = planned(side, blocks, e)
    if pool is not None and normalize and not side.split:
        # slices of one head share z, which must not change before all have read it
        side = split_side(side, 1, problem.n)
    if not side.split:
        run(
            side, q, k, v, out, blocks=blocks, start=None if start is None else start.kv,
            start_z=None if start is None else start.z, final=None if final is None else final.kv,
            final_z=None if final is None else final.z, normalize=normalize, slots=pool, rows=kept,
            want_rows=kept is not None,
        )  # fmt: skip
        return
    states = carried(side, k, v, start, final, normalize=normalize, pool=pool, fold=True)
    run(
        side, q, k, v, out, blocks=blocks, start=states.kv, start_z=states.z, normalize=normalize, slots=pool,
        fold=states.fold, rows=kept, want_rows=kept is not None,
    )  # fmt: skip


def fresh(problem: Problem, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for results; zeros where kernels skip tokens that do not exist."""
    return room(shape, dtype, like.device, zero=problem.lengths or problem.packed)


def _two_sided(
    side: Side, q: Tensor, k: Tensor, v: Tensor, out: Tensor, blocks: plan.Blocks, normalize: bool,
    kept: Tensor | None,
) -> None:  # fmt: skip
    """A call that is not causal: one state for everybody without decay, a sum from either side with it."""
    problem = side.problem
    if problem.decay is None:
        keys = planned(side, blocks, v.shape[3], size=total_size(problem))
        states = carried(keys, k, v, None, None, normalize=normalize, total=True)
        queries = keys if q.shape[1] == k.shape[1] else planned_for(side, q.shape[1], keys.size)
        run(
            queries, q, k, v, out, blocks=blocks, start=states.kv, start_z=states.z, normalize=normalize,
            total=True, mask=0, rows=kept, want_rows=kept is not None,
        )  # fmt: skip
        return
    both = fresh(problem, q, (*q.shape[:3], v.shape[3]), torch.float32)
    den = kept
    if normalize and den is None:
        den = fresh(problem, q, tuple(q.shape[:3]), torch.float32)
    run(side, q, k, v, both, blocks=blocks, normalize=normalize, sums=1, rows=den)
    run(side, q, k, v, both, blocks=blocks, normalize=normalize, sums=2, rows=den, reverse=True, strict=True)
    spoil()
    if den is not None:
        both /= torch.where(den <= problem.eps, problem.eps, den)[..., None]
    out.copy_(both)


def total_size(problem: Problem) -> int:
    """Tokens of a segment whose sums are only added up: enough of them to fill the GPU."""
    if problem.batch_invariant:
        return 1024
    room = max(
        1, plan.FULL * multiprocessors(problem.device) // max(1, 4 * problem.sequences * problem.heads)
    )
    length = max(1, plan.length_of(problem))
    return max(256, -(-length // (room * 128)) * 128)


def planned_for(side: Side, length: int, size: int) -> Side:
    """Segments for one side of a cross call, whose lengths differ."""
    return split_side(side, max(1, -(-length // size)), size)


def forward(problem: Problem, x: Any) -> tuple[Tensor, State | None]:
    """The whole call of a backend: o [B, N, H, E] in q's dtype, and the final state if it is asked for."""
    return _whole(problem, x, False)[:2]


def forward_keeping(problem: Problem, x: Any) -> tuple[Tensor, State | None, Tensor]:
    """The same of a normalized call, and its denominators [B, N, H] as they are before the clamp."""
    o, state, kept = _whole(problem, x, True)
    assert kept is not None
    return o, state, kept


def _whole(problem: Problem, x: Any, keep: bool) -> tuple[Tensor, State | None, Tensor | None]:
    state = x.state
    parts = (None, None) if state is None else (state.kv, state.z)
    borders = x.cu_seqlens if problem.packed else x.lengths
    inputs = (x.q, x.k, x.v, x.log_decay, x.theta, x.key_mask, borders, *parts)
    name = "forward, keeping" if keep else "forward"
    o, kv, z, kept = repeatable(name, problem, inputs, functools.partial(_forward, problem, x, keep))
    assert o is not None
    if kv is None:
        return o, None, kept
    seen = tokens_seen(x.q, x.lengths, x.cu_seqlens, None if state is None else state.length)
    final = State(kv, z, seen, problem.feature_map, problem.reweight, problem.d)
    return o, final, kept


def forward_in_pool(problem: Problem, x: Any, slots: Tensor) -> Tensor:
    """o of a call whose states are rows of a pool, which change in place, and their lengths with them."""
    state = x.state
    borders = x.cu_seqlens if problem.packed else x.lengths
    inputs = (
        x.q, x.k, x.v, x.log_decay, x.theta, x.key_mask, borders, state.kv, state.z, state.length, slots
    )  # fmt: skip
    (o,) = repeatable("pool", problem, inputs, functools.partial(_in_pool, problem, x, slots.contiguous()))
    assert o is not None
    return o


def _in_pool(problem: Problem, x: Any, slots: Tensor) -> tuple[Tensor]:
    o = room((problem.batch, problem.n, problem.heads, problem.e), x.q.dtype, x.q.device, zero=True)
    if problem.n:
        pool = Pool(slots, x.state.length)
        sums(side_of(problem, x), x.q, x.k, x.v, o, x.state, x.state, problem.normalize, pool)
    return (o,)


def _forward(problem: Problem, x: Any, keep: bool) -> tuple[Tensor | None, ...]:
    o = fresh(problem, x.q, (problem.batch, problem.n, problem.heads, problem.e), x.q.dtype)
    kept = fresh(problem, x.q, (problem.batch, problem.n, problem.heads), torch.float32) if keep else None
    start, final = dense(x.state), None
    if problem.return_state:
        final = empty_state(problem, x.q, problem.e, problem.normalize)
    if problem.n or problem.return_state:
        sums(side_of(problem, x), x.q, x.k, x.v, o, start, final, problem.normalize, kept=kept)
    return (o, None, None, kept) if final is None else (o, final.kv, final.z, kept)
