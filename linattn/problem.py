"""One call, described: every shape and option a backend may ask about, and no data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from linattn.arrays import accumulate_dtype


@dataclass(frozen=True)
class Problem:
    """The facts of one call, checked once (`linattn.checks`) and never recomputed; none of its data.

    q is [B, N, H, D], k [B, M, H, D], v [B, M, H, E], o [B, N, H, E]. `str(problem)` is one line.

    kind: "numpy", "torch" or "cupy". device: "cpu", or "cuda:0" and so on. dtype: of q, k, v and o, by name.
    batch: B. n: query positions N. m: key positions M; N if causal. heads: H. d: key features D. e: value
    features E. sequences: S, the number of states: B, or that of the packed sequences.
    decay: None, "head" (log_decay [H]) or "token" ([B, N, H]). reweight: None, "cosine" or "lrpe".
    max_len: of "cosine", M in theta = pi / (2 M); None otherwise. feature_map: None, "relu", "silu" or
    "elu+1". normalize, eps, causal, scale, precision, batch_invariant: as `linattn.attention` takes them.
    key_mask, lengths, initial_state, slots: whether the call has them. packed: whether it has cu_seqlens;
    then B = 1, and N holds S sequences. return_state: whether the final state is asked for. needs_grad:
    whether gradients may be. strides: of q, k and v, in elements.
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
        """The dtype of sums and states, by name: "float64" for float64 calls, else "float32"."""
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
