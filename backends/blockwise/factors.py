"""The factors of a block: decays between its positions and its ends, and rotations by its angles.

Positions of a block are counted from its end: r = counts - 1 - position, so that features written into the
state are in the frame of the block's last token, as the state is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linattn.arrays import Array, cast, zeros_like_kind
from linattn.backends.blockwise.tiles import Cut, Tile, on
from linattn.problem import Problem


@dataclass(frozen=True)
class Decays:
    """Decay factors of one tile; None stands for 1. Zeros select: what they multiply is dropped, NaN
    included.
    """

    pairs: Array  # [.. h c c] from key to query; without decay just the mask, as 0 and 1; None: not asked for
    to_query: Array | None  # [.. h c 1] from the block's start (that token's decay included) to a query
    to_end: Array | None  # [.. h c 1] from a key to the block's last token
    total: Array | None  # [.. h 1 1] over the whole block


@dataclass(frozen=True)
class Angles:
    """cos and sin of theta * m for m = 0 … size, as float64 [m h d] (h and d may be 1)."""

    cos: Array
    sin: Array
    theta: Array | float

    def at(self, xp: Any, m: Array | int) -> tuple[Array, Array]:
        """cos and sin at integer multiples m (an index array, or one number)."""
        return self.cos[m], self.sin[m]


def angles(xp: Any, problem: Problem, theta: Array | None, size: int, like: Array) -> Angles | None:
    """The rotations of a call, exact: float64 angles times integers up to a block's size."""
    if problem.reweight is None:
        return None
    steps = cast(xp.arange(size + 1, **on(like)), "float64")[:, None, None]
    if problem.reweight == "cosine":
        one: Array | float = problem.angle
        phase = steps * one
    else:
        assert theta is not None
        one = cast(theta, "float64")
        phase = steps * one[None]
    return Angles(xp.cos(phase), xp.sin(phase), one)


def _log_power(xp: Any, decay: Array, steps: Array) -> Array:
    """steps * decay, where 0 steps of an infinite decay are 0."""
    return xp.where(steps > 0, xp.where(steps > 0, steps, 1) * decay, 0.0)


def decays(
    xp: Any, cut: Cut, tile: Tile, log_decay: Array | None, like: Array, *, strict: bool, pairs: bool = True
) -> Decays:
    """The factors of one tile. `strict` leaves a query's own token out: half of a two-sided sum.

    pairs=False forms only what the state needs.
    """
    shared = cut.problem.decay != "token" and isinstance(tile.counts, int)
    key = ("decays", tile.group.size, strict, pairs)
    if shared and key in cut.tables:
        kept: Decays = cut.tables[key]
        return kept
    position = xp.arange(tile.group.size, **on(like))
    lag = position[:, None] - position[None, :]
    seen = lag > 0 if strict else lag >= 0
    acc = cut.problem.accumulate
    if log_decay is None:
        result = Decays(cast(seen, acc) if pairs else None, None, None, None)
    elif cut.problem.decay == "head":
        wide = cut.problem.reweight is not None  # then the state is carried in float64
        result = _per_head(xp, tile, cast(log_decay, "float64"), acc, wide, seen, pairs)
    else:
        result = _per_token(xp, cut, tile, log_decay, seen, acc, pairs)
    if shared:
        cut.tables[key] = result
    return result


def _per_head(
    xp: Any, tile: Tile, decay: Array, acc: str, wide: bool, seen: Array, with_pairs: bool
) -> Decays:
    c = tile.group.size
    position = xp.arange(c, **on(decay))
    lag = position[:, None] - position[None, :]
    steps = xp.arange(c + 1, **on(decay))
    exact = xp.exp(_log_power(xp, decay[None, :], steps[:, None]))  # [m h], float64
    power = cast(exact, acc)
    whole = exact if wide else power
    pairs = None
    if with_pairs:
        lagged = _log_power(xp, decay[:, None, None], xp.where(seen, lag, 0))
        pairs = cast(xp.where(seen, xp.exp(lagged), 0.0), acc)  # [h c c]
    to_query = power[1:].swapaxes(0, 1)[..., None]  # [h c 1]
    if isinstance(tile.counts, int):
        to_end = xp.flip(power[: tile.counts], (0,)).swapaxes(0, 1)[..., None]
        return Decays(pairs, to_query, to_end, whole[tile.counts][:, None, None])
    rest = xp.clip(tile.counts[..., None] - 1 - position, 0, c)  # [r g c]
    to_end = power[rest].swapaxes(-1, -2)[..., None]  # [r g h c 1]
    return Decays(pairs, to_query, to_end, whole[tile.counts][..., None, None])


# ln of a factor that is 0 in the dtype, and the grid on which sums of a block's decays down to it are exact.
FIXED_POINT = {"float32": (-128.0, 2.0**10), "float64": (-800.0, 2.0**22)}


def _per_token(
    xp: Any, cut: Cut, tile: Tile, log_decay: Array, seen: Array, acc: str, with_pairs: bool
) -> Decays:
    """Sums of log decays between any two positions of a block, with one rounding however many there are.

    A decay is split into a multiple of a power of two, whose sums and their differences are exact, and a
    rest so small that its rounding does not show. Below the smallest number a factor is 0, so -inf needs no
    sum of its own.
    """
    step = cut.read(tile, log_decay[..., None], acc)[..., 0]  # [r g h c]
    if tile.valid is not None:
        step = xp.where(tile.valid[:, :, None], step, 0.0)
    lowest, grid = FIXED_POINT[acc]
    step = xp.clip(step, lowest, 0.0)
    coarse = xp.round(step * grid) / grid
    coarse, fine = xp.cumsum(coarse, -1), xp.cumsum(step - coarse, -1)

    pairs = None
    if with_pairs:
        between = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
        pairs = xp.exp(xp.where(seen, between, lowest))  # [r g h i j]; `lowest` gives 0
    to_query = xp.exp(coarse + fine)[..., None]
    to_end = xp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))[..., None]
    return Decays(pairs, to_query, to_end, to_query[..., -1:, :])


def from_end(xp: Any, tile: Tile, like: Array) -> Array:
    """r = counts - 1 - position, at least 0: [c], or [r g c] where blocks differ."""
    position = xp.arange(tile.group.size, **on(like))
    if isinstance(tile.counts, int):
        return tile.counts - 1 - position
    return xp.clip(tile.counts[..., None] - 1 - position, 0, tile.group.size)


def expand(xp: Any, cut: Cut, tile: Tile, table: Angles, x: Array) -> Array:
    """Features [r g h c d] times cosine and sine of their angles: [r g h c 2 d]."""
    cos, sin = expand_tables(xp, cut, tile, table, x)
    return xp.concatenate((x * cos, x * sin), -1)


def expand_tables(xp: Any, cut: Cut, tile: Tile, table: Angles, like: Array) -> tuple[Array, Array]:
    """cos and sin for each position of a tile, in the accumulation dtype: [h c d] or [r g h c d]."""
    key = ("angles", tile.counts) if isinstance(tile.counts, int) else None
    if key is None or key not in cut.tables:
        both = table.at(xp, from_end(xp, tile, like))
        cos, sin = (cast(x, cut.problem.accumulate).swapaxes(-3, -2) for x in both)
        if key is None:
            return cos, sin
        cut.tables[key] = cos, sin
    kept: tuple[Array, Array] = cut.tables[key]
    return kept


def rotate(xp: Any, table: Angles | None, tile: Tile, g: int, state: Array, *, back: bool = False) -> Array:
    """A state [r h f e] seen from the end of block g, decay left aside; `back` is the transposed rotation."""
    if table is None:
        return state
    counts = tile.counts if isinstance(tile.counts, int) else tile.counts[:, g]
    cos, sin = table.at(xp, counts)  # [h d] or [r h d]
    return turned(xp, cos[..., None], sin[..., None] * (-1.0 if back else 1.0), state)


def turned(xp: Any, cos: Array, sin: Array, state: Array) -> Array:
    """A state's cosine and sine parts [.. f w], turned by an angle."""
    half = state.shape[-2] // 2
    cosine, sine = state[..., :half, :], state[..., half:, :]
    first, second = cos * cosine, sin * cosine
    first -= sin * sine
    second += cos * sine
    return xp.concatenate((first, second), -2)


def zeros(like: Array, problem: Problem, rows: int, width: int, dtype: str) -> Array:
    """States of zeros [r h f width]."""
    return zeros_like_kind(like, (rows, problem.heads, problem.f, width), dtype)
