"""Reweighting: the cosine of a distance that multiplies the weight of a pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linattn.arrays import Array, kind_of
from linattn.errors import ArgumentTypeError, ShapeError, ValueRangeError


@dataclass(frozen=True)
class Cosine:
    """cosFormer's reweighting, cos(pi / 2 * (i - j) / max_len): near pairs weigh more.

    max_len: at least every length involved, state included. None takes the longer length of the call, as the
    released module does; then outputs depend on the length of the call, so it excludes states and packing.

    Raises ArgumentTypeError unless max_len is an int or None, ValueRangeError below 1 and from 2^62 on.
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791, section 3.3.
    """

    max_len: int | None = None

    def __post_init__(self) -> None:
        if self.max_len is None:
            return
        if isinstance(self.max_len, np.integer):
            object.__setattr__(self, "max_len", int(self.max_len))
        if isinstance(self.max_len, bool) or not (
            isinstance(self.max_len, int) or _is_symbolic(self.max_len)
        ):
            raise ArgumentTypeError(f"Cosine: max_len must be an int or None, got {self.max_len!r}")
        if self.max_len < 1 or self.max_len > LONGEST:
            raise ValueRangeError(f"Cosine: max_len must be at least 1 and below 2^62, got {self.max_len}")


LONGEST = 2**62 - 1


def _is_symbolic(value: object) -> bool:
    """Whether a compiler stands a symbol in for an int."""
    return type(value).__name__ == "SymInt"


class LRPE:
    """Linearized relative positional encoding with decay: cos(theta[h, d] * (i - j)) per head and feature.

    theta: [H, D] angles in radians per token, any finite number; learnable when it is a tensor that requires
    grad. The released module's (H, 1, D) parameter is taken as it is.

    Raises ArgumentTypeError if theta is no array, ShapeError for other shapes.
    Source: Qin et al. 2023, LRPE, https://arxiv.org/abs/2307.09270; TransNormerLLM, arXiv:2307.14995, 3.1.
    """

    def __init__(self, theta: Array) -> None:
        if kind_of(theta) is None:
            raise ArgumentTypeError(f"LRPE: theta must be an array [H, D], got {type(theta).__name__}")
        if theta.ndim != 2 and not (theta.ndim == 3 and theta.shape[1] == 1):
            raise ShapeError(f"LRPE: theta must have shape [H, D], got {tuple(theta.shape)}")
        self._given = theta

    @property
    def theta(self) -> Array:
        """The angles, [H, D]; sliced when they are used, so that gradients reach what was given."""
        return self._given[:, 0] if self._given.ndim == 3 else self._given

    def __repr__(self) -> str:
        return f"LRPE(theta={self._given!r})"

    @staticmethod
    def default_theta(heads: int, features: int) -> np.ndarray:
        """Return the released initial angles, 10000^(-2 (h D + j) / (H D)): float64 [H, D], radians per
        token.

        Raises ArgumentTypeError or ValueRangeError unless both sizes are ints of at least 1.
        Source: `Lrpe` of the released TransNormerLLM code.
        """
        if not all(isinstance(size, (int, np.integer)) for size in (heads, features)):
            raise ArgumentTypeError(f"default_theta: sizes must be ints, got {heads!r} and {features!r}")
        if heads < 1 or features < 1:
            raise ValueRangeError(f"default_theta: both sizes must be at least 1, got {heads} and {features}")
        index = np.arange(heads * features, dtype=np.float64).reshape(heads, features)
        return np.asarray(10000.0 ** (-2.0 * index / (heads * features)))
