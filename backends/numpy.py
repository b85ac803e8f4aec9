"""NumPy arrays, by the blockwise algorithm; heads are shared out over the processor's cores."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TypeVar

import numpy as np

from linattn.arrays import Array
from linattn.backends import Gradients, Saved, blockwise
from linattn.problem import Problem
from linattn.state import State

T = TypeVar("T")

# Work (tokens x heads x D x E) below which starting threads costs more than it saves.
SERIAL = 1 << 24


def _parts(problem: Problem) -> list[slice]:
    """Runs of heads, one for each core; heads do not know each other, so any split gives the same bits."""
    work = problem.batch * problem.n * problem.heads * problem.d * problem.e
    workers = 1 if work < SERIAL else min(problem.heads, os.cpu_count() or 1)
    edges = [problem.heads * i // workers for i in range(workers + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _share(problem: Problem, work: Callable[[Problem, slice], T]) -> list[T]:
    parts = _parts(problem)
    problems = [replace(problem, heads=part.stop - part.start) for part in parts]
    if len(parts) == 1:
        return [work(problems[0], parts[0])]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(work, problems, parts))


def _state_heads(state: State | None, h: slice) -> State | None:
    if state is None:
        return None
    return replace(state, kv=state.kv[:, h], z=None if state.z is None else state.z[:, h])


def _heads(x: Saved, h: slice) -> Saved:
    return replace(
        x,
        q=x.q[:, :, h],
        k=x.k[:, :, h],
        v=x.v[:, :, h],
        log_decay=None if x.log_decay is None else x.log_decay[..., h],
        theta=None if x.theta is None else x.theta[h],
        state=_state_heads(x.state, h),
    )


def _join(parts: list[State]) -> State:
    if len(parts) == 1:
        return parts[0]
    z = None if parts[0].z is None else np.concatenate([p.z for p in parts], 1)
    return replace(parts[0], kv=np.concatenate([p.kv for p in parts], 1), z=z)


class NumpyBackend:
    """The blockwise algorithm over NumPy, float16 to float64."""

    name = "numpy"
    arrays = {"numpy": True}  # noqa: RUF012 (a constant)

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def forward(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        theta: Array | None,
        key_mask: Array | None,
        lengths: Array | None,
        cu_seqlens: Array | None,
        state: State | None,
    ) -> tuple[Array, State | None]:
        whole = Saved(q, k, v, log_decay, theta, key_mask, lengths, cu_seqlens, state)
        o = np.empty((problem.batch, problem.n, problem.heads, problem.e), dtype=problem.dtype)

        def work(part: Problem, h: slice) -> State | None:
            with np.errstate(all="ignore"):
                return blockwise.forward(part, _heads(whole, h), o[:, :, h])[1]

        states = [state for state in _share(problem, work) if state is not None]
        return o, _join(states) if states else None

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        whole = saved

        def work(part: Problem, h: slice) -> Gradients:
            o = None if saved.o is None else saved.o[:, :, h]
            with np.errstate(all="ignore"):
                return blockwise.backward(part, _heads(whole, h), o, do[:, :, h], _state_heads(dstate, h))

        parts = _share(problem, work)
        axis = {"q": 2, "k": 2, "v": 2, "log_decay": -1, "theta": 0, "kv": 1, "z": 1}
        joined = {
            field.name: None
            if getattr(parts[0], field.name) is None
            else np.concatenate([getattr(part, field.name) for part in parts], axis[field.name])
            for field in fields(Gradients)
        }
        return Gradients(**joined)

    def decode_step(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        theta: Array | None,
        state: State,
        slots: Array | None,
    ) -> Array:
        with np.errstate(all="ignore"):
            return blockwise.decode_step(problem, q, k, v, log_decay, theta, state, slots)


backend = NumpyBackend()
