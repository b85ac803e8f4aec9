"""Backward passes: the same product three times, from do. States are formed again, never stored.

    dq = A(do, v, phi(k))    dk = R(v, do, phi(q))    dv = R(phi(k), phi(q), do)      (R: time reversed)

What it needs beside its inputs and results: states at the borders of segments (where a sequence is cut into
any), do / denominator in do's dtype with normalize, and some numbers for each token and head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton

from linattn.backends import Gradients, Saved
from linattn.backends.triton import plan
from linattn.backends.triton import segments as between
from linattn.backends.triton.launch import (
    Carried,
    carried,
    dense,
    empty_state,
    fresh,
    operand_name,
    planned,
    planned_for,
    shared,
    side_of,
    sums,
    total_size,
)
from linattn.backends.triton.launcher import Launcher, one, repeatable, room, spoil
from linattn.backends.triton.overlap import ALONE, BEHIND, BESIDE, FIRST
from linattn.backends.triton.starts import Side, run
from linattn.problem import Problem
from linattn.state import State

Tensor = torch.Tensor
denominator_gradient = Launcher(between.denominator_gradient)
suffix_sums = Launcher(between.suffix_sums)
crossing = Launcher(between.crossing)

ANGLE_SEGMENT = 128
"""Tokens of a segment where the gradient of angles is asked for: it weighs tokens by their distance from the
middle of one, and those weights cancel.
"""


@dataclass(frozen=True)
class Late:
    """scale * do [B N H E], and beside it that of the denominator's gradient [B H N]."""

    do: Tensor
    extra: Tensor | None


@dataclass
class Results:
    """Gradients as they are formed; in float32 where two directions are added up."""

    q: Tensor
    k: Tensor
    v: Tensor
    plus: list[Tensor]  # [slices B N H]: what a token's query takes from the state
    minus: list[Tensor]  # and what its key puts into it
    theta: list[Tensor]  # [.. H D]
    start: State | None = None
    end: Tensor | None = None  # [S H]: what the final state adds to the gradient of decays


def backward(problem: Problem, x: Saved, do: Tensor, dstate: State | None) -> Gradients:
    """Gradients of every input, from those of o [B, N, H, E] and of the returned state."""
    if x.kept is not None and not x.kept.is_contiguous():  # a hook gave back another layout
        x = replace(x, kept=x.kept.contiguous())
    state = x.state
    parts = (None, None) if state is None else (state.kv, state.z)
    ends = (None, None) if dstate is None else (dstate.kv, dstate.z)
    borders = x.cu_seqlens if problem.packed else x.lengths
    tables = (x.log_decay, x.theta, x.key_mask, borders)
    inputs = (x.q, x.k, x.v, *tables, *parts, x.o, x.kept, do, *ends)
    strides = tuple(None if part is None else part.stride() for part in (do, x.o, *ends))
    name = ("backward", strides, do.dtype, x.want_log_decay, x.want_theta)
    return Gradients(*repeatable(name, problem, inputs, partial(_backward, problem, x, do, dstate)))


def _backward(problem: Problem, x: Saved, do: Tensor, dstate: State | None) -> tuple[Tensor | None, ...]:
    side = side_of(problem, x)
    start, dstate = dense(x.state), dense(dstate)
    two = not problem.causal and problem.decay is not None
    dtype = torch.float32 if two else x.q.dtype
    dq, dk, dv = (fresh(problem, t, tuple(t.shape), dtype) for t in (x.q, x.k, x.v))
    out = Results(dq, dk, dv, [], [], [])
    extra = None
    if problem.normalize:
        do, extra = _through_denominator(side, x, start, do)
    late = Late(do, extra)
    if problem.scale != 1.0:
        spoil()  # the gradient of a state is not scaled: what is added to it is
        wide = do.float() if problem.dtype == "float16" else do  # float16 would round, and may overflow
        late = Late(wide * problem.scale, None if extra is None else extra * problem.scale)
    if not problem.causal and problem.decay is None:
        _from_totals(side, x, do, extra, late, out)
    else:
        _one_way(side, x, do, extra, late, start, dstate, out, sums_=1 if two else 0)
        if two:
            _one_way(side, x, do, extra, late, None, None, out, sums_=2, flip=True)
    decay = theta = None
    if problem.decay is not None and x.want_log_decay:
        decay = _log_decay(side, out, x.q)
    if problem.reweight == "lrpe" and x.want_theta:
        spoil()
        theta = torch.zeros(problem.heads, problem.d, dtype=torch.float32, device=x.q.device)
        for part in out.theta:
            theta += part.sum(0)
    kept = out.start if problem.initial_state else None
    dtype = x.q.dtype
    if two:
        spoil()
    return (
        out.q.to(dtype), out.k.to(dtype), out.v.to(dtype), decay, theta,
        None if kept is None else kept.kv, None if kept is None else kept.z,
    )  # fmt: skip


def _through_denominator(side: Side, x: Saved, start: State | None, do: Tensor) -> tuple[Tensor, Tensor]:
    """do / den [B N H E] and the denominator's gradient [B H N], float32."""
    problem = side.problem
    b, n, h, e = do.shape
    den = _denominators(side, x, start, do) if x.kept is None else x.kept
    narrow = problem.dtype == "bfloat16"
    num = room((b, n, h, e), do.dtype if narrow else torch.float32, do.device)
    extra = room((b, h, n), torch.float32, do.device)
    rows = b * n * h
    assert x.o is not None
    if rows:
        block = max(1, 2048 // plan.padded(e))
        denominator_gradient(
            triton.cdiv(rows, block), (do.dtype, x.o.dtype, do.device, x.o.stride(), do.stride(), e),
            (den, x.o, *x.o.stride(), do, *do.stride(), num, extra, rows, n, h, e, problem.eps),
            (block, plan.padded(e)), num_warps=4, num_stages=2,
        )  # fmt: skip
    return num, extra


def _denominators(side: Side, x: Saved, start: State | None, do: Tensor) -> Tensor:
    """Row sums of weights [B N H 1], not clamped: the same sum with ones for values."""
    problem = side.problem
    b, n, h, _ = do.shape
    den = fresh(problem, do, (b, n, h, 1), torch.float32)
    ones = one(x.v.dtype, do.device).expand(b, problem.m, h, 1)
    begin = None if start is None or start.z is None else replace(start, kv=start.z[..., None], z=None)
    plain = replace(side, problem=replace(problem, e=1))
    if n:
        sums(plain, x.q, x.k, ones, den, begin, None, False)
    return den


def _rows(problem: Problem, like: Tensor, blocks: plan.Blocks) -> Tensor:
    slices = -(-problem.d // blocks.block_e)
    return room((slices, *like.shape[:3]), torch.float32, like.device, zero=True)


def _one_way(
    side: Side,
    x: Saved,
    do: Tensor,
    extra: Tensor | None,
    late: Late,
    start: State | None,
    dstate: State | None,
    out: Results,
    *,
    sums_: int,
    flip: bool = False,
) -> None:
    """Gradients of the pairs with j <= i; with `flip` of those with j > i, time reversed."""
    problem = side.problem
    two = problem.reweight is not None
    name = operand_name(problem)
    grad_blocks = plan.blocks(name, problem.e, problem.d, two, True, problem.device)
    value_blocks = plan.blocks(name, problem.d, problem.e, two, False, problem.device)
    want_theta = problem.reweight == "lrpe" and x.want_theta
    want_decay = problem.decay is not None and x.want_log_decay
    side = planned(side, grad_blocks, problem.d, ANGLE_SEGMENT if want_theta else 0)
    final = dstart = None
    need_end = dstate is not None and (want_theta or want_decay)
    if need_end:
        final = empty_state(problem, do, problem.e, problem.normalize)
    if problem.initial_state:
        dstart = empty_state(problem, do, problem.e, problem.normalize)
    forth = back = None
    first, beside, behind = (FIRST, BESIDE, BEHIND) if shared(side, grad_blocks, problem.d) else (ALONE,) * 3
    if side.split:
        fold = not want_theta  # whose gradient needs the states themselves
        forth = carried(
            side, x.k, x.v, start, final, normalize=problem.normalize, reverse=flip, fold=fold, overlap=first
        )
        back = carried(
            side, x.q, late.do, dstate, dstart, extra=late.extra, reverse=not flip, mask=0, fold=fold,
            overlap=beside,
        )  # fmt: skip
        first = behind
    rows_q = rows_k = turn_q = turn_k = None
    if want_decay:
        rows_q, rows_k = (_rows(problem, t, grad_blocks) for t in (x.q, x.k))
    if want_theta:
        units = side.units
        turn_q, turn_k = (
            torch.zeros(units, problem.heads, problem.d, dtype=torch.float32, device=do.device)
            for _ in range(2)
        )
    centre = 0.5 * side.size
    back_to, strict = not flip, flip
    from_keys, to_keys = _ends(side, forth, start, final), _ends(side, back, dstate, dstart)
    run(
        side, do, x.v, x.k, out.q, raw=x.q, blocks=grad_blocks, extra=extra,
        extra_on=int(extra is not None), **from_keys, reverse=flip, strict=strict, gradient=True,
        sums=sums_, rows=rows_q, want_rows=want_decay, turn=turn_q, centre=centre, overlap=first,
    )  # fmt: skip
    run(
        side, x.v, late.do, x.q, out.k, raw=x.k, blocks=grad_blocks, extra=late.extra, scale=1.0,
        extra_on=0 if extra is None else 2, **to_keys, reverse=back_to, strict=strict, gradient=True, mask=2,
        sums=sums_, rows=rows_k, want_rows=want_decay, turn=turn_k, centre=centre, overlap=beside,
    )  # fmt: skip
    to_keys |= {"final": None, "final_z": None}  # who wrote it once need not write it again
    run(
        side, x.k, x.q, late.do, out.v, blocks=value_blocks, scale=1.0, **to_keys, reverse=back_to,
        strict=strict, mask=2, sums=sums_, overlap=beside,
    )  # fmt: skip
    out.start = dstart
    if rows_q is not None and rows_k is not None:
        out.plus += [rows_k if flip else rows_q]
        out.minus += [rows_q if flip else rows_k]
        if need_end and dstate is not None and final is not None:
            spoil()
            end = (final.kv * dstate.kv).sum((-1, -2))
            if final.z is not None and dstate.z is not None:
                end = end + (final.z * dstate.z).sum(-1)
            out.end = end
    if turn_q is not None and turn_k is not None and forth is not None and back is not None:
        out.theta += [turn_q, turn_k]
        early, after = (back, forth) if flip else (forth, back)
        out.theta.append(_crossing(side, early.kv, after.kv, start, dstart, final, dstate, False))
        if early.z is not None and after.z is not None:
            out.theta.append(_crossing(side, early.z, after.z, start, dstart, final, dstate, True))


def _ends(side: Side, states: Carried | None, start: State | None, final: State | None) -> dict[str, Any]:
    """Where a product's state begins and ends: at borders of segments, or at those of the sequence."""
    if states is not None:
        return {
            "start": states.kv, "start_z": states.z, "final": None, "final_z": None, "fold": states.fold
        }  # fmt: skip
    return {
        "start": None if start is None else start.kv,
        "start_z": None if start is None else start.z,
        "final": None if final is None else final.kv,
        "final_z": None if final is None else final.z,
    }


def _from_totals(side: Side, x: Saved, do: Tensor, extra: Tensor | None, late: Late, out: Results) -> None:
    """Gradients of a call that is not causal and has no decay: everybody reads one state."""
    problem = side.problem
    name, two = operand_name(problem), problem.reweight is not None
    grad_blocks = plan.blocks(name, problem.e, problem.d, two, True, problem.device)
    value_blocks = plan.blocks(name, problem.d, problem.e, two, False, problem.device)
    size = total_size(problem)
    queries, keys = planned_for(side, problem.n, size), planned_for(side, problem.m, size)
    forth = carried(keys, x.k, x.v, None, None, normalize=problem.normalize, total=True)
    back = carried(queries, x.q, late.do, None, None, extra=late.extra, mask=0, total=True)
    turn_q = turn_k = None
    if problem.reweight == "lrpe" and x.want_theta:
        turn_q, turn_k = (
            torch.zeros(s.units, problem.heads, problem.d, dtype=torch.float32, device=do.device)
            for s in (queries, keys)
        )
        out.theta += [turn_q, turn_k]
    centre = 0.5 * plan.length_of(problem)
    run(
        queries, do, x.v, x.k, out.q, raw=x.q, blocks=grad_blocks, extra=extra,
        extra_on=int(extra is not None), start=forth.kv, start_z=forth.z, gradient=True, mask=0, total=True,
        turn=turn_q, centre=centre,
    )  # fmt: skip
    run(
        keys, x.v, late.do, x.q, out.k, raw=x.k, blocks=grad_blocks, extra=late.extra, scale=1.0,
        extra_on=0 if extra is None else 2, start=back.kv, start_z=back.z, gradient=True, mask=2,
        total=True, turn=turn_k, centre=centre,
    )  # fmt: skip
    run(keys, x.k, x.q, late.do, out.v, blocks=value_blocks, scale=1.0, start=back.kv, mask=2, total=True)


def _log_decay(side: Side, out: Results, q: Tensor) -> Tensor:
    """The gradient of log decay [B N H], or its sum over tokens [H]."""
    problem, decay = side.problem, side.log_decay
    assert decay is not None
    b, n, h = problem.batch, max(problem.n, problem.m), problem.heads
    per_token = room((b, n, h), torch.float32, q.device, zero=True)
    plus, minus = _stacked(out.plus, n), _stacked(out.minus, n)
    strides = (0, 0, decay.stride(0)) if decay.ndim == 1 else decay.stride()
    end = out.end
    if n and problem.sequences:
        borders = 2 if problem.packed else int(problem.lengths)
        constants = (plus.shape[0], minus.shape[0], 256, 1 if decay.ndim == 1 else 2, borders)
        marks = plus if side.borders is None else side.borders
        arguments = (
            plus, minus, plus if end is None else end, int(end is not None), decay, *strides, per_token,
            marks, b, problem.sequences, n, h,
        )  # fmt: skip
        key = (decay.dtype, marks.dtype, q.device, strides, constants)
        suffix_sums(problem.sequences * h, key, arguments, constants, num_warps=4, num_stages=2)
    if decay.ndim == 1:
        spoil()
        return per_token.sum((0, 1))
    return per_token


def _stacked(parts: list[Tensor], n: int) -> Tensor:
    """Sums of several passes one after the other, over one number of tokens."""
    if len(parts) == 1:
        return parts[0]
    whole = [torch.nn.functional.pad(p, (0, 0, 0, n - p.shape[2])) for p in parts]
    return torch.cat(whole)


def _crossing(
    side: Side,
    early: Tensor,
    late: Tensor,
    start: State | None,
    dstart: State | None,
    end: State | None,
    dend: State | None,
    z: bool,
) -> Tensor:
    """The part of the angles' gradient that crosses borders of segments: [S H D]."""
    problem = side.problem
    d, e = problem.d, early.shape[3]
    out = torch.empty(problem.sequences, problem.heads, d, dtype=torch.float32, device=early.device)
    tiles = triton.cdiv(d, 16)

    def part(state: State | None) -> Tensor:
        if state is None:
            return early
        found = state.z if z else state.kv
        return early if found is None else found

    if problem.sequences:
        marks = early if side.borders is None else side.borders
        constants = (16, plan.padded(e), 2 if problem.packed else int(problem.lengths))
        crossing(
            problem.sequences * problem.heads * tiles, (marks.dtype, early.device, constants),
            (
                early, late, part(start), part(dstart), int(start is not None), part(end), part(dend),
                int(end is not None), out, marks, problem.sequences, plan.length_of(problem), problem.heads,
                d, e, side.segments, side.size, 0.5 * side.size,
            ),
            constants, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
