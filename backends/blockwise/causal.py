"""The forward pass: pairs inside a block, everything before it through the state.

Letters: r rows, g blocks of a group, h heads, c positions of a block, f state features, w value columns
(E, and one of ones if the call normalizes: its column of the result is the denominator).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from linattn import features
from linattn.arrays import Array, all_finite, cast, device_name, dtype_name
from linattn.backends import Saved
from linattn.backends.blockwise import factors
from linattn.backends.blockwise.tiles import Cut, Tile
from linattn.problem import Problem
from linattn.state import State


@dataclass(frozen=True)
class Block:
    """One tile, ready for matrix products."""

    q: Array | None  # [r g h c d] raw, accumulation dtype; only for a backward pass
    k: Array | None
    keep: Array | None  # [r g 1 c 1] bool, keys that exist and are not masked; None: all
    fq: Array  # [r g h c f] scale * phi(q), expanded by the angles; None if only keys are asked for
    fk: Array  # [r g h c f] phi(k), expanded
    v: Array  # [r g h c w]
    finite: bool  # taken to hold no NaN and no infinity, until a result says otherwise; never on a device
    decays: factors.Decays


def queries(xp: Any, way: Cut, tile: Tile, q: Array, table: factors.Angles | None) -> tuple[Array, Array]:
    """Read a tile of q; return it raw, and as scale * phi(q) expanded by the angles."""
    problem, acc = way.problem, way.problem.accumulate
    q = way.read(tile, q, acc)
    if tile.valid is not None:
        q = xp.where(tile.valid[:, :, None, :, None], q, 0.0)
    fq = features.apply(xp, problem.feature_map, q)
    fq = fq * problem.scale if problem.scale != 1.0 else fq
    return q, fq if table is None else factors.expand(xp, way, tile, table, fq)


def keys(
    xp: Any, way: Cut, tile: Tile, x: Saved, table: factors.Angles | None, *, ones: bool = False
) -> tuple[Array, Array | None, Array, Array]:
    """Read a tile of k and v: k raw, which keys count, phi(k) expanded, and v with its column of ones.

    ones: that column alone, to sum the weights.
    """
    problem, acc = way.problem, way.problem.accumulate
    k = way.read(tile, x.k, acc)
    keep = tile.valid
    if x.key_mask is not None:
        mask = way.read_mask(tile, x.key_mask)
        keep = mask if keep is None else keep & mask
    keep = None if keep is None else keep[:, :, None, :, None]
    fk = features.apply(xp, problem.feature_map, k)
    if keep is not None:
        fk = xp.where(keep, fk, 0.0)
    if table is not None:
        fk = factors.expand(xp, way, tile, table, fk)
    if ones:
        return k, keep, fk, xp.ones_like(k[..., :1])
    v = way.read(tile, x.v, acc)
    if keep is not None:
        v = xp.where(keep, v, 0.0)
    if problem.normalize:
        v = xp.concatenate((v, xp.ones_like(v[..., :1])), -1)
    return k, keep, fk, v


def load(
    xp: Any,
    way: Cut,
    tile: Tile,
    x: Saved,
    table: factors.Angles | None,
    *,
    strict: bool,
    ones: bool = False,
    keys_only: bool = False,
    raw: bool = False,
) -> Block:
    """Read a tile whole, or with `keys_only` what the state needs; `raw` keeps q and k as they came."""
    k, keep, fk, v = keys(xp, way, tile, x, table, ones=ones)
    q, fq = (None, None) if keys_only else queries(xp, way, tile, x.q, table)
    on_host = device_name(v) == "cpu"
    decays = factors.decays(xp, way, tile, x.log_decay, k, strict=strict, pairs=not keys_only)
    return Block(q if raw else None, k if raw else None, keep, fq, fk, v, on_host, decays)


def selected(xp: Any, factor: Array | None, x: Array, *, finite: bool = False) -> Array:
    """factor * x, where a factor of 0 drops x whatever it is; for x known to be finite, the product does."""
    if factor is None:
        return x
    return x * factor if finite else xp.where(factor > 0, x * factor, 0.0)


def block_sum(xp: Any, block: Block) -> tuple[Array, Array]:
    """The sum over pairs inside each block [.. c w], and the weights [.. c c]."""
    seen, v = block.decays.pairs, block.v
    scores = block.fq @ block.fk.swapaxes(-1, -2)
    if block.finite:
        scores *= seen
        return scores @ v, scores
    weights = xp.where(seen > 0, scores * seen, 0.0)
    # A value that is not finite may be read only by queries that see its key: 0 * NaN is not 0.
    finite = xp.isfinite(v)
    spoiled = cast(seen > 0, dtype_name(v)) @ cast(~finite, dtype_name(v))
    out = weights @ xp.where(finite, v, 0.0)
    return xp.where(spoiled > 0, float("nan"), out), weights


def written(xp: Any, block: Block) -> Array:
    """What each block adds to the state, in the frame of its last token: [.. f w]."""
    keys, v = block.fk, block.v
    if block.decays.to_end is not None:
        keys = selected(xp, block.decays.to_end, keys, finite=block.finite)
        if not block.finite:
            v = xp.where(block.decays.to_end > 0, v, 0.0)
    return keys.swapaxes(-1, -2) @ v


def checked_sums(xp: Any, block: Block) -> tuple[Block, Array, Array, Array]:
    """The block as it is, what it adds to the state, its inner sums and its weights.

    Products first, as if everything were finite: a NaN or an infinity, also of an overflow, shows in them,
    and they are formed again with care. Rows without any get the same bits either way.
    """
    add, (o, weights) = written(xp, block), block_sum(xp, block)
    if block.finite and not (all_finite(add) and all_finite(o)):
        block = replace(block, finite=False)
        add, (o, weights) = written(xp, block), block_sum(xp, block)
    return block, add, o, weights


def from_state(xp: Any, block: Block, before: Array) -> Array:
    """What each query reads of the state before its block: [.. c w]."""
    factor = block.decays.to_query
    read = block.fq @ before
    if factor is None:
        return read
    if device_name(read) == "cpu" and all_finite(read):
        read *= factor
        return read
    return xp.where(factor > 0, read * factor, 0.0)  # the same bits, but what is forgotten stays forgotten


class Carry:
    """The state on its way through the blocks of a call; float64 where it is rotated, so that phases stay
    exact.
    """

    def __init__(self, xp: Any, way: Cut, start: Array | None, width: int, like: Array) -> None:
        problem = way.problem
        self.xp, self.way = xp, way
        self.dtype = "float64" if problem.reweight is not None else problem.accumulate
        rows = problem.sequences if problem.packed else problem.batch
        first = (
            factors.zeros(like, problem, rows, width, self.dtype)
            if start is None
            else cast(start, self.dtype)
        )
        self.first = first
        self.now = first[:1] if problem.packed else first
        self.final = first + 0.0 if problem.packed else first

    def through(
        self, tile: Tile, table: factors.Angles | None, add: Array, total: Array | None
    ) -> list[Array]:
        """Advance over a tile; return, per block, the state before it seen from its end [r h f w]."""
        xp, seen = self.xp, []
        for g in range(tile.group.blocks):
            if tile.sequence is not None:
                self._enter(tile, g)
            before = factors.rotate(xp, table, tile, g, self.now)
            seen.append(cast(before, self.way.problem.accumulate))
            decay = None if total is None else (total if total.ndim == 3 else total[:, g])
            self.now = selected(xp, decay, before) + add[:, g]
            if tile.sequence is not None:
                self.final[tile.sequence[g : g + 1]] = self.now
        if tile.sequence is None:
            self.final = self.now
        return seen

    def _enter(self, tile: Tile, g: int) -> None:
        start = self.first[tile.sequence[g : g + 1]]  # type: ignore[index]
        if device_name(tile.first) == "cpu":
            self.now = start if bool(tile.first[g]) else self.now
        else:
            self.now = self.xp.where(tile.first[g], start, self.now)


def initial(xp: Any, problem: Problem, state: State | None, *, ones: bool) -> Array | None:
    """The initial state with z as its last column, as values of the same sum: [s h f w]."""
    if state is None:
        return None
    if ones:
        assert state.z is not None
        return state.z[..., None]
    if problem.normalize:
        assert state.z is not None
        return xp.concatenate((state.kv, state.z[..., None]), -1)
    return state.kv


def one_way(
    xp: Any,
    way: Cut,
    x: Saved,
    out: Array,
    *,
    strict: bool = False,
    add: bool = False,
    ones: bool = False,
    raw: bool,
) -> Array:
    """Sum over everything before each token, into `out`; return the final state [s h f w].

    raw: write the sums with all their columns, not yet divided.
    """
    problem = way.problem
    width = 1 if ones else problem.e + int(problem.normalize)
    table = factors.angles(xp, problem, x.theta, way.size, x.q)
    carry = Carry(xp, way, initial(xp, problem, x.state, ones=ones), width, x.q)
    for tile in way.tiles:
        o = _one_tile(xp, way, tile, x, table, carry, strict=strict, ones=ones)
        if not raw:
            o = divide(xp, problem, o)
        if tile.valid is not None:
            o = xp.where(tile.valid[:, :, None, :, None], o, 0.0)
        way.write(tile, out, o, add=add)
        del o  # before the next tile's arrays are made
    return carry.final


def _one_tile(
    xp: Any,
    way: Cut,
    tile: Tile,
    x: Saved,
    table: factors.Angles | None,
    carry: Carry,
    *,
    strict: bool,
    ones: bool,
) -> Array:
    """The sums of one tile's queries [r g h c w]; moves `carry` past it."""
    block = load(xp, way, tile, x, table, strict=strict, ones=ones)
    block, add, o, _ = checked_sums(xp, block)
    seen = carry.through(tile, table, add, block.decays.total)
    del add
    o += from_state(xp, block, seen[0][:, None] if len(seen) == 1 else xp.stack(seen, 1))
    return o


def divide(xp: Any, problem: Problem, sums: Array) -> Array:
    """Numerator over denominator, clamped at eps from below."""
    if not problem.normalize:
        return sums
    den = sums[..., -1:]
    return sums[..., :-1] / xp.where(den <= problem.eps, problem.eps, den)
