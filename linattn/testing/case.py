"""One problem with its inputs: everything follows from its fields and a seed, so it can be pasted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from linattn.arrays import Array

RATES = (0.0, 1e-3, 0.1, 1.0, 20.0, 60.0, math.inf, 3e-5, 95.0)
"""Decays worth trying, as -ln λ: none, slow, fast, gone in a few tokens, a reset, a reset to the last bit; as
slow as tables of deep models have them, and one whose λ is no normal number in float32.
"""

HALF_RANGE = 3.0e4
"""Sums in float16 stay below this; its largest number is 65504."""

LOWEST = -20.0
"""silu and elu+1 are within 5e-8 of 0 here. Further down an exponential that is right to the last bit of its
argument has no relative accuracy left.
"""

NOTHING = {"float32": -150.0, "float64": -1000.0}
"""At and below this they are 0, and their exponentials 0 or infinite, in a call that accumulates so."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of `linattn.attention`, by its options, its sizes and the seed that its arrays are drawn from.

    rates: the -ln λ that heads or tokens draw theirs from. m: key positions of a cross call (None: as many
    as queries).
    values: the largest |q|, |k|, |v|. state: starts from an initial state. sequences: how many a packed call
    holds.
    layout: how arrays lie in memory, "plain", "strided" or "offset".
    """

    feature_map: str | None = None
    normalize: bool = False
    eps: float = 1e-6
    causal: bool = True
    decay: str | None = None
    reweight: str | None = None
    scale: float = 1.0
    key_mask: bool = False
    lengths: bool = False
    packed: bool = False
    state: bool = False
    batch: int = 1
    n: int = 5
    m: int | None = None
    heads: int = 1
    d: int = 3
    e: int = 2
    sequences: int = 2
    rates: tuple[float, ...] = (0.1,)
    values: float = 8.0
    dtype: str = "float32"
    layout: str = "plain"
    precision: str = "ieee"
    seed: int = 0

    def __repr__(self) -> str:
        """Only what differs from the defaults; `inf` is spelt so that it can be pasted."""
        said = (f for f in fields(self) if getattr(self, f.name) != f.default)
        text = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in said)
        return f"Case({text})".replace("inf", "float('inf')")

    def replace(self, **changes: Any) -> Case:
        """The same case with other fields."""
        return replace(self, **changes)

    @property
    def accumulate(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def keys(self) -> int:
        return self.n if self.m is None else self.m

    def inputs(self) -> Inputs:
        """Draw the arrays: float64, but every number one that the case's dtype holds."""
        return _draw(self)


@dataclass(frozen=True)
class Inputs:
    """The arrays of one call, in the shapes of `linattn.attention`, NumPy float64 (the form that the
    reference takes); a backend gets converted copies.

    state is (kv, z, length); do and dstate are the gradients that a backward pass starts from. max_len is
    Cosine's.
    """

    case: Case
    q: Array
    k: Array
    v: Array
    log_decay: Array | None = None
    theta: Array | None = None
    max_len: int | None = None
    key_mask: Array | None = None
    lengths: Array | None = None
    cu_seqlens: Array | None = None
    state: tuple[Array, Array | None, Array] | None = None
    do: Array | None = None
    dstate: tuple[Array, Array | None] | None = field(default=None)

    def replace(self, **changes: Any) -> Inputs:
        """The same call with other arrays, or (by the fields of Case) with other options."""
        own = {f.name for f in fields(self)}
        case = {name: changes.pop(name) for name in list(changes) if name not in own}
        return replace(self, case=self.case.replace(**case), **changes) if case else replace(self, **changes)

    def options(self) -> dict[str, Any]:
        """The keywords that `linattn.reference` and `linattn.tolerance` share; the angles of a cosine are a
        theta.
        """
        case = self.case
        theta = self.theta
        if case.reweight == "cosine":
            theta = np.full((case.heads, case.d), math.pi / (2 * (self.max_len or max(case.n, case.keys, 1))))
        return {
            "log_decay": self.log_decay,
            "theta": theta,
            "feature_map": case.feature_map,
            "normalize": case.normalize,
            "eps": case.eps,
            "causal": case.causal,
            "scale": case.scale,
            "key_mask": self.key_mask,
            "lengths": self.lengths,
            "cu_seqlens": self.cu_seqlens,
            "initial_state": None if self.state is None else self.state[:2],
        }

    def tokens(self, begin: int, end: int) -> Inputs:
        """Tokens [begin, end) of a call without lengths or borders, with everything that goes along the N
        axis.
        """
        rows = slice(begin, end)
        g, mask, do = self.log_decay, self.key_mask, self.do
        return self.replace(
            q=self.q[:, rows],
            k=self.k[:, rows],
            v=self.v[:, rows],
            log_decay=g if g is None or g.ndim == 1 else g[:, rows],
            key_mask=None if mask is None else mask[:, rows],
            do=None if do is None else do[:, rows],
            n=end - begin,
        )

    def sequence(self, b: int) -> Inputs:
        """Batch row b as a call of its own (its state too)."""
        row = slice(b, b + 1)
        g, mask, state = self.log_decay, self.key_mask, self.state
        return self.replace(
            q=self.q[row],
            k=self.k[row],
            v=self.v[row],
            log_decay=g if g is None or g.ndim == 1 else g[row],
            key_mask=None if mask is None else mask[row],
            lengths=None if self.lengths is None else self.lengths[row],
            state=None
            if state is None
            else (state[0][row], state[1] if state[1] is None else state[1][row], state[2][row]),
            do=None if self.do is None else self.do[row],
            batch=1,
        )


def rounded(x: Array, dtype: str) -> Array:
    """x with every number rounded to one that `dtype` holds, as float64. NumPy has no bfloat16, so bits do
    it.
    """
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return np.asarray(x).astype(dtype).astype(np.float64)


def _values(rng: np.random.Generator, shape: tuple[int, ...], largest: float, dtype: str) -> Array:
    """Values of several magnitudes up to ±largest, the largest itself among them, and rows that are 0."""
    x = rng.uniform(-largest, largest, shape) * rng.choice([1.0, 1.0, 0.3, 0.01], shape)
    x = np.where(rng.random(shape) < 0.05, np.sign(x) * largest, x)
    zero = rng.random(shape[:-1]) < 0.08
    return rounded(np.where(zero[..., None], 0.0, x), dtype)


def _draw(case: Case) -> Inputs:
    rng = np.random.default_rng(case.seed)
    n, m, heads, d, e = case.n, case.keys, case.heads, case.d, case.e
    batch = 1 if case.packed else case.batch
    largest = case.values
    if case.dtype == "float16":
        # sums of products of three values must stay inside the format
        largest = min(
            largest, (HALF_RANGE / (max(n, m, 1) * max(d, e) * max(abs(case.scale), 1.0))) ** (1 / 3)
        )
    q = _values(rng, (batch, n, heads, d), largest, case.dtype)
    k = _values(rng, (batch, m, heads, d), largest, case.dtype)
    if case.feature_map in ("silu", "elu+1"):
        q, k = (np.where((x < LOWEST) & (x > NOTHING[case.accumulate]), -x, x) for x in (q, k))
    v = _values(rng, (batch, m, heads, e), largest, case.dtype)
    do = _values(rng, (batch, n, heads, e), largest, case.dtype)
    borders = lengths = mask = None
    if case.packed:
        inner = np.sort(rng.integers(0, n + 1, case.sequences - 1))
        borders = np.concatenate([[0], inner, [n]]).astype(np.int64)
    elif case.lengths:
        lengths = np.concatenate([[n], rng.integers(0, n + 1, batch)])[rng.permutation(batch + 1)[:batch]]
    if case.key_mask:
        mask = rng.random((batch, m)) < 0.7
        if case.seed % 2:  # rows padded on the left: blocks without any key
            mask &= np.arange(m) >= rng.integers(0, m + 1, (batch, 1))
    count = case.sequences if case.packed else batch
    log_decay = None
    if case.decay is not None:
        shape = (heads,) if case.decay == "head" else (batch, n, heads)
        log_decay = rounded(-rng.choice(case.rates, shape), case.accumulate) + 0.0
    wide = d if case.reweight is None else 2 * d
    length = rng.integers(0, 50, count) if case.state else np.zeros(count, np.int64)
    theta = max_len = None
    if case.reweight == "lrpe":
        theta = _angles(rng, heads, d)
    elif case.reweight == "cosine":
        max_len = int(max(n, m, 1) + length.max(initial=0) + rng.integers(0, 9))
    state = None
    if case.state:
        state = (*_state(rng, (count, heads, wide), e, case, largest), length.astype(np.int64))
    dstate = _state(rng, (count, heads, wide), e, case, largest) if case.causal else None
    return Inputs(case, q, k, v, log_decay, theta, max_len, mask, lengths, borders, state, do, dstate)


def _angles(rng: np.random.Generator, heads: int, d: int) -> Array:
    """Angles as released tables have them, any on the circle, 0, and a few far outside it."""
    usual = 10000.0 ** (-2 * (np.arange(heads * d) / (heads * d))).reshape(heads, d)
    any_angle = rng.uniform(-math.pi, math.pi, (heads, d))
    kind = rng.random((heads, d))
    theta = np.where(
        kind < 0.4, usual, np.where(kind < 0.8, any_angle, np.where(kind < 0.9, 0.0, any_angle * 20))
    )
    return rounded(theta, "float32")


def _state(
    rng: np.random.Generator, shape: tuple[int, int, int], e: int, case: Case, largest: float
) -> tuple[Array, Array | None]:
    kv = rounded(rng.uniform(-largest, largest, (*shape, e)), case.accumulate)
    return kv, (rounded(rng.uniform(0, largest, shape), case.accumulate) if case.normalize else None)
