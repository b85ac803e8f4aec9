"""Blocks of a batch as arrays: which tokens they hold, and how to read and write them.

Letters: r rows (batch, or 1 if packed), g blocks of a group, h heads, c positions of a block, then features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from linattn import blocks
from linattn.arrays import Array, cast, device_name, dtype_name, kind_of, to_numpy
from linattn.problem import Problem


@dataclass(frozen=True)
class Tile:
    """The tokens of one group of blocks."""

    group: blocks.Group
    index: Array | None  # packed or reversed: token numbers [r g c]; None: a plain slice
    valid: Array | None  # [r g c] bool; None: every position holds a token
    counts: Array | int  # tokens in each block: one number, or [r g]
    end: Array  # [r g] int, tokens of its sequence up to and with this block
    span: Array | int  # tokens of its sequence: one number, [r 1] or [1 g]
    sequence: Array | None = None  # packed: [g] int64, whose block it is
    first: Any = None  # packed: [g] bool, the block begins its sequence (a NumPy array on the host)
    last: Any = None  # packed: [g] bool, the block ends its sequence


@dataclass(frozen=True)
class Cut:
    """One way through all blocks of a call."""

    xp: Any
    problem: Problem
    size: int
    tiles: tuple[Tile, ...]
    empty: Array | None = None  # packed: [s] bool, sequences without any token
    tables: dict[Any, Any] = field(default_factory=dict)  # factors that blocks of one length share

    def read(self, tile: Tile, x: Array, dtype: str) -> Array:
        """x [b n h *] -> [r g h c *], contiguous, in `dtype`; empty positions repeat some token."""
        g = tile.group
        if tile.index is None:
            part = x[:, g.start : g.start + g.blocks * g.size]
            part = part.reshape(x.shape[0], g.blocks, g.size, *x.shape[2:])
        elif self.problem.packed:
            part = x[0][tile.index]
        else:
            part = x[self.xp.arange(x.shape[0], **on(x))[:, None, None], tile.index]
        part = part.swapaxes(2, 3)
        if kind_of(part) == "torch":
            return cast(part, dtype).contiguous()
        return np.ascontiguousarray(part, dtype=dtype)

    def read_mask(self, tile: Tile, mask: Array) -> Array:
        """mask [b n] -> [r g c]."""
        g = tile.group
        if tile.index is None:
            return mask[:, g.start : g.start + g.blocks * g.size].reshape(-1, g.blocks, g.size)
        if self.problem.packed:
            return mask[0][tile.index]
        return mask[self.xp.arange(mask.shape[0], **on(mask))[:, None, None], tile.index]

    def write(self, tile: Tile, out: Array, values: Array, *, add: bool = False) -> None:
        """values [r g h c *] into out [b n h *]; a packed `out` has one row more, for positions without a
        token.
        """
        g = tile.group
        values = cast(values, dtype_name(out)).swapaxes(2, 3)
        if tile.index is None:
            view = out[:, g.start : g.start + g.blocks * g.size]
            view = view.reshape(out.shape[0], g.blocks, g.size, *out.shape[2:])
            view[...] = view + values if add else values
            return
        target = tile.index
        if tile.valid is not None:
            target = self.xp.where(tile.valid, target, out.shape[1] - 1)
        rows = 0 if self.problem.packed else self.xp.arange(out.shape[0], **on(out))[:, None, None]
        out[rows, target] = out[rows, target] + values if add else values

    def spare(self) -> int:
        """Rows that an output needs beyond N: one, if invalid positions have to be written somewhere."""
        return int(any(tile.index is not None and tile.valid is not None for tile in self.tiles))


def on(x: Array) -> dict[str, Any]:
    """Keyword arguments that put a new array beside `x`."""
    return {"device": x.device} if kind_of(x) == "torch" else {}


def cut(
    xp: Any, problem: Problem, lengths: Array | None, cu_seqlens: Array | None, *, reverse: bool = False
) -> Cut:
    """Cut a call into tiles; `reverse` walks every sequence from its end."""
    size = blocks.block_size(problem)
    per_group = blocks.blocks_per_group(problem, size)
    if problem.packed:
        assert cu_seqlens is not None
        return _packed(xp, problem, cu_seqlens, size, per_group, reverse)
    tiles = tuple(_plain(xp, problem, lengths, size, per_group, reverse))
    return Cut(xp, problem, size, tiles)


def _plain(
    xp: Any, problem: Problem, lengths: Array | None, size: int, per_group: int, reverse: bool
) -> Iterator[Tile]:
    n = problem.n
    where = {} if problem.kind == "numpy" else {"device": problem.device}
    for group in blocks.groups(n, size, per_group):
        start = group.start + xp.arange(group.blocks, **where) * group.size
        if lengths is None:
            index = None
            if reverse:
                index = n - 1 - group.start - xp.arange(group.blocks * group.size, **where)
                index = index.reshape(1, group.blocks, group.size)
            yield Tile(group, index, None, group.size, (start + group.size)[None], n)
            continue
        span = cast(lengths, "int64")[:, None]
        left = span - start[None]
        counts = xp.clip(left, 0, group.size)
        valid = xp.arange(group.size, **where)[None, None] < counts[..., None]
        position = start[None, :, None] + xp.arange(group.size, **where)
        index = None
        if reverse:
            index = xp.clip(span[..., None] - 1 - position, 0, max(n - 1, 0))
        yield Tile(group, index, valid, counts, xp.where(counts > 0, start[None] + counts, span), span)


def _host(xp: Any, problem: Problem, x: np.ndarray) -> Array:
    return x if problem.kind == "numpy" else xp.asarray(x, device=problem.device)


def _packed(xp: Any, problem: Problem, cu_seqlens: Array, size: int, per_group: int, reverse: bool) -> Cut:
    """The block table of a packed batch: on the host exact, on a device of a size that needs no look at the
    data.
    """
    on_host = device_name(cu_seqlens) == "cpu"
    table: Any = np if on_host else xp
    cu = to_numpy(cu_seqlens).astype(np.int64) if on_host else cast(cu_seqlens, "int64")
    span = cu[1:] - cu[:-1]  # [s]
    count = (span + size - 1) // size  # blocks of each sequence
    ends = table.cumsum(count, 0)
    if problem.sequences == 0 or problem.n == 0:
        total = 0
    else:
        total = int(ends[-1]) if on_host else problem.n // size + problem.sequences
    number = table.arange(total, **on(cu))
    sequence = table.searchsorted(ends, number, side="right")
    sequence = table.clip(sequence, 0, max(problem.sequences - 1, 0))
    begin = number - (ends - count)[sequence]  # which block of its sequence
    position = begin[:, None] * size + table.arange(size, **on(cu))  # [g c]
    inside = position < span[sequence][:, None]
    token = span[sequence][:, None] - 1 - position if reverse else position
    index = table.clip(cu[sequence][:, None] + token, 0, max(problem.n - 1, 0))
    counts = table.clip(span[sequence] - begin * size, 0, size)
    first = begin == 0
    last = table.ones_like(first)
    last[:-1] = sequence[1:] != sequence[:-1]
    everything_valid = on_host and bool(inside.all())

    def array(x: Any) -> Array:
        return _host(xp, problem, x) if on_host else x

    tiles = []
    for group in blocks.packed_groups(total, size, per_group):
        part = slice(group.start, group.start + group.blocks)
        tiles.append(
            Tile(
                group,
                array(index[part])[None],
                None if everything_valid else array(inside[part])[None],
                size if everything_valid else array(counts[part])[None],
                array((begin * size + counts)[part])[None],
                array(span[sequence][part])[None],
                array(sequence[part]),
                first[part],
                last[part],
            )
        )
    return Cut(xp, problem, size, tuple(tiles), array(count == 0))
