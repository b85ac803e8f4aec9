"""Forward passes: causal ones in one launch, others in two."""

from __future__ import annotations

from functools import partial
from typing import Any

from linattn.arrays import Array
from linattn.backends.cupy import sources
from linattn.backends.cupy.launch import (
    THREADS,
    Call,
    Runner,
    dense_state,
    empty_state,
    fresh,
    product,
    tables,
)
from linattn.backends.cupy.memory import address, dense, room
from linattn.backends.cupy.tape import Parts, repeatable
from linattn.problem import Problem
from linattn.state import State, tokens_seen


def run(problem: Problem, runner: Runner, x: Any, *, keep: bool) -> tuple[Array, State | None, Array | None]:
    """`forward` of the arrays of a backend's call, and the lengths of its state."""
    state: State | None = x.state
    kv, z = (None, None) if state is None else (state.kv, state.z)
    inputs = (x.q, x.k, x.v, *tables(problem, x), kv, z)
    o, rows, kv, z = repeatable(("forward", keep), problem, runner, inputs, partial(_pass, problem, keep))
    if not problem.return_state:
        return o, None, rows
    length = tokens_seen(x.q, x.lengths, x.cu_seqlens, None if state is None else state.length)
    final = State(kv, z, length, problem.feature_map, problem.reweight, problem.d)
    return o, final, rows


def _pass(
    problem: Problem, keep: bool, runner: Runner, q: Array, k: Array, v: Array, log_decay: Array | None,
    theta: Array | None, key_mask: Array | None, borders: Array | None, kv: Array | None, z: Array | None,
) -> Parts:  # fmt: skip
    call = Call(problem, runner, log_decay, theta, key_mask, borders)
    start = None if kv is None else State(kv, z, kv)
    o, final, rows = forward(call, q, k, v, start, keep=keep)
    return (o, rows, None, None) if final is None else (o, rows, final.kv, final.z)


def forward(
    call: Call, q: Array, k: Array, v: Array, state: State | None, *, keep: bool = False
) -> tuple[Array, State | None, Array | None]:
    """o [B, N, H, E], the final state without lengths if it is asked for, and with `keep` the sums of weights
    [B, N, H] of a normalized call.
    """
    problem = call.problem
    o = fresh(call, q, (problem.batch, problem.n, problem.heads, problem.e), problem.dtype)
    rows = fresh(call, q, (problem.batch, problem.n, problem.heads), call.acc) if keep else None
    start = dense_state(state, call.acc)
    final = empty_state(call, q) if problem.return_state else None
    both = {"y": k, "w": v, "normalize": problem.normalize, "scale": problem.scale}
    if problem.causal:
        product(call, x=q, out=o, start=start, final=final, rows=rows, **both)
    elif problem.decay is None:
        whole = total(call, k, v)
        product(call, x=q, out=o, start=whole, total=True, mask=0, rows=rows, **both)
    else:
        partial = partials(call, q, problem.e, problem.normalize)
        product(call, x=q, out=o, sums=1, partial=partial, **both)
        product(call, x=q, out=o, sums=2, partial=partial, rows=rows, reverse=True, strict=True, **both)
    return o, final, rows


def in_pool(problem: Problem, runner: Runner, x: Any, slots: Array) -> Array:
    """o of a call whose states are rows of a pool, which change in place, and their lengths with them."""
    pool: State = x.state
    inputs = (
        x.q, x.k, x.v, *tables(problem, x), pool.kv, pool.z, pool.length, dense(slots, "int64")
    )  # fmt: skip
    return repeatable("pool", problem, runner, inputs, partial(_pass_in_pool, problem))[0]


def _pass_in_pool(
    problem: Problem, runner: Runner, q: Array, k: Array, v: Array, log_decay: Array | None,
    theta: Array | None, key_mask: Array | None, borders: Array | None, kv: Array, pool_z: Array | None,
    length: Array, slots: Array,
) -> Parts:  # fmt: skip
    call = Call(problem, runner, log_decay, theta, key_mask, borders)
    pool = State(kv, pool_z, length)
    s, h, f = problem.sequences, problem.heads, problem.f
    o = room(q, (problem.batch, problem.n, h, problem.e), problem.dtype, zero=True)
    z = (
        None if pool.z is None else room(q, (s, h, f), call.acc)
    )  # a slice's z may not change before others read it
    product(
        call, x=q, y=k, w=v, out=o, start=pool, final=State(pool.kv, z, pool.length), slots=slots,
        normalize=problem.normalize, scale=problem.scale,
    )  # fmt: skip
    values: dict[str, float] = {
        "slots": address(slots), "from": address(z), "z": address(pool.z), "length": address(pool.length),
        "borders": address(call.borders), "S": s, "F": h * f, "pool": pool.kv.shape[0], "N": problem.n,
    }  # fmt: skip
    if s:
        kernel = sources.expression(
            "keep_rows", (call.acc,), (2 if problem.packed else int(problem.lengths),)
        )
        call.run("between.cu", kernel, sources.packed("between.cu", "Rows", values), s, THREADS, 0, q)
    return (o,)


def total(call: Call, k: Array, v: Array) -> State:
    """The state of all keys of each sequence, in the frame of its beginning."""
    whole = empty_state(call, k)
    product(call, x=None, y=k, w=v, out=None, final=whole, total=True, normalize=call.problem.normalize)
    return whole


def partials(call: Call, q: Array, features: int, normalize: bool) -> tuple[Array, Array | None]:
    """Room for the sums of one direction, and their weights."""
    b, n, h, _ = q.shape
    return room(q, (b, n, h, features), call.acc), room(q, (b, n, h), call.acc) if normalize else None
