"""The backward pass: the adjoint of the blockwise forward, with block states as its only memory.

First the states are formed again, block by block; then the adjoint state runs backwards through the blocks.
Gradients of decays are sums over the pairs that span a token, so nothing cancels and resets give exact zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from linattn.arrays import Array, all_finite, cast, device_name, namespace, zeros_like_kind
from linattn.backends import Gradients, Saved
from linattn.backends.blockwise import factors, twosided
from linattn.backends.blockwise.adjoint import (
    Sums,
    empty_sums,
    times,
    times_each,
    turning_features,
    turning_states,
    write_kv,
    write_q,
)
from linattn.backends.blockwise.causal import (
    Block,
    Carry,
    checked_sums,
    initial,
    load,
    one_way,
    selected,
    written,
)
from linattn.backends.blockwise.tiles import Cut, Tile, cut, on
from linattn.problem import Problem
from linattn.state import State


def backward(problem: Problem, x: Saved, o: Array | None, do: Array, dstate: State | None) -> Gradients:
    """Gradients of every input, from those of o and of the returned state (None stands for zeros)."""
    xp = namespace(problem.kind)
    whole, n, m = problem, problem.n, problem.m
    do = _with_denominator(xp, problem, x, o, do)
    dstart = None
    if not problem.causal and problem.decay is None:
        sums = twosided.gradients(xp, problem, x, do)
    else:
        if not problem.causal:
            problem, x, do = twosided.same_length(xp, problem, x, do)
        ways = [cut(xp, problem, x.lengths, x.cu_seqlens)]
        if not problem.causal:
            ways.append(cut(xp, problem, x.lengths, x.cu_seqlens, reverse=True))
        sums = empty_sums(problem, x, max(way.spare() for way in ways))
        for way in ways:
            dstart = _one_way(xp, way, x, do, dstate, sums, strict=way is not ways[0])
    kv = z = None
    if problem.initial_state and dstart is not None:
        dstart = cast(dstart, problem.accumulate)
        kv, z = (dstart[..., :-1] + 0.0, dstart[..., -1] + 0.0) if problem.normalize else (dstart + 0.0, None)
    decay = None
    if sums.decay is not None:
        decay = sums.decay[:, : problem.n, :, 0]
        decay = decay.sum(1).sum(0) if problem.decay == "head" else decay
    theta = None
    if problem.reweight == "lrpe" and sums.theta is not None:
        theta = cast(sums.theta, problem.accumulate)
    dtype = whole.dtype
    return Gradients(
        cast(sums.q[:, :n], dtype),
        cast(sums.k[:, :m], dtype),
        cast(sums.v[:, :m], dtype),
        decay,
        theta,
        kv,
        z,
    )


def _with_denominator(xp: Any, problem: Problem, x: Saved, o: Array | None, do: Array) -> Array:
    """The gradient of the sums: with z = max(den, eps), dnum = do / z and dden = -(do . o) / z where den >
    eps.
    """
    do = cast(do, problem.accumulate)
    if not problem.normalize:
        return do
    assert o is not None
    narrow = problem.dtype != problem.accumulate  # then o is rounded, and do . o may cancel: form it again
    ones = not narrow
    if problem.causal:
        way = cut(xp, problem, x.lengths, x.cu_seqlens)
        width = problem.e + 1 if narrow else 1
        shape = (problem.batch, problem.n + way.spare(), problem.heads, width)
        whole = zeros_like_kind(x.q, shape, problem.accumulate)
        one_way(xp, way, x, whole, ones=ones, raw=True)
    else:
        whole = twosided.sums(xp, problem, x, ones=ones)
    den = whole[:, : problem.n, :, -1:]
    z = xp.where(den <= problem.eps, problem.eps, den)
    o = whole[:, : problem.n, :, :-1] / z if narrow else cast(o, problem.accumulate)
    dden = xp.where(den > problem.eps, -(do * o).sum(-1)[..., None] / z, 0.0)
    return xp.concatenate((do / z, dden), -1)


def _one_way(
    xp: Any, way: Cut, x: Saved, do: Array, dstate: State | None, sums: Sums, *, strict: bool
) -> Array:
    """Add one direction's gradients to `sums`; return that of the initial state [s h f w]."""
    problem = way.problem
    table = factors.angles(xp, problem, x.theta, way.size, x.q)
    width = problem.e + int(problem.normalize)
    carry = Carry(xp, way, initial(xp, problem, x.state, ones=False), width, x.q)
    before: list[list[Array]] = []  # per tile and block: the state that its queries read
    single = len(way.tiles) == 1  # then the block of the first pass serves the second too
    block = None
    for tile in way.tiles:
        block = load(xp, way, tile, x, table, strict=strict, keys_only=not single, raw=single)
        add = written(xp, block)
        if block.finite and not all_finite(add):
            add = written(xp, replace(block, finite=False))
        seen = carry.through(tile, table, add, block.decays.total)
        before.append(seen)
    adjoint = _Adjoint(xp, way, _final_gradient(xp, problem, dstate), width, x.q)
    for tile, states in zip(reversed(way.tiles), reversed(before), strict=True):
        if not single or block is None:
            block = load(xp, way, tile, x, table, strict=strict, raw=True)
        _tile(
            xp,
            way,
            tile,
            block,
            xp.stack(states, 1),
            way.read(tile, do, problem.accumulate),
            table,
            adjoint,
            sums,
        )
    return adjoint.start()


def _final_gradient(xp: Any, problem: Problem, dstate: State | None) -> Array | None:
    if dstate is None:
        return None
    if not problem.normalize:
        return dstate.kv
    assert dstate.z is not None
    return xp.concatenate((dstate.kv, dstate.z[..., None]), -1)


class _Adjoint:
    """The gradient of the state, on its way back through the blocks."""

    def __init__(self, xp: Any, way: Cut, final: Array | None, width: int, like: Array) -> None:
        problem = way.problem
        self.xp, self.way = xp, way
        self.dtype = "float64" if problem.reweight is not None else problem.accumulate
        rows = problem.sequences if problem.packed else problem.batch
        zeros = factors.zeros(like, problem, rows, width, self.dtype)
        self.final = zeros if final is None else cast(final, self.dtype)
        self.now = self.final if not problem.packed else zeros[:1]
        self.begin = None
        if problem.packed and way.empty is not None:  # a sequence without tokens hands its gradient through
            self.begin = xp.where(way.empty[:, None, None, None], self.final, 0.0)

    def back(
        self, tile: Tile, table: factors.Angles | None, read: Array, total: Array | None
    ) -> tuple[list[Array], list[Array]]:
        """Per block: the gradient of the state after it, and of the rotated state before it."""
        xp, after, rotated = self.xp, [], []
        for g in reversed(range(tile.group.blocks)):
            if tile.sequence is not None:
                self._leave(tile, g)
            after.append(self.now)
            decay = None if total is None else (total if total.ndim == 3 else total[:, g])
            inside = selected(xp, decay, self.now) + read[:, g]
            rotated.append(inside)
            self.now = factors.rotate(xp, table, tile, g, inside, back=True)
            if tile.sequence is not None:
                self._enter(tile, g)
        return after[::-1], rotated[::-1]

    def _leave(self, tile: Tile, g: int) -> None:
        final = self.final[tile.sequence[g : g + 1]]  # type: ignore[index]
        if device_name(tile.last) == "cpu":
            self.now = self.now + final if bool(tile.last[g]) else self.now
        else:
            self.now = self.xp.where(tile.last[g], self.now + final, self.now)

    def _enter(self, tile: Tile, g: int) -> None:
        assert self.begin is not None
        row = tile.sequence[g : g + 1]  # type: ignore[index]
        if device_name(tile.first) == "cpu":
            if bool(tile.first[g]):
                self.begin[row] = self.now
                self.now = self.xp.zeros_like(self.now)
        else:
            self.begin[row] = self.xp.where(tile.first[g], self.now, self.begin[row])
            self.now = self.xp.where(tile.first[g], 0.0, self.now)

    def start(self) -> Array:
        return self.now if self.begin is None else self.begin


def _tile(
    xp: Any,
    way: Cut,
    tile: Tile,
    block: Block,
    before: Array,  # [r g h f w]
    do: Array,  # [r g h c w]
    table: factors.Angles | None,
    adjoint: _Adjoint,
    sums: Sums,
) -> None:
    problem, decays = way.problem, block.decays
    if tile.valid is not None:
        do = xp.where(tile.valid[:, :, None, :, None], do, 0.0)
    block, _, _, weights = checked_sums(xp, block)
    parts = (block.fq, block.fk, block.v, weights, do, before)
    finite = block.finite and all(all_finite(part) for part in parts)
    scaled = selected(xp, decays.to_query, do, finite=finite)  # do, as it reaches the state
    read = times(xp, block.fq.swapaxes(-1, -2), scaled, finite)  # [r g h f w]
    after_list, rotated = adjoint.back(tile, table, read, decays.total)
    after = cast(xp.stack(after_list, 1), problem.accumulate)
    finite = finite and all_finite(after)
    pairs = times(xp, do, block.v.swapaxes(-1, -2), finite)  # [.. i j] do_i . v_j
    dscores = selected(xp, decays.pairs, pairs, finite=finite)
    dv_far = selected(xp, decays.to_end, times(xp, block.fk, after, finite), finite=finite)
    dk_far = selected(xp, decays.to_end, times(xp, block.v, after.swapaxes(-1, -2), finite), finite=finite)
    dq = times(xp, dscores, block.fk, finite) + times(xp, scaled, before.swapaxes(-1, -2), finite)
    dk = times(xp, dscores.swapaxes(-1, -2), block.fq, finite) + dk_far
    dv = times(xp, weights.swapaxes(-1, -2), do, finite) + dv_far
    if sums.decay is not None:
        far = selected(xp, decays.total, before)  # what of the state before outlives the block
        spanning = times_each(xp, far, after, finite).sum(-1).sum(-1)[..., None]
        seen = times(xp, block.fq, before, finite)
        late = times_each(xp, scaled, seen, finite).sum(-1)  # [.. c] from the state to each query
        early = times_each(xp, block.v, dv_far, finite).sum(-1)  # [.. c] from each key past the block
        inside = _spanning(xp, times_each(xp, weights, pairs, finite))
        ddecay = inside + xp.flip(xp.cumsum(xp.flip(late, (-1,)), -1), (-1,)) + _before(xp, early) + spanning
        if tile.valid is not None:
            ddecay = xp.where(tile.valid[:, :, None], ddecay, 0.0)
        way.write(tile, sums.decay, ddecay[..., None], add=True)
    if sums.theta is not None and table is not None:
        counts = (
            tile.counts if isinstance(tile.counts, int) else cast(tile.counts, "float64")[:, :, None, None]
        )
        turned = turning_states(counts, before, xp.stack(rotated, 1))
        turned = turned + turning_features(xp, tile, block.fq, dq) + turning_features(xp, tile, block.fk, dk)
        sums.theta += turned.sum(0).sum(0)
    write_q(xp, way, tile, table, block.q, dq, sums.q)
    write_kv(xp, way, tile, table, block.k, block.keep, dk, dv, sums)


def _before(xp: Any, x: Array) -> Array:
    """Sums over earlier positions, this one left out."""
    sums = xp.cumsum(x, -1)
    return xp.concatenate((xp.zeros_like(x[..., :1]), sums[..., :-1]), -1)


def _spanning(xp: Any, pairs: Array) -> Array:
    """For each token t the sum over pairs with key before t and query at or after t: [.. c c] -> [.. c]."""
    to_end = xp.flip(xp.cumsum(xp.flip(pairs, (-2,)), -2), (-2,))  # over queries >= t
    position = xp.arange(pairs.shape[-1], **on(pairs))
    return xp.where(position[:, None] > position[None, :], to_end, 0.0).sum(-1)
