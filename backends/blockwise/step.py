"""One token: the state advanced by one, the new pair added, the query read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from linattn import features
from linattn.arrays import Array, cast, dtype_name, namespace
from linattn.backends.blockwise import factors
from linattn.problem import Problem
from linattn.slots import Slots
from linattn.state import State


def decode_step(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    theta: Array | None,
    state: State,
    slots: Array | None,
) -> Array:
    """q, k [b h d], v [b h e] -> o [b h e] in q's dtype; kv, z and length of `state` change in place."""
    xp, acc = namespace(problem.kind), problem.accumulate
    rows = None if slots is None else Slots(slots, state)
    start = state if rows is None else rows.read(state)
    fq = features.apply(xp, problem.feature_map, cast(q, acc)) * problem.scale  # [b h d]
    fk = features.apply(xp, problem.feature_map, cast(k, acc))
    wide = cast(v, acc)
    values = wide if not problem.normalize else xp.concatenate((wide, xp.ones_like(wide[..., :1])), -1)
    before = start.kv
    if problem.normalize:
        assert start.z is not None
        before = xp.concatenate((before, start.z[..., None]), -1)
    now = cast(before, "float64" if problem.reweight else acc)
    table = factors.angles(xp, problem, theta, 1, q)
    if table is not None:
        now = factors.turned(xp, table.cos[1][..., None], table.sin[1][..., None], now)
    if log_decay is not None:
        now = decayed(xp, now, log_decay)
    pair = fk[..., None] * values[..., None, :]  # [b h d w]
    if problem.reweight:
        now = xp.concatenate((now[..., : problem.d, :] + pair, now[..., problem.d :, :]), -2)
    else:
        now = now + pair
    now = cast(now, acc)
    sums = (fq[..., None, :] @ now[..., : problem.d, :])[..., 0, :]  # [b h w]
    if problem.normalize:
        den = sums[..., -1:]
        o = sums[..., :-1] / xp.where(den <= problem.eps, problem.eps, den)
        after = replace(start, kv=now[..., :-1], z=now[..., -1], length=start.length + 1)
    else:
        o = sums
        after = replace(start, kv=now, length=start.length + 1)
    if rows is None:
        state.assign(after)
    else:
        rows.write(state, after)
        o = rows.without_padding(o, None)
    return cast(o, problem.dtype)


def decayed(xp: Any, state: Array, log_decay: Array) -> Array:
    """The state [b h f e], new, times the factors [h] or [b h]; one of 0 selects: what it forgets may be NaN.

    A factor rounded to float32 would be 2^-25 off once a token, for as long as the text goes on. So it is two
    numbers: its first 12 bits, and the rest, which is never 0 and never of the other sign, so that infinities
    stay.
    """
    dtype, log_decay = dtype_name(state), cast(log_decay, "float64")[..., None, None]
    factor = xp.exp(log_decay)
    if dtype == "float64":
        return xp.where(factor > 0, state, 0.0) * factor
    unit = xp.exp2(xp.floor(log_decay / math.log(2)) - 11)
    high = xp.floor(factor / xp.where(unit > 0, unit, 1.0)) * unit
    rest = cast(factor - high + factor * 2.0**-60, dtype)
    high = cast(high, dtype)
    now = xp.where(high > 0, state, 0.0)
    rest = now * rest
    now *= high
    now += rest
    return now
