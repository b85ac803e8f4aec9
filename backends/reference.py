"""The definition as a backend: quadratic, float64 inside, for comparing and for teaching; never automatic."""

from __future__ import annotations

from typing import Any

import numpy as np

from linattn import reference
from linattn.arrays import Array, cast
from linattn.backends import Gradients, Saved
from linattn.problem import Problem
from linattn.state import State, tokens_seen


def _keywords(
    problem: Problem,
    log_decay: Array | None,
    theta: Array | None,
    key_mask: Array | None,
    lengths: Array | None,
    cu_seqlens: Array | None,
    state: State | None,
) -> dict[str, Any]:
    if problem.reweight == "cosine":
        theta = np.full((problem.heads, problem.d), problem.angle)
    return {
        "log_decay": log_decay,
        "theta": theta,
        "feature_map": problem.feature_map,
        "normalize": problem.normalize,
        "eps": problem.eps,
        "causal": problem.causal,
        "scale": problem.scale,
        "key_mask": key_mask,
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
        "initial_state": None if state is None else (state.kv, state.z),
    }


class ReferenceBackend:
    """`linattn.reference` behind the protocol: N x N weights, so short sequences only."""

    name = "reference"
    arrays = {"numpy": False}  # noqa: RUF012 (a constant)

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
        keywords = _keywords(problem, log_decay, theta, key_mask, lengths, cu_seqlens, state)
        with np.errstate(all="ignore"):
            o, final = reference.attention(q, k, v, **keywords)
        o = cast(o, problem.dtype)
        if not problem.return_state:
            return o, None
        length = tokens_seen(q, lengths, cu_seqlens, None if state is None else state.length)
        assert final is not None  # a state is asked for in causal calls only
        kv, z = final
        z = None if z is None else cast(z, problem.accumulate)
        kv = cast(kv, problem.accumulate)
        return o, State(kv, z, length, problem.feature_map, problem.reweight, problem.d)

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        s = saved
        keywords = _keywords(problem, s.log_decay, s.theta, s.key_mask, s.lengths, s.cu_seqlens, s.state)
        given = None if dstate is None else (dstate.kv, dstate.z)
        with np.errstate(all="ignore"):
            grads = reference.gradients(s.q, s.k, s.v, do, given, **keywords)
        acc = problem.accumulate
        wide = {
            name: cast(grads[name], acc)
            for name in ("log_decay", "theta")
            if grads.get(name) is not None and (name != "theta" or problem.reweight == "lrpe")
        }
        if problem.initial_state:
            kv, z = grads["initial_state"]
            wide |= {"kv": cast(kv, acc), "z": None if z is None else cast(z, acc)}
        narrow = {name: cast(grads[name], problem.dtype) for name in ("q", "k", "v")}
        return Gradients(**narrow, **wide)


backend = ReferenceBackend()
