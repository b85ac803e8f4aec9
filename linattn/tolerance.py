"""The allowed error of every result: one bound, elementwise, the same for every backend and every test.

Letters in shapes: b batch, s sequences, n query positions, m key positions, h heads, d key features, e value
features,
f state features. Everything here is NumPy float64. docs/tolerances.md derives the bound and says how SLACK
was chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from linattn import reference
from linattn.absolute import Sequence, State, feature, fold, joined, left_over, unfold, with_ones
from linattn.arrays import Array

if TYPE_CHECKING:
    from jaxtyping import Float

SLACK = 4.0
"""The only free number: how far above the statistical size of a rounding error a result may be."""

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff: half the distance from 1 to the next number."""

SUBNORMAL = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126}

UPDATE_EVERY = 16
"""Tokens between two roundings of a state that an algorithm over blocks carries; a decode step rounds every
token.
"""


@dataclass(frozen=True)
class Rounding:
    """What one implementation rounds: the u's of the bound, and how often a carried state is rounded."""

    dtype: str
    precision: str = "ieee"
    operands: str | None = None
    update_every: int = UPDATE_EVERY

    @property
    def accumulate(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def u_acc(self) -> float:
        return UNIT[self.accumulate]

    @property
    def u_out(self) -> float:
        return UNIT[self.dtype]

    @property
    def subnormal(self) -> float:
        """The smallest number above 0 of an output."""
        return SUBNORMAL[self.dtype]

    @property
    def wide_subnormal(self) -> float:
        """The smallest number above 0 of a state, and of the gradients of tables."""
        return SUBNORMAL[self.accumulate]

    @property
    def flushed(self) -> float:
        """Products below this may become 0: a GPU, or a CPU that is told to, has no subnormal numbers."""
        return NORMAL[self.accumulate]

    @property
    def once(self) -> float:
        """What a single rounding in the accumulation dtype may cost."""
        return SLACK * self.u_acc

    @property
    def u_in(self) -> float:
        """What rounding operands for a tensor core costs: `operands` names their format; tf32 only when
        asked for.
        """
        if self.operands is not None:
            return UNIT[self.operands]
        return UNIT["tf32"] if self.precision == "tf32" and self.dtype == "float32" else 0.0

    def factor(self, terms: float, updates: Any, log_weight: Any, u_out: float) -> Any:
        """SLACK · (u_acc · (√terms + updates + |ln Λ|) + u_in) + u_out."""
        return SLACK * (self.u_acc * (math.sqrt(terms) + updates + log_weight) + self.u_in) + u_out


@dataclass(frozen=True)
class Bounds:
    """Allowed absolute errors, in the shapes of the results they belong to."""

    o: Array
    kv: Array
    z: Array | None
    gradients: dict[str, Any] = field(default_factory=dict)


def bound(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    *,
    rounding: Rounding,
    log_decay: Array | None = None,
    theta: Float[Array, "h d"] | None = None,
    feature_map: str | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    causal: bool = True,
    scale: float = 1.0,
    key_mask: Array | None = None,
    lengths: Array | None = None,
    cu_seqlens: Array | None = None,
    initial_state: State | None = None,
    do: Float[Array, "b n h e"] | None = None,
    dstate: State | None = None,
) -> Bounds:
    """Allowed errors of o, of the final state and, with `do`, of every gradient (keys as
    `reference.gradients`).

    Quadratic in the length, as the reference is. `far` bounds o and the state of long causal calls.
    """
    batch, n, heads, d = q.shape
    e = v.shape[-1]
    sequences = list(_sequences(batch, n, lengths, cu_seqlens))
    wide = 2 * d if theta is not None else d
    columns = e + normalize
    o = np.full((batch, n, heads, e), rounding.subnormal)
    state = np.zeros((len(sequences), heads, d, columns))
    grads: dict[str, Array] = {}
    if do is not None:
        grads = {name: np.full(x.shape, rounding.subnormal) for name, x in (("q", q), ("k", k), ("v", v))}
        grads["state"] = np.zeros(state.shape)
        grads["theta"] = np.full((heads, d), rounding.wide_subnormal)
        if log_decay is not None:
            grads["log_decay"] = np.full(log_decay.shape, rounding.wide_subnormal)
    den = num = None
    if normalize:
        shared: dict[str, Any] = {
            "log_decay": log_decay,
            "theta": theta,
            "feature_map": feature_map,
            "causal": causal,
            "scale": scale,
        }
        shared |= {"key_mask": key_mask, "lengths": lengths, "cu_seqlens": cu_seqlens}
        both, _ = reference.attention(q, k, with_ones(v), initial_state=joined(initial_state), **shared)
        num, den = both[..., :-1], both[..., -1]
    for s, (b, begin, end) in enumerate(sequences):
        rows = slice(begin, end)
        keys = rows if k.shape[1] == n else slice(None)
        g = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[b, rows]
        mask = None if key_mask is None else key_mask[b, keys]
        one = Sequence(
            q[b, rows], k[b, keys], v[b, keys], g, mask, rounding, feature_map, causal, scale, wide
        )
        one.columns(normalize, fold(initial_state, s, d, theta is not None, columns))
        if normalize and num is not None and den is not None:
            one.normalised(num[b, rows], den[b, rows], eps)
        o[b, rows] += one.outputs()
        state[s] = one.final_state()
        if do is None:
            continue
        one.backward(do[b, rows], fold(dstate, s, d, theta is not None, columns))
        grads["q"][b, rows] += one.dq()
        grads["k"][b, keys] += one.dk()
        grads["v"][b, keys] += one.dv()
        grads["state"][s] = one.dinitial()
        grads["theta"] += one.dtheta()
        if log_decay is not None:
            per_token = one.dlog_decay()  # [n h]
            if log_decay.ndim == 1:
                grads["log_decay"] += per_token.sum(0)
            else:
                grads["log_decay"][b, rows] += per_token
    kv, z = unfold(state, theta is not None, normalize)
    if grads:
        grads["initial_state"] = unfold(grads.pop("state"), theta is not None, normalize)
    return Bounds(o, kv, z, grads)


def far(
    q: Array,
    k: Array,
    v: Array,
    *,
    rounding: Rounding,
    normalize: bool = False,
    eps: float = 1e-6,
    **options: Any,
) -> tuple[Array, State]:
    """Allowed errors of o and the final state in linear time, for causal calls that are too long for `bound`.

    The number of state updates is replaced by its largest value, and Λ·|ln Λ| by √Λ, which it never exceeds.
    Other keywords as `bound`.
    """
    feature_map, theta = options.pop("feature_map", None), options.pop("theta", None)
    start, log_decay = options.pop("initial_state", None), options.pop("log_decay", None)
    scale = options.pop("scale", 1.0)
    wide, d = theta is not None, q.shape[-1]
    values = with_ones(v) if normalize else v
    e = values.shape[-1]
    folded = None
    if start is not None:
        folded = np.stack([fold(start, s, d, wide, e) for s in range(len(start[0]))])
    sizes = abs(feature(q, feature_map)), abs(feature(k, feature_map)), abs(values)

    def absolute(g: Array | None, scale: float, lost: bool = False) -> tuple[Array, Array]:
        x, y, size = map(left_over, sizes) if lost else sizes
        began = None if folded is None else (left_over(folded) if lost else folded, None)
        o, (kv, _) = reference.blockwise(
            x, y, size, block=128, log_decay=g, scale=scale, initial_state=began, **options
        )
        return o, kv

    terms, updates = q.shape[1] + (2 if wide else 1) * d + e, q.shape[1] / rounding.update_every + 1
    o, kv = absolute(log_decay, abs(scale))
    error = o * rounding.factor(terms, updates, 0.0, rounding.u_out)
    state = kv * rounding.factor(terms, updates, 0.0, rounding.u_acc)
    if log_decay is not None:
        slow_o, slow_kv = absolute(log_decay / 2, abs(scale))
        error, state = error + rounding.once * slow_o, state + rounding.once * slow_kv
    # underflow: see `Sequence`
    lost_o, lost_kv = absolute(None, max(1.0, abs(scale)), lost=True)
    error, state = error + rounding.flushed * lost_o, state + rounding.flushed * lost_kv
    if normalize:
        signed = dict(options, feature_map=feature_map, theta=theta, log_decay=log_decay, scale=scale)
        both, _ = reference.blockwise(q, k, values, block=128, initial_state=joined(start), **signed)
        num, den, loss = both[..., :-1], both[..., -1:], error[..., -1:]
        error = (error[..., :-1] + abs(num) / np.maximum(den, eps) * loss) / np.maximum(den - loss, eps)
    return error + rounding.subnormal, unfold(state, wide, normalize)


def _sequences(
    batch: int, n: int, lengths: Array | None, cu_seqlens: Array | None
) -> Iterator[tuple[int, int, int]]:
    if cu_seqlens is not None:
        yield from ((0, int(a), int(b)) for a, b in itertools.pairwise(cu_seqlens))
    else:
        yield from ((b, 0, n if lengths is None else int(lengths[b])) for b in range(batch))
