"""One call, described: every shape and option a backend may ask about, and no data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from linattn.arrays import accumulate_dtype


@dataclass(frozen=True)
class Problem:
    """The facts of one call, checked once (`linattn.checks`) and never recomputed.

    Sizes: batch B, n query positions N, m key positions M, heads H, d key features D, e value features E;
    sequences is the number of states: B, or the number of packed sequences.
    """

    kind: str  # "numpy" | "torch" | "cupy"
    device: str  # "cpu", "cuda:0", …
    dtype: str  # of q, k, v and o
    batch: int
    n: int
    m: int
    heads: int
    d: int
    e: int
    sequences: int
    decay: str | None  # None | "head" | "token"
    reweight: str | None  # None | "cosine" | "lrpe"
    max_len: int | None  # with "cosine": theta = pi / (2 max_len)
    feature_map: str | None
    normalize: bool
    eps: float
    causal: bool
    scale: float
    key_mask: bool
    lengths: bool
    packed: bool  # cu_seqlens given: B = 1, the N axis holds `sequences` sequences
    initial_state: bool
    return_state: bool
    slots: bool
    precision: str  # "ieee" | "tf32"
    batch_invariant: bool
    needs_grad: bool
    strides: tuple[tuple[int, ...], ...]  # of q, k, v, in elements

    @property
    def accumulate(self) -> str:
        """The dtype of sums and states."""
        return accumulate_dtype(self.dtype)

    @property
    def angle(self) -> float:
        """The one angle of "cosine", in radians; 0 for any other reweighting."""
        return math.pi / (2 * self.max_len) if self.reweight == "cosine" and self.max_len else 0.0

    @property
    def f(self) -> int:
        """Features of the state: D, or 2 D with reweighting (cosine part first, then sine)."""
        return self.d if self.reweight is None else 2 * self.d

    def __str__(self) -> str:
        sizes = f"b={self.batch} n={self.n} h={self.heads} d={self.d} e={self.e}"
        if self.m != self.n:
            sizes += f" m={self.m}"
        words = [
            sizes,
            self.dtype,
            f"{self.kind} on {self.device}",
            "causal" if self.causal else "not causal",
        ]
        if self.decay:
            words.append(f"decay per {self.decay}")
        if self.reweight:
            words.append(self.reweight if self.max_len is None else f"cosine(max_len={self.max_len})")
        if self.feature_map:
            words.append(self.feature_map)
        flags = ("normalize", "key_mask", "lengths", "packed", "initial_state", "return_state", "slots")
        words += [flag for flag in (*flags, "batch_invariant", "needs_grad") if getattr(self, flag)]
        if self.precision != "ieee":
            words.append(self.precision)
        return ", ".join(words)
