"""Calls that are not causal: one state for everybody without decay, a sum from either side with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from linattn.arrays import Array, cast, dtype_name, zeros_like_kind
from linattn.backends import Saved
from linattn.backends.blockwise import factors
from linattn.backends.blockwise.adjoint import (
    Sums,
    empty_sums,
    turning_features,
    turning_states,
    write_kv,
    write_q,
)
from linattn.backends.blockwise.causal import Carry, keys, one_way, queries
from linattn.backends.blockwise.tiles import Cut, Tile, cut
from linattn.problem import Problem


def same_length(xp: Any, problem: Problem, x: Saved, do: Array | None = None) -> tuple[Problem, Saved, Array]:
    """A cross call on one axis: the shorter of q and (k, v) padded, padded keys masked."""
    n = max(problem.n, problem.m)
    if problem.n == problem.m:
        return problem, x, do

    def padded(a: Array) -> Array:
        out = zeros_like_kind(a, (a.shape[0], n, *a.shape[2:]), dtype_name(a))
        out[:, : a.shape[1]] = a
        return out

    mask = x.key_mask
    if problem.m < n:
        mask = xp.ones_like(x.k[:, :, 0, 0], dtype=xp.bool) if mask is None else mask
    mask = None if mask is None else padded(mask)
    x = replace(x, q=padded(x.q), k=padded(x.k), v=padded(x.v), key_mask=mask)
    do = do if do is None else padded(do)
    return replace(problem, n=n, m=n, key_mask=mask is not None), x, do


def _from_both_sides(xp: Any, problem: Problem, x: Saved, *, ones: bool = False) -> Array:
    """The sums of a call that is not causal, [b n h w]: everything up to a token, and everything after it."""
    ways = [cut(xp, problem, x.lengths, x.cu_seqlens, reverse=reverse) for reverse in (False, True)]
    spare = max(way.spare() for way in ways)
    width = 1 if ones else problem.e + int(problem.normalize)
    shape = (problem.batch, problem.n + spare, problem.heads, width)
    sums = zeros_like_kind(x.q, shape, problem.accumulate)
    one_way(xp, ways[0], x, sums, add=True, ones=ones, raw=True)
    one_way(xp, ways[1], x, sums, strict=True, add=True, ones=ones, raw=True)
    return sums[:, : problem.n]


def key_cut(xp: Any, problem: Problem, x: Saved) -> Cut:
    """The blocks of k and v, which may be more or fewer than those of q."""
    return cut(xp, replace(problem, n=problem.m), x.lengths, x.cu_seqlens)


def total(xp: Any, way: Cut, x: Saved, table: factors.Angles | None, *, ones: bool = False) -> Array:
    """The sum over every key, [s h f w], in the frame of the last one."""
    width = 1 if ones else way.problem.e + int(way.problem.normalize)
    carry = Carry(xp, way, None, width, x.k)
    for tile in way.tiles:
        _, _, fk, v = keys(xp, way, tile, x, table, ones=ones)
        carry.through(tile, table, fk.swapaxes(-1, -2) @ v, None)
    return carry.final


def steps(problem: Problem, tile: Tile, frame: int) -> Array:
    """From the end of the other axis (`frame` positions, or the sequence) to each block's."""
    return tile.end - (tile.span if problem.lengths or problem.packed else frame)  # [r g]


def seen_from(xp: Any, table: factors.Angles | None, tile: Tile, moves: Array, state: Array) -> Array:
    """A sum [s h f w] in the frame of each block's last position: [r g h f w], float64 if it is turned."""
    state = state[tile.sequence][None] if tile.sequence is not None else state[:, None]
    if table is None:
        return state
    angle = cast(moves, "float64")[..., None, None] * table.theta  # [r g h d], exact at any distance
    return factors.turned(xp, xp.cos(angle)[..., None], xp.sin(angle)[..., None], state)


def sums(xp: Any, problem: Problem, x: Saved, *, ones: bool = False) -> Array:
    """The sums of a call that is not causal, with all their columns, not yet divided: [b n h w]."""
    if problem.decay is not None:
        same, padded, _ = same_length(xp, problem, x)
        return _from_both_sides(xp, same, padded, ones=ones)[:, : problem.n]
    way = cut(xp, problem, x.lengths, x.cu_seqlens)
    table = factors.angles(xp, problem, x.theta, way.size, x.q)
    state = total(xp, key_cut(xp, problem, x), x, table, ones=ones)
    width = 1 if ones else problem.e + int(problem.normalize)
    out = zeros_like_kind(
        x.q, (problem.batch, problem.n + way.spare(), problem.heads, width), problem.accumulate
    )
    for tile in way.tiles:
        _, fq = queries(xp, way, tile, x.q, table)
        view = seen_from(xp, table, tile, steps(problem, tile, problem.m), state)
        o = fq @ cast(view, problem.accumulate)
        if tile.valid is not None:
            o = xp.where(tile.valid[:, :, None, :, None], o, 0.0)
        way.write(tile, out, o)
    return out[:, : problem.n]


def gradients(xp: Any, problem: Problem, x: Saved, do: Array) -> Sums:
    """Gradients of a call that is not causal and has no decay: one state forwards, one adjoint state back."""
    way, key_way = cut(xp, problem, x.lengths, x.cu_seqlens), key_cut(xp, problem, x)
    out = empty_sums(problem, x, max(way.spare(), key_way.spare()))
    table = factors.angles(xp, problem, x.theta, way.size, x.q)
    acc = problem.accumulate
    state = total(xp, key_way, x, table)
    back = Carry(xp, way, None, do.shape[-1], x.q)
    for tile in way.tiles:
        q, fq = queries(xp, way, tile, x.q, table)
        grad = way.read(tile, do, acc)
        if tile.valid is not None:
            grad = xp.where(tile.valid[:, :, None, :, None], grad, 0.0)
        moves = steps(problem, tile, problem.m)
        view = cast(seen_from(xp, table, tile, moves, state), acc)
        read = fq.swapaxes(-1, -2) @ grad  # the gradient of what this block saw of the state
        back.through(tile, table, read, None)
        dfq = grad @ view.swapaxes(-1, -2)
        if out.theta is not None:
            turned = turning_features(xp, tile, fq, dfq)
            turned = turned + turning_states(cast(moves, "float64")[..., None, None], view, read)
            out.theta += turned.sum(0).sum(0)
        write_q(xp, way, tile, table, q, dfq, out.q)
    for tile in key_way.tiles:
        k, keep, fk, v = keys(xp, key_way, tile, x, table)
        view = cast(seen_from(xp, table, tile, steps(problem, tile, problem.n), back.final), acc)
        dfk, dv = v @ view.swapaxes(-1, -2), fk @ view
        if out.theta is not None:
            moves = cast(steps(problem, tile, problem.m), "float64")[..., None, None]
            turned = turning_features(xp, tile, fk, dfk)
            turned = turned - turning_states(moves, fk.swapaxes(-1, -2) @ v, view)
            out.theta += turned.sum(0).sum(0)
        write_kv(xp, key_way, tile, table, k, keep, dfk, dv, out)
    return out
