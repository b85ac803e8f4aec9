"""The feature maps phi, elementwise, and their derivatives; one code for every kind of array."""

from __future__ import annotations

from typing import Any

from linattn.arrays import Array

FEATURE_MAPS = ("relu", "silu", "elu+1")


def sigmoid(xp: Any, x: Array) -> Array:
    """1 / (1 + e^-x), without overflow on either side."""
    if xp.__name__ == "torch":
        return xp.sigmoid(x)
    small = xp.exp(-abs(x))
    return xp.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def apply(xp: Any, name: str | None, x: Array) -> Array:
    """phi(x), elementwise, in the dtype of `x`."""
    if name is None:
        return x
    if xp.__name__ == "torch" and name in ("relu", "silu"):
        return getattr(xp.nn.functional, name)(x)
    if name == "relu":
        return xp.where(x <= 0, 0.0, x)  # this way round a NaN stays a NaN
    if name == "silu":
        return x * sigmoid(xp, x)
    return xp.where(x > 0, x + 1.0, xp.exp(xp.where(x > 0, 0.0, x)))


def derivative(xp: Any, name: str | None, x: Array) -> Array:
    """phi'(x), elementwise; relu'(0) = 0, as every framework has it."""
    if name == "relu":
        return xp.where(x > 0, 1.0, x * 0.0)
    if name == "silu":
        gate = sigmoid(xp, x)
        return gate * (1.0 + x * (1.0 - gate))
    if name == "elu+1":
        return xp.where(x > 0, 1.0, xp.exp(xp.where(x > 0, 0.0, x)))
    return xp.ones_like(x)
