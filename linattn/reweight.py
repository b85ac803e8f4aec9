"""Reweighting: the cosine of a distance that multiplies the weight of a pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linattn.arrays import Array, kind_of
from linattn.errors import ArgumentTypeError, ShapeError, ValueRangeError


@dataclass(frozen=True)
class Cosine:
    """cosFormer's reweighting, cos(pi / 2 * (i - j) / max_len): near pairs weigh more, none weighs less than
    0.

    max_len: at least every length involved, state included. None takes the longer length of the call, as the
    released module does; then outputs depend on the length of the call, so it excludes states and packing.

    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791, section 3.3.
    """

    max_len: int | None = None

    def __post_init__(self) -> None:
        if (
            self.max_len is None or type(self.max_len) is int
        ):  # the common case first: also traced by compilers
            pass
        elif isinstance(self.max_len, np.integer):
            object.__setattr__(self, "max_len", int(self.max_len))
        elif isinstance(self.max_len, (bool, float, str, bytes)) or not hasattr(self.max_len, "__index__"):
            raise ArgumentTypeError(f"Cosine: max_len must be an int or None, got {self.max_len!r}")
        if self.max_len is not None and self.max_len < 1:
            raise ValueRangeError(f"Cosine: max_len must be at least 1, got {self.max_len}")


@dataclass(frozen=True, eq=False)
class LRPE:
    """Linearized relative positional encoding with decay: cos(theta[h, d] * (i - j)) per head and feature.

    theta: [H, D] angles in radians per token, any finite number; learnable when it is a tensor that requires
    grad. The released module's (H, 1, D) parameter is taken as it is.

    Source: Qin et al. 2023, LRPE, https://arxiv.org/abs/2307.09270; TransNormerLLM, arXiv:2307.14995, section
    3.1.
    """

    theta: Array

    def __post_init__(self) -> None:
        if kind_of(self.theta) is None:
            raise ArgumentTypeError(f"LRPE: theta must be an array [H, D], got {type(self.theta).__name__}")
        if self.theta.ndim == 3 and self.theta.shape[1] == 1:
            object.__setattr__(self, "theta", self.theta[:, 0])
        if self.theta.ndim != 2:
            raise ShapeError(f"LRPE: theta must have shape [H, D], got {tuple(self.theta.shape)}")

    @staticmethod
    def default_theta(heads: int, features: int) -> np.ndarray:
        """Return the released initial angles, 10000^(-2 (h D + j) / (H D)): float64 [H, D], radians per
        token.

        Raises ValueRangeError unless both sizes are at least 1.
        Source: `Lrpe` of the released TransNormerLLM code.
        """
        if heads < 1 or features < 1:
            raise ValueRangeError(f"default_theta: both sizes must be at least 1, got {heads} and {features}")
        index = np.arange(heads * features, dtype=np.float64).reshape(heads, features)
        return np.asarray(10000.0 ** (-2.0 * index / (heads * features)))
