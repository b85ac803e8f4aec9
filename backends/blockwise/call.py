"""The whole call: which way through the blocks, and the state apart again."""

from __future__ import annotations

from linattn.arrays import Array, cast, empty_like_kind, namespace
from linattn.backends import Saved
from linattn.backends.blockwise import twosided
from linattn.backends.blockwise.causal import divide, one_way
from linattn.backends.blockwise.tiles import cut
from linattn.problem import Problem
from linattn.state import State, tokens_seen


def forward(problem: Problem, x: Saved, out: Array | None = None) -> tuple[Array, State | None]:
    """The whole call: o [b n h e] in q's dtype (into `out` if given), and the final state if the problem asks
    for it.
    """
    xp = namespace(problem.kind)
    n = problem.n
    if not problem.causal:
        o = divide(xp, problem, twosided.sums(xp, problem, x))
        if out is None:
            return cast(o, problem.dtype), None
        out[...] = cast(o, problem.dtype)
        return out, None
    way = cut(xp, problem, x.lengths, x.cu_seqlens)
    spare = way.spare()
    o = out
    if o is None or spare:
        o = empty_like_kind(x.q, (problem.batch, n + spare, problem.heads, problem.e), problem.dtype)
    final = one_way(xp, way, x, o, raw=False)
    if spare:
        o = o[:, :n]
    if out is not None and spare:
        out[...] = o
        o = out
    return o, final_state(problem, x, final) if problem.return_state else None


def final_state(problem: Problem, x: Saved, final: Array) -> State:
    """The state after the call, apart again; its length counts masked tokens, not padding."""
    final = cast(final, problem.accumulate)
    if problem.normalize:
        kv, z = final[..., :-1], final[..., -1]
        kv, z = kv + 0.0, z + 0.0  # arrays of their own, not views of one
    else:
        kv, z = final + 0.0, None
    length = tokens_seen(x.q, x.lengths, x.cu_seqlens, None if x.state is None else x.state.length)
    return State(kv, z, length, problem.feature_map, problem.reweight, problem.d)
