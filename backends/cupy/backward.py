"""Gradients: the product again, three times for each direction (docs/cupy.md has the table)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from linattn.arrays import Array, cast
from linattn.backends import Gradients, Saved
from linattn.backends.cupy import sources
from linattn.backends.cupy.forward import forward, partials, total
from linattn.backends.cupy.launch import (
    THREADS,
    Call,
    Runner,
    dense_state,
    empty_state,
    fresh,
    planned,
    product,
    tables,
)
from linattn.backends.cupy.memory import address, dense, room, strides
from linattn.backends.cupy.tape import Parts, repeatable
from linattn.problem import Problem
from linattn.state import State


@dataclass(frozen=True)
class Quotient:
    """What the gradient of o becomes before the normaliser: do / den, and the denominators' own [B H N]."""

    den: Array | None = None
    extra: Array | None = None


@dataclass
class Results:
    """Gradients as they are formed; sums over both directions."""

    q: Array
    k: Array
    v: Array
    plus: Array | None = None  # [slices B N H]: what a token's query takes from the state
    minus: Array | None = None  # [slices B M H]: and what its key puts into it
    theta: Array | None = None  # [S H D] float64
    start: State | None = None
    final: State | None = None


def backward(problem: Problem, runner: Runner, x: Saved, do: Array, dstate: State | None) -> Gradients:
    """Gradients of every input, from those of o [B, N, H, E] and of the returned state."""
    surroundings = tables(problem, x)
    call = Call(problem, runner, *surroundings)
    wants = problem.decay is not None and x.want_log_decay, problem.reweight == "lrpe" and x.want_theta
    states = *_parts(x.state), *_parts(dstate)
    inputs = (x.q, x.k, x.v, *surroundings, cast(do, problem.dtype), x.o, x.kept, *states)
    work = partial(_pass, problem, *wants)
    *found, start, start_z, final, final_z = repeatable(("backward", *wants), problem, runner, inputs, work)
    q, k, v, plus, minus, turned = found
    out = Results(q, k, v, plus, minus, turned, _state(start, start_z), _state(final, final_z))
    decay = theta = None
    dstate = dense_state(dstate, call.acc)
    if wants[0]:
        decay = _log_decay(call, out, dstate)
    if out.theta is not None:
        theta = cast(_theta(call, out, dstate), call.acc)
    return Gradients(q, k, v, decay, theta, start, start_z)


def _parts(state: State | None) -> tuple[Array | None, Array | None]:
    return (None, None) if state is None else (state.kv, state.z)


def _state(kv: Array | None, z: Array | None) -> State | None:
    """Without lengths, which no gradient reads."""
    return None if kv is None else State(kv, z, kv)


def _pass(
    problem: Problem, want_log_decay: bool, want_theta: bool, runner: Runner, q: Array, k: Array, v: Array,
    log_decay: Array | None, theta: Array | None, key_mask: Array | None, borders: Array | None, do: Array,
    o: Array | None, kept: Array | None, kv: Array | None, z: Array | None, dkv: Array | None,
    dz: Array | None,
) -> Parts:  # fmt: skip
    """The fields of `Results`, of states their two arrays."""
    call = Call(problem, runner, log_decay, theta, key_mask, borders)
    start, dstate = (dense_state(_state(*parts), call.acc) for parts in ((kv, z), (dkv, dz)))
    x = Saved(
        q, k, v, log_decay, theta, key_mask, o=o, state=start, kept=kept, want_log_decay=want_log_decay,
        want_theta=want_theta,
    )  # fmt: skip
    out = Results(*(fresh(call, like, tuple(like.shape), problem.dtype) for like in (q, k, v)))
    below = _denominators(call, x, do) if problem.normalize else Quotient()
    if problem.causal:
        _one_way(call, x, do, below, start, dstate, out)
    elif problem.decay is None:
        _from_totals(call, x, do, below, out)
    else:
        parts = [partials(call, like, like.shape[3], False) for like in (q, k, v)]
        _one_way(call, x, do, below, None, None, out, sums=1, parts=parts)
        _one_way(call, x, do, below, None, None, out, sums=2, parts=parts, flip=True)
    return out.q, out.k, out.v, out.plus, out.minus, out.theta, *_parts(out.start), *_parts(out.final)


def _denominators(call: Call, x: Saved, do: Array) -> Quotient:
    problem = call.problem
    den = forward(call, x.q, x.k, x.v, x.state, keep=True)[2] if x.kept is None else x.kept
    assert den is not None and x.o is not None
    den, o = dense(den, call.acc), cast(x.o, problem.dtype)
    b, n, h, e = do.shape
    extra = room(do, (b, h, n), call.acc)
    values: dict[str, float] = {
        "den": address(den), "o": address(o), "gradient": address(do), "out": address(extra),
        "B": b, "N": n, "H": h, "E": e, "eps": problem.eps,
    }  # fmt: skip
    for name, array in (("o", o), ("do", do)):
        values |= {f"{name}_{p}": s for p, s in zip("bnhe", strides(array), strict=True)}
    if grid := -(-b * n * h // THREADS):
        kernel = sources.expression("denominator_gradient", (problem.dtype,), ())
        packed = sources.packed("between.cu", "Quotient", values)
        call.run("between.cu", kernel, packed, grid, THREADS, 0, do)
    return Quotient(den, extra)


def _one_way(
    call: Call, x: Saved, do: Array, below: Quotient, start: State | None, dstate: State | None, out: Results,
    *, sums: int = 0, parts: list[tuple[Array, Array | None]] | None = None, flip: bool = False,
) -> None:  # fmt: skip
    """Gradients of the pairs with j <= i; with `flip` of those with j > i, time reversed."""
    problem, want_decay = call.problem, call.problem.decay is not None and x.want_log_decay
    want_theta = problem.reweight == "lrpe" and x.want_theta
    if dstate is not None and (want_theta or want_decay):
        out.final = empty_state(call, do)
    if problem.initial_state:
        out.start = empty_state(call, do)
    extra_on = below.extra is not None
    rows_q, rows_k = (_rows(call, like, problem.e, extra_on, want_decay, want_theta) for like in (x.q, x.k))
    turn_q, turn_k = (_turn(call, x.q, want_theta) for _ in range(2))
    of_q, of_k, of_v = parts or (None, None, None)
    shared: dict[str, Any] = {"den": below.den, "strict": flip, "sums": sums}
    product(
        call, x=do, y=x.v, w=x.k, out=out.q, raw=x.q, do_is=1, extra=below.extra, extra_on=int(extra_on),
        start=start, final=out.final, rows=rows_q, turn=turn_q, reverse=flip, gradient=True, partial=of_q,
        **shared,
    )  # fmt: skip
    product(
        call, x=x.v, y=do, w=x.q, out=out.k, raw=x.k, do_is=2, extra=below.extra, extra_on=2 * extra_on,
        start=dstate, final=out.start, rows=rows_k, turn=turn_k, reverse=not flip, gradient=True, mask=2,
        partial=of_k, **shared,
    )  # fmt: skip
    product(
        call, x=x.k, y=x.q, w=do, out=out.v, do_is=3, start=dstate, reverse=not flip, mask=2, partial=of_v,
        **shared,
    )  # fmt: skip
    if rows_q is not None and rows_k is not None:
        # with j > i the key comes later: it is the key that takes, and the query that puts
        out.plus = rows_q if out.plus is None else out.plus - rows_q
        out.minus = rows_k if out.minus is None else out.minus - rows_k
    if turn_q is not None and turn_k is not None:
        out.theta = turn_q + turn_k if out.theta is None else out.theta + turn_q + turn_k


def _rows(call: Call, like: Array, e: int, extra: bool, wanted: bool, angles: bool) -> Array | None:
    """Room for a number of each token, from each slice of a gradient's features."""
    if not wanted:
        return None
    found = planned(call, like, e, like.shape[3], gradient=True, extra=extra, turn=angles)
    return fresh(call, like, (found.slices, *like.shape[:3]), call.acc)


def _turn(call: Call, like: Array, wanted: bool) -> Array | None:
    problem = call.problem
    return room(like, (problem.sequences, problem.heads, problem.d), "float64") if wanted else None


def _from_totals(call: Call, x: Saved, do: Array, below: Quotient, out: Results) -> None:
    """Gradients of a call that is not causal and has no decay: everybody reads one state."""
    want_theta = call.problem.reweight == "lrpe" and x.want_theta
    turn_q, turn_k = (_turn(call, x.q, want_theta) for _ in range(2))
    extra_on = below.extra is not None
    keys, queries = total(call, x.k, x.v), empty_state(call, x.q)
    shared: dict[str, Any] = {"total": True, "den": below.den, "extra": below.extra}
    product(
        call, x=None, y=do, w=x.q, out=None, do_is=2, extra_on=2 * extra_on, final=queries, gradient=True,
        mask=0, **shared,
    )  # fmt: skip
    product(
        call, x=do, y=x.v, w=x.k, out=out.q, raw=x.q, do_is=1, extra_on=int(extra_on), start=keys,
        turn=turn_q, gradient=True, mask=0, **shared,
    )  # fmt: skip
    product(
        call, x=x.v, y=do, w=x.q, out=out.k, raw=x.k, extra_on=2 * extra_on, start=queries, turn=turn_k,
        gradient=True, mask=2, **shared,
    )  # fmt: skip
    product(call, x=x.k, y=x.q, w=do, out=out.v, start=queries, mask=2, total=True)
    if turn_q is not None and turn_k is not None:
        out.theta = turn_q + turn_k


def _between_states(call: Call, state: State, dstate: State, turned: bool) -> Array:
    """<C, dC> + <S, dS> of each sequence and head [S H], or with `turned` what angles turn, [S H D]."""
    d = call.problem.d
    found: Any = 0.0
    pairs = [(state.kv, dstate.kv)]
    if state.z is not None and dstate.z is not None:
        pairs.append((state.z[..., None], dstate.z[..., None]))
    for own, gradient in pairs:
        own, gradient = cast(own, "float64"), cast(gradient, "float64")
        if turned:
            found = found + (gradient[:, :, d:] * own[:, :, :d] - gradient[:, :, :d] * own[:, :, d:]).sum(-1)
        else:
            found = found + (own * gradient).sum((-1, -2))
    return found


def _theta(call: Call, out: Results, dstate: State | None) -> Array:
    """[H D]: tokens are turned from the sequence's beginning, the final state by all of them."""
    found = out.theta
    if dstate is not None and out.final is not None:
        borders = call.borders
        if borders is None:
            tokens: Any = call.problem.n
        else:
            tokens = cast(borders[1:] - borders[:-1] if call.problem.packed else borders, "float64")[
                :, None, None
            ]
        found = found + tokens * _between_states(call, out.final, dstate, True)
    return found.sum(0)  # type: ignore[union-attr]


def _log_decay(call: Call, out: Results, dstate: State | None) -> Array:
    """[B N H], or [H]."""
    problem, decay = call.problem, call.log_decay
    assert decay is not None and out.plus is not None and out.minus is not None
    s, h, per_token = problem.sequences, problem.heads, problem.decay == "token"
    end = None
    if dstate is not None and out.final is not None:
        end = dense(_between_states(call, out.final, dstate, False), "float64")
    shape = (problem.batch, problem.n, h) if per_token else (s, h)
    found = room(out.q, shape, call.acc if per_token else "float64", zero=True)
    values: dict[str, float] = {
        "plus": address(out.plus), "minus": address(out.minus), "end": address(end),
        "log_decay": address(decay), "out": address(found), "borders": address(call.borders),
        "plus_slices": out.plus.shape[0], "minus_slices": out.minus.shape[0],
        "B": problem.batch, "N": problem.n, "M": problem.m, "H": h, "S": s,
    }  # fmt: skip
    values |= dict(zip(("g_b", "g_n", "g_h"), (0, 0, *strides(decay))[-3:], strict=True))
    if s * h:
        borders = 2 if problem.packed else int(problem.lengths)
        kernel = sources.expression("suffix_sums", (call.acc,), (per_token, borders))
        packed = sources.packed("between.cu", "Suffixes", values)
        call.run("between.cu", kernel, packed, s * h, THREADS, 0, out.q)
    return found if per_token else cast(found.sum(0), call.acc)
