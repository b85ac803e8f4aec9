"""`batch_invariant`: one row at a time, so that the same row gives the same bits in every batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from linattn.arrays import Array, empty_like_kind, namespace, to_numpy, zeros_like_kind
from linattn.backends import Gradients, Saved
from linattn.backends.blockwise import call, gradients
from linattn.problem import Problem
from linattn.state import State


@dataclass(frozen=True)
class Row:
    """One row of a batch, or one packed sequence, as a call of its own."""

    number: int
    rows: slice  # of the batch axis
    tokens: slice  # of the N axis
    problem: Problem
    inputs: Saved


def rows(problem: Problem, x: Saved) -> Iterator[Row]:
    """Cut a call into its rows; packed sequences are read on the host."""
    alone = replace(problem, batch=1, sequences=1, packed=False, batch_invariant=False)
    if problem.packed:
        edges = to_numpy(x.cu_seqlens).tolist()
        for s, (a, b) in enumerate(itertools.pairwise(edges)):
            own = replace(alone, n=b - a, m=b - a)
            yield _row(s, slice(0, 1), slice(a, b), own, x)
        return
    for b in range(problem.batch):
        yield _row(b, slice(b, b + 1), slice(None), alone, x)


def _row(number: int, rows: slice, tokens: slice, problem: Problem, x: Saved) -> Row:
    def part(a: Array | None) -> Array | None:
        return None if a is None else a[rows, tokens]

    own = replace(
        x,
        q=part(x.q),
        k=part(x.k),
        v=part(x.v),
        log_decay=part(x.log_decay) if problem.decay == "token" else x.log_decay,
        key_mask=part(x.key_mask),
        lengths=None if x.lengths is None else x.lengths[rows],
        cu_seqlens=None,
        state=_state(x.state, number),
    )
    return Row(number, rows, tokens, problem, own)


def _state(state: State | None, number: int) -> State | None:
    return None if state is None else state.select([number])


def forward(problem: Problem, x: Saved, out: Array | None = None) -> tuple[Array, State | None]:
    """`call.forward`, row by row."""
    if not problem.batch_invariant:
        return call.forward(problem, x, out)
    if out is None:
        shape = (problem.batch, problem.n, problem.heads, problem.e)
        out = empty_like_kind(x.q, shape, problem.dtype)
    states = []
    for row in rows(problem, x):
        o, state = call.forward(row.problem, row.inputs)
        out[row.rows, row.tokens] = o
        states += [] if state is None else [state]
    if not problem.return_state:
        return out, None
    if not states:
        return out, call.forward(replace(problem, batch_invariant=False), x)[1]
    return out, _joined(namespace(problem.kind), states)


def _joined(xp: Any, states: list[State]) -> State:
    z = None if states[0].z is None else xp.concatenate([state.z for state in states], 0)
    kv = xp.concatenate([state.kv for state in states], 0)
    return replace(states[0], kv=kv, z=z, length=xp.concatenate([state.length for state in states], 0))


def backward(problem: Problem, x: Saved, o: Array | None, do: Array, dstate: State | None) -> Gradients:
    """`gradients.backward`, row by row; what rows share is summed in their order."""
    if not problem.batch_invariant or problem.sequences == 0:
        return gradients.backward(problem, x, o, do, dstate)
    acc = problem.accumulate
    total = Gradients(*(zeros_like_kind(a, tuple(a.shape), problem.dtype) for a in (x.q, x.k, x.v)))
    decay = None if x.log_decay is None else zeros_like_kind(x.log_decay, tuple(x.log_decay.shape), acc)
    theta: Array | None = None
    starts: list[State] = []
    for row in rows(problem, x):
        own = None if o is None else o[row.rows, row.tokens]
        grads = gradients.backward(
            row.problem, row.inputs, own, do[row.rows, row.tokens], _state(dstate, row.number)
        )
        for name in "qkv":
            getattr(total, name)[row.rows, row.tokens] = getattr(grads, name)
        if decay is not None and grads.log_decay is not None:
            if problem.decay == "token":
                decay[row.rows, row.tokens] = grads.log_decay
            else:
                decay = decay + grads.log_decay
        if grads.theta is not None:
            theta = grads.theta if theta is None else theta + grads.theta
        if x.state is not None:
            starts.append(replace(x.state.select([row.number]), kv=grads.kv, z=grads.z))
    start = _joined(namespace(problem.kind), starts) if starts else None
    return replace(
        total,
        log_decay=decay if x.want_log_decay else None,
        theta=theta,
        kv=None if start is None else start.kv,
        z=None if start is None else start.z,
    )
