"""One sequence's sums with every factor absolute, beside their allowed errors.

Letters in shapes: n query positions, m key positions, h heads, d key features, e value features; NumPy
float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from linattn.arrays import Array

if TYPE_CHECKING:
    from linattn.tolerance import Rounding

State = tuple[Array, Array | None]

ANGLE_BLOCK = 64
"""Positions inside a block: theta's gradient multiplies by them, and they cancel between query and key."""


def feature(x: Array, name: str | None) -> Array:
    """φ(x)."""
    if name is None:
        return x
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "silu":
        return x * _sigmoid(x)
    return np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))


def absolute_slope(x: Array, name: str | None) -> Array:
    """φ'(x) with every factor absolute: silu's has a root, near which only the parts have relative
    accuracy.
    """
    if name is None:
        return np.ones_like(x)
    if name == "relu":
        return (x > 0).astype(np.float64)
    if name == "silu":
        s = _sigmoid(x)
        return s * (1.0 + abs(x) * (1.0 - s))
    return np.where(x > 0, 1.0, np.exp(np.minimum(x, 0.0)))


def _gate_error(x: Array, name: str | None, u: float) -> Array:
    """What φ'(x) of silu is off by where 1 - σ is formed from a rounded σ: that is 1 from x = 16.6 on."""
    return _sigmoid(x) * abs(x) * np.minimum(u, _sigmoid(-x)) if name == "silu" else np.zeros_like(x)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


@dataclass
class _Terms:
    """Sums of terms without signs: what each term is made of, times what stands for its pair of tokens.

    pair [h n m]: query and key; first [h n]: from the initial state; last [h m]: into the final state;
    through [h]: from one to the other. x [h n d], y [h m d], v [h m e], start [h d e]: the factors.
    """

    pair: Array
    first: Array
    last: Array
    through: Array
    x: Array
    y: Array
    v: Array
    start: Array
    w: Array = field(init=False)

    def __post_init__(self) -> None:
        self.w = self.pair * (self.x @ self.y.swapaxes(1, 2))

    def outputs(self) -> Array:
        return self.w @ self.v + self.first[..., None] * (self.x @ self.start)

    def backward(self, grad: Array, dend: Array) -> None:
        """Take the gradient of the outputs [h n e] and of the final state [h d e]."""
        self.grad, self.dend = grad, dend
        self.t = self.pair * (grad @ self.v.swapaxes(1, 2))  # [h n m]
        self.x_start = self.first[..., None] * (grad @ self.start.swapaxes(1, 2))
        self.y_end = self.last[..., None] * (self.v @ dend.swapaxes(1, 2))
        self.dx = self.t @ self.y + self.x_start
        self.dy = self.t.swapaxes(1, 2) @ self.x + self.y_end

    def dv(self) -> Array:
        return self.w.swapaxes(1, 2) @ self.grad + self.last[..., None] * (self.y @ self.dend)

    def dinitial(self) -> Array:
        began = (self.x * self.first[..., None]).swapaxes(1, 2) @ self.grad
        return began + self.through[:, None, None] * self.dend

    def end(self) -> Array:
        """|C_n| against |dC_n|, per head and feature."""
        kv = (self.y * self.last[..., None]).swapaxes(1, 2) @ self.v
        return ((kv + self.through[:, None, None] * self.start) * self.dend).sum(-1)

    def rows(self) -> Array:
        return (self.x * self.dx).sum(-1)  # [h n]

    def columns(self) -> Array:
        return (self.y * self.dy).sum(-1)  # [h m]

    def dtheta(self, lag: Array) -> Array:
        n, m = lag.shape
        i, j = np.arange(n)[:, None], np.arange(m)[:, None]
        reach = (self.t * (lag + ANGLE_BLOCK)) @ self.y
        out = (self.x * (reach + (i + 1 + ANGLE_BLOCK) * self.x_start)).sum(1)
        out = out + (self.y * self.y_end * (n + ANGLE_BLOCK - j)).sum(1)
        return 2 * (out + (n + ANGLE_BLOCK) * self.end())


class Sequence:
    """The sums of one sequence with every factor absolute, and their allowed errors.

    An error is the sum of three: every term times its allowed relative error; in a backward pass every term
    with the error of the gradient that it begins with; and underflow. A product of some of a term's factors
    may be lost below the smallest normal number, and the term's other factors multiply what is lost: that is
    at most this number times 1 + |factor| for each factor, and nothing where a factor is 0.
    """

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        mask: Array | None,
        rounding: Rounding,
        feature_map: str | None,
        causal: bool,
        scale: float,
        wide: int,
    ) -> None:
        self.rounding, self.causal, self.scale = rounding, causal, abs(scale)
        n, m = len(q), len(k)
        self.n, self.m = n, m
        self.count = wide + v.shape[-1] + max(n, m)
        keep = np.ones(m, bool) if mask is None else mask
        kept = keep[:, None, None]
        self.kept = keep[:, None]
        safe_k = np.where(kept, k, 0.0)
        self.x = abs(feature(q, feature_map)).swapaxes(0, 1)  # [h n d]
        self.y = np.where(kept, abs(feature(safe_k, feature_map)), 0.0).swapaxes(0, 1)  # [h m d]
        self.v = np.where(kept, abs(v), 0.0).swapaxes(0, 1)  # [h m e]
        self.slopes = tuple(absolute_slope(x, feature_map).swapaxes(0, 1) for x in (q, safe_k))
        self.gates = tuple(_gate_error(x, feature_map, rounding.once).swapaxes(0, 1) for x in (q, safe_k))
        i, j = np.arange(n), np.arange(m)
        lag = i[:, None] - j
        self.lag = abs(lag)
        self.seen = lag >= 0 if causal else np.ones((n, m), bool)
        heads = q.shape[1]
        g = np.zeros((n, heads)) if log_decay is None else np.broadcast_to(log_decay, (n, heads))
        if causal:
            to, total = _sums(g)  # ln Λ from before the first token to i: [h n]; between tokens: [h n n]
        else:
            head = np.zeros(heads) if log_decay is None else log_decay
            total = np.where(self.lag > 0, _times(head[:, None, None], self.lag), 0.0)
            to = np.zeros((heads, n))
        self.pair = self._weights(total, self.lag, self.scale, self.seen)
        self.first = self._weights(to, i + 1, self.scale, True)
        last = total[:, -1, :] if n and causal else np.zeros((heads, m))
        self.last = self._weights(last, n - 1 - j if causal else 0, 1.0, True)
        self.keep = self._weights(last, n - 1 - j if causal else 0, 1.0, True, rounding.u_acc)
        over = to[:, -1] if n else np.zeros(heads)
        self.through = self._weights(over, n, 1.0, True)
        self.carry = self._weights(over, n, 1.0, True, rounding.u_acc)
        self.base = rounding.factor(self.count, 0.0, 0.0, rounding.u_out)

    def _weights(
        self, log_weight: Array, lag: Any, scale: float, seen: Any, u_out: float | None = None
    ) -> tuple[Array, Array]:
        """Λ with its scale, and the same times the allowed relative error."""
        u_out = self.rounding.u_out if u_out is None else u_out
        weight = np.where(seen, scale * np.exp(log_weight), 0.0)
        finite = np.where(weight > 0, -log_weight, 0.0)
        factor = self.rounding.factor(self.count, lag / self.rounding.update_every + 1, finite, u_out)
        return weight, weight * factor

    def columns(self, normalize: bool, start: Array) -> None:
        """Append the normaliser's column of ones to the values; `start` [h d e(+1)] is the folded initial
        state.
        """
        self.normalize, v = normalize, with_ones(self.v) if normalize else self.v
        heads, rows = self.first[0].shape
        start = np.broadcast_to(start, (heads, *start.shape[1:]))
        factors = self.x, self.y, v, start
        self.size = _Terms(self.pair[0], self.first[0], self.last[0], self.through[0], *factors)
        self.relative = _Terms(self.pair[1], self.first[1], self.last[1], self.through[1], *factors)
        least = self.rounding.flushed
        scaled = max(1.0, self.scale) * least
        self.lost = _Terms(
            np.broadcast_to(np.where(self.seen, scaled, 0.0), self.pair[0].shape),
            np.full((heads, rows), scaled),
            np.full((heads, self.m), least),
            np.full(heads, least),
            *map(left_over, factors),
        )
        self.total = self.size.outputs()
        self.error = self.relative.outputs() + self.lost.outputs()
        self.denominator: Array | None = None

    def normalised(self, num: Array, den: Array, eps: float) -> None:
        den = den.swapaxes(0, 1)  # [h n]
        self.den_error = self.error[..., -1]
        self.denominator = np.maximum(den - self.den_error, eps)  # the smallest that may be divided by
        self.o = abs(num.swapaxes(0, 1)) / np.maximum(den, eps)[..., None]
        self.clamped = den < eps - self.den_error
        self.unsure = abs(den - eps) <= self.den_error

    def outputs(self) -> Array:
        if self.denominator is None:
            return self.error.swapaxes(0, 1)
        error = self.error[..., :-1] + self.o * self.den_error[..., None]
        return (error / self.denominator[..., None]).swapaxes(0, 1)

    def final_state(self) -> Array:
        size, lost = self.size, self.lost
        kv = (size.y * self.keep[1][..., None]).swapaxes(1, 2) @ size.v
        kv = kv + self.carry[1][:, None, None] * size.start
        return kv + self.rounding.flushed * (lost.y.swapaxes(1, 2) @ lost.v + lost.start)

    def backward(self, do: Array, dstate: Array) -> None:
        """Form the absolute gradient of the sum's columns and its allowed error, then the terms' part in
        each gradient.
        """
        grad = abs(do).swapaxes(0, 1)  # [h n e]
        grad_error = np.zeros_like(grad)
        if self.denominator is not None:
            low = self.denominator[..., None]
            loss = self.den_error[..., None] / low
            size = self.total[..., :-1] / low
            size_error = (self.error[..., :-1] + size * self.den_error[..., None]) / low
            grad, grad_error = grad / low, grad / low * loss
            dden = (grad * size).sum(-1, keepdims=True)
            error = (grad * size_error + grad_error * size).sum(-1, keepdims=True) + dden * self.base
            clamped, unsure = self.clamped[..., None], self.unsure[..., None]
            error = np.where(clamped, 0.0, error + np.where(unsure, 2 * dden, 0.0))
            grad = np.concatenate([grad, np.where(clamped, 0.0, dden)], axis=-1)
            grad_error = np.concatenate([grad_error, error], axis=-1)
        dstate = np.broadcast_to(dstate, self.size.start.shape)
        self.size.backward(grad, dstate)
        self.gate = self.size.dx * self.gates[0], self.size.dy * self.gates[1]
        self.size.backward(grad_error, np.zeros_like(dstate))
        self.relative.backward(grad, dstate)
        self.lost.backward(left_over(grad), left_over(dstate))
        self.parts = self.size, self.relative, self.lost

    def dq(self) -> Array:
        return self._through_features(0, [part.dx for part in self.parts])

    def dk(self) -> Array:
        found = self._through_features(1, [part.dy for part in self.parts])
        return np.where(self.kept[..., None], found, 0.0)

    def _through_features(self, which: int, parts: list[Array]) -> Array:
        slope = self.slopes[which]
        inexact, relative, lost = parts
        return ((inexact + relative) * slope + lost * left_over(slope) + self.gate[which]).swapaxes(0, 1)

    def dv(self) -> Array:
        down = sum(part.dv() for part in self.parts)
        return down[..., : down.shape[-1] - self.normalize].swapaxes(0, 1)

    def dinitial(self) -> Array:
        return sum(part.dinitial() for part in self.parts)

    def dlog_decay(self) -> Array:
        rows = sum(part.rows() for part in self.parts)
        if not self.causal:
            return np.full((max(self.n, 1), 1), (self.n + self.m) / max(self.n, 1)) * rows.sum(1)
        both = rows + sum(part.columns() for part in self.parts)
        end = sum(part.end() for part in self.parts).sum(-1)[:, None]
        return (np.cumsum(both[:, ::-1], axis=1)[:, ::-1] + end).swapaxes(0, 1)

    def dtheta(self) -> Array:
        return sum(part.dtheta(self.lag) for part in self.parts)


def _times(log_decay: Array, lag: Array) -> Array:
    return np.where(
        np.isneginf(log_decay) & (lag > 0), -np.inf, np.where(np.isfinite(log_decay), log_decay, 0) * lag
    )


def _sums(g: Array) -> tuple[Array, Array]:
    """ln Λ from before the sequence to each token [h n], and from token j to token i [h n m]; -inf cuts,
    never NaN.
    """
    cut = np.cumsum(np.isneginf(g), axis=0).T
    part = np.cumsum(np.where(np.isneginf(g), 0.0, g), axis=0).T
    to = np.where(cut > 0, -np.inf, part)
    between = np.where(cut[:, :, None] > cut[:, None, :], -np.inf, part[:, :, None] - part[:, None, :])
    return to, np.minimum(between, 0.0)


def fold(state: State | None, s: int, d: int, wide: bool, columns: int) -> Array:
    """|C| + |S| with z as a last column, [h d columns]: the cosine and the sine of an advance replaced by
    1.
    """
    if state is None or state[0] is None:
        return np.zeros((1, d, columns))
    kv, z = state
    full = abs(kv[s]) if z is None else np.concatenate([abs(kv[s]), abs(z[s])[..., None]], axis=-1)
    return full[:, :d] + full[:, d:] if wide else full


def unfold(state: Array, wide: bool, normalize: bool) -> tuple[Array, Array | None]:
    full = np.concatenate([state, state], axis=2) if wide else state
    return (full[..., :-1], full[..., -1]) if normalize else (full, None)


def left_over(x: Array) -> Array:
    """What a factor may multiply a lost product by: itself, or 1 if it is a part of it; 0 if it is 0."""
    return x + (x > 0)


def with_ones(v: Array) -> Array:
    """The values with the normaliser's column beside them."""
    return np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1)


def joined(state: State | None) -> State | None:
    """A state with z as one more column of kv."""
    if state is None or state[1] is None:
        return state
    return np.concatenate([state[0], state[1][..., None]], axis=-1), None
