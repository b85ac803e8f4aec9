"""States in a pool: which row each sequence of a batch works on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from linattn.arrays import Array, cast, dtype_name, kind_of, namespace, readable, zeros_like_kind
from linattn.state import State


class Slots:
    """Which row of a pool each sequence works on; -1 is padding: it begins empty and is never written.

    On a device nothing is looked at: a pool row takes the values of the sequence that names it, or its own.
    """

    def __init__(self, slots: Array, pool: State) -> None:
        self.xp: Any = namespace(kind_of(slots) or "numpy")
        slots = cast(slots, "int64")
        self.real = slots >= 0  # [s]
        self.index = self.xp.clip(slots, 0, max(pool.kv.shape[0] - 1, 0))
        self.on_host = readable(slots)
        if not self.on_host:
            rows = self._count(pool.kv.shape[0], slots)
            match = (slots[None] == rows[:, None]) & self.real[None]  # [pool s]
            self.named = match.any(1)
            self.source = cast(match, "int64").argmax(1)

    def read(self, pool: State) -> State:
        """The named rows, in order; zeros for padding."""

        def rows(x: Array) -> Array:
            if x.shape[0] == 0:  # a pool without rows serves padding only
                return zeros_like_kind(x, (self.real.shape[0], *x.shape[1:]), dtype_name(x))
            real = self.real.reshape(-1, *(1,) * (x.ndim - 1))
            return self.xp.where(real, x[self.index], 0)

        return replace(
            pool, kv=rows(pool.kv), z=None if pool.z is None else rows(pool.z), length=rows(pool.length)
        )

    def write(self, pool: State, new: State) -> None:
        """Put new rows where the old ones came from; unnamed rows keep their bits."""
        pairs: list[tuple[Array, Array]] = [(pool.kv, new.kv), (pool.length, new.length)]
        if pool.z is not None:
            pairs.append((pool.z, new.z))
        for target, values in pairs:
            if self.on_host:
                target[self.index[self.real]] = values[self.real]
            else:
                named = self.named.reshape(-1, *(1,) * (target.ndim - 1))
                target[...] = self.xp.where(named, values[self.source], target)

    def without_padding(self, o: Array, cu_seqlens: Array | None) -> Array:
        """o with the outputs of padding sequences set to 0."""
        real = self.real
        if cu_seqlens is not None:
            xp, token = self.xp, self._count(o.shape[1], o)
            ends = cast(cu_seqlens, "int64")[1:] + 0  # searchsorted of torch warns of strides
            sequence = xp.searchsorted(ends, token, side="right")
            real = real[xp.clip(sequence, 0, real.shape[0] - 1)]  # [n]
            return self.xp.where(real[None, :, None, None], o, 0)
        return self.xp.where(real.reshape(-1, *(1,) * (o.ndim - 1)), o, 0)

    def _count(self, n: int, like: Array) -> Array:
        """0 to n - 1, where another array is."""
        return self.xp.arange(n, **({"device": like.device} if kind_of(like) == "torch" else {}))
