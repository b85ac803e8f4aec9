"""Gradients on their way out: from expanded features back to q, k and theta, gathered per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linattn import features
from linattn.arrays import Array, cast, dtype_name, zeros_like_kind
from linattn.backends import Saved
from linattn.backends.blockwise import factors
from linattn.backends.blockwise.tiles import Cut, Tile
from linattn.problem import Problem


@dataclass
class Sums:
    """Gradients while they are gathered; q, k, v and per-token decay hold one spare row if tiles need it."""

    q: Array
    k: Array
    v: Array
    decay: Array | None  # [b n h] float: per token, summed over tokens at the end for per-head decay
    theta: Array | None  # [h d] or [1 1] float64


def empty_sums(problem: Problem, x: Saved, spare: int) -> Sums:
    def sums(a: Array) -> Array:
        return zeros_like_kind(a, (a.shape[0], a.shape[1] + spare, *a.shape[2:]), problem.accumulate)

    decay = theta = None
    if problem.decay is not None and x.want_log_decay:
        decay = zeros_like_kind(x.q, (problem.batch, problem.n + spare, problem.heads, 1), problem.accumulate)
    if problem.reweight == "lrpe" and x.want_theta:
        theta = zeros_like_kind(x.q, (problem.heads, problem.d), "float64")
    return Sums(sums(x.q), sums(x.k), sums(x.v), decay, theta)


def times(xp: Any, a: Array, b: Array, finite: bool) -> Array:
    """a @ b; where they may not be finite, a factor of 0 drops the other one, NaN included."""
    if finite:
        return a @ b
    dtype = dtype_name(a)
    good_a, good_b = xp.isfinite(a), xp.isfinite(b)
    spoiled = cast(~good_a, dtype) @ cast(b != 0, dtype) + cast(a != 0, dtype) @ cast(~good_b, dtype)
    return xp.where(spoiled > 0, float("nan"), xp.where(good_a, a, 0.0) @ xp.where(good_b, b, 0.0))


def times_each(xp: Any, a: Array, b: Array, finite: bool) -> Array:
    """a * b, elementwise, by the same rule."""
    return a * b if finite else xp.where((a == 0) | (b == 0), 0.0, a * b)


def _contracted(xp: Any, way: Cut, tile: Tile, table: factors.Angles | None, dx: Array) -> Array:
    """From gradients of the expanded features [x cos, x sin] to those of x."""
    if table is None:
        return dx
    cos, sin = factors.expand_tables(xp, way, tile, table, dx)
    d = dx.shape[-1] // 2
    return dx[..., :d] * cos + dx[..., d:] * sin


def write_q(
    xp: Any, way: Cut, tile: Tile, table: factors.Angles | None, q: Array, dfq: Array, out: Array
) -> None:
    """Add the gradient of q [b n h d], from that of scale * phi(q) expanded."""
    problem = way.problem
    dq = (
        _contracted(xp, way, tile, table, dfq)
        * problem.scale
        * features.derivative(xp, problem.feature_map, q)
    )
    if tile.valid is not None:
        dq = xp.where(tile.valid[:, :, None, :, None], dq, 0.0)
    way.write(tile, out, dq, add=True)


def write_kv(
    xp: Any,
    way: Cut,
    tile: Tile,
    table: factors.Angles | None,
    k: Array,
    keep: Array | None,
    dfk: Array,
    dv: Array,
    sums: Sums,
) -> None:
    """Add the gradients of k and v, from those of phi(k) expanded and of v with its column of ones."""
    problem = way.problem
    dk = _contracted(xp, way, tile, table, dfk) * features.derivative(xp, problem.feature_map, k)
    dv = dv[..., : problem.e]
    if keep is not None:
        dk, dv = xp.where(keep, dk, 0.0), xp.where(keep, dv, 0.0)
    way.write(tile, sums.k, dk, add=True)
    way.write(tile, sums.v, dv, add=True)


def turning(x: Array, dx: Array, axis: int) -> Array:
    """The derivative by an angle that turns x = [a, b] into [-b, a], elementwise; halves lie along `axis`."""
    d = x.shape[axis] // 2
    if axis == -1:
        return x[..., :d] * dx[..., d:] - x[..., d:] * dx[..., :d]
    return x[..., :d, :] * dx[..., d:, :] - x[..., d:, :] * dx[..., :d, :]


def turning_features(xp: Any, tile: Tile, x: Array, dx: Array) -> Array:
    """theta's gradient from features whose angle is theta r: float64 [r g h d]."""
    r = cast(factors.from_end(xp, tile, dx), dtype_name(dx))
    r = r[..., None] if r.ndim == 1 else r[:, :, None, :, None]
    return cast((r * turning(x, dx, -1)).sum(-2), "float64")


def turning_states(moves: Any, x: Array, dx: Array) -> Array:
    """theta's gradient from states turned by theta * moves: float64 [r g h d]."""
    return moves * turning(cast(x, "float64"), cast(dx, "float64"), -2).sum(-1)
