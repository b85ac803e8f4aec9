"""One sequence's sums with every factor absolute, beside their allowed errors.

Letters in shapes: n query positions, m key positions, h heads, d key features, e value features; NumPy
float64.
"""

from __future__ import annotations

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


def _sigmoid(x: Array) -> Array:
    e = np.exp(-abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


class Sequence:
    """The sums of one sequence, every factor absolute: [h n m] pair weights beside their allowed relative
    errors.
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
        self.terms = wide + v.shape[-1] + max(n, m)
        keep = np.ones(m, bool) if mask is None else mask
        kept = keep[:, None, None]
        safe_k = np.where(kept, k, 0.0)
        self.x = abs(feature(q, feature_map)).swapaxes(0, 1)  # [h n d]
        self.y = np.where(kept, abs(feature(safe_k, feature_map)), 0.0).swapaxes(0, 1)  # [h m d]
        self.v = np.where(kept, abs(v), 0.0).swapaxes(0, 1)  # [h m e]
        self.q_slope = absolute_slope(q, feature_map)
        self.k_slope = np.where(kept, absolute_slope(safe_k, feature_map), 0.0)
        self.w = self.x @ self.y.swapaxes(1, 2)  # [h n m]
        i, j = np.arange(n), np.arange(m)
        lag = i[:, None] - j
        self.lag = abs(lag)
        seen = lag >= 0 if causal else np.ones((n, m), bool)
        heads = q.shape[1]
        g = np.zeros((n, heads)) if log_decay is None else np.broadcast_to(log_decay, (n, heads))
        if causal:
            to, total = _sums(g)  # ln Λ from before the first token to i: [h n]; between tokens: [h n n]
        else:
            head = np.zeros(heads) if log_decay is None else log_decay
            total = np.where(self.lag > 0, _times(head[:, None, None], self.lag), 0.0)
            to = np.zeros((heads, n))
        self.pair = self._weights(total, self.lag, self.scale, seen)
        u_out = rounding.u_out
        self.first = self._weights(to, i + 1, self.scale, True)
        last = total[:, -1, :] if n and causal else np.zeros((heads, m))
        self.last = self._weights(last, n - 1 - j if causal else 0, 1.0, True)
        self.keep = self._weights(last, n - 1 - j if causal else 0, 1.0, True, rounding.u_acc)
        over = to[:, -1] if n else np.zeros(heads)
        self.through = self._weights(over, n, 1.0, True)
        self.carry = self._weights(over, n, 1.0, True, rounding.u_acc)
        self.base = rounding.factor(self.terms, 0.0, 0.0, u_out)

    def _weights(
        self, log_weight: Array, lag: Any, scale: float, seen: Any, u_out: float | None = None
    ) -> tuple[Array, Array]:
        """Λ with its scale, and the same times the allowed relative error.

        Λ may be flushed to zero below the smallest normal number, whatever it is multiplied with afterwards.
        """
        u_out = self.rounding.u_out if u_out is None else u_out
        weight = np.where(seen, scale * np.exp(log_weight), 0.0)
        finite = np.where(weight > 0, -log_weight, 0.0)
        factor = self.rounding.factor(self.terms, lag / self.rounding.update_every + 1, finite, u_out)
        flushed = np.where(seen & (log_weight < 0), scale * self.rounding.flushed, 0.0)
        return weight, weight * factor + flushed

    def columns(self, normalize: bool, start: Array) -> None:
        """Append the normaliser's column of ones to the values; `start` [h d e(+1)] is the folded initial
        state.
        """
        self.start, self.normalize = start, normalize
        if normalize:
            ones = np.ones((*self.v.shape[:-1], 1))
            self.v = np.concatenate([self.v, ones], axis=-1)
        weight, error = self.pair
        from_start = self.x @ start
        self.total = (weight * self.w) @ self.v + self.first[0][..., None] * from_start
        # a numerator may be no normal number, and be divided by eps afterwards
        lost = self.terms * self.rounding.wide_subnormal
        self.error = (error * self.w) @ self.v + self.first[1][..., None] * from_start + lost
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
        sub = self.rounding.wide_subnormal
        kv = (self.y * self.keep[1][..., None]).swapaxes(1, 2) @ self.v
        return kv + self.carry[1][:, None, None] * self.start + sub

    def backward(self, do: Array, dstate: Array) -> None:
        """The absolute gradient of the sum's columns and its allowed error, then the pairs' part in each
        gradient.
        """
        self.dend = dstate
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
        self.grad, self.grad_error = grad, grad_error
        values = self.v.swapaxes(1, 2)
        self.t = self.pair[1] * (grad @ values) + self.pair[0] * (grad_error @ values)  # [h n m]
        start = self.start.swapaxes(1, 2)
        self.x_start = self.first[1][..., None] * (grad @ start) + self.first[0][..., None] * (
            grad_error @ start
        )
        self.y_end = self.last[1][..., None] * (self.v @ dstate.swapaxes(1, 2))

    def dq(self) -> Array:
        return (self.t @ self.y + self.x_start).swapaxes(0, 1) * self.q_slope

    def dk(self) -> Array:
        return (self.t.swapaxes(1, 2) @ self.x + self.y_end).swapaxes(0, 1) * self.k_slope

    def dv(self) -> Array:
        down = (self.pair[1] * self.w).swapaxes(1, 2) @ self.grad
        down = down + (self.pair[0] * self.w).swapaxes(1, 2) @ self.grad_error
        down = down + self.last[1][..., None] * (self.y @ self.dend)
        return down[..., : down.shape[-1] - self.normalize].swapaxes(0, 1)

    def dinitial(self) -> Array:
        x = self.x.swapaxes(1, 2)
        out = (x * self.first[1][:, None]) @ self.grad + (x * self.first[0][:, None]) @ self.grad_error
        return out + self.through[1][:, None, None] * self.dend + self.rounding.wide_subnormal

    def _end(self) -> Array:
        """|C_n| against |dC_n|, per head and feature."""
        kv = (self.y * self.last[1][..., None]).swapaxes(1, 2) @ self.v + self.through[1][
            :, None, None
        ] * self.start
        return (kv * self.dend).sum(-1)

    def dlog_decay(self) -> Array:
        pairs = self.t * self.w
        rows = pairs.sum(2) + (self.x * self.x_start).sum(-1)
        columns = pairs.sum(1) + (self.y * self.y_end).sum(-1)
        if not self.causal:
            return np.full((max(self.n, 1), 1), (self.n + self.m) / max(self.n, 1)) * rows.sum(1)
        suffix = np.cumsum((rows + columns)[:, ::-1], axis=1)[:, ::-1] + self._end().sum(-1)[:, None]
        return suffix.swapaxes(0, 1)

    def dtheta(self) -> Array:
        reach = self.t * (self.lag + ANGLE_BLOCK)
        i, j = np.arange(self.n)[:, None], np.arange(self.m)[:, None]
        out = (self.x * (reach @ self.y + (i + 1 + ANGLE_BLOCK) * self.x_start)).sum(1)
        out = out + (self.y * self.y_end * (self.n + ANGLE_BLOCK - j)).sum(1)
        return 2 * (out + (self.n + ANGLE_BLOCK) * self._end())


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


def with_ones(v: Array) -> Array:
    """The values with the normaliser's column beside them."""
    return np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1)


def joined(state: State | None) -> State | None:
    """A state with z as one more column of kv."""
    if state is None or state[1] is None:
        return state
    return np.concatenate([state[0], state[1][..., None]], axis=-1), None
