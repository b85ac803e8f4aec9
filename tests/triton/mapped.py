"""Rows times weights by the formula in float64, and the size of what is added up."""

from __future__ import annotations

from typing import Any

import torch


def exact(x: Any, weights: Any, eps: Any, gate: Any, residual: Any) -> tuple[Any, Any]:
    """What `rows.products` computes, and what its errors scale with: sums of absolute terms."""
    wide = x.double()
    r = 1.0 if eps is None else torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    z = wide * r * (1.0 if gate is None else gate.double())
    made = [z @ w.double().T for w in weights]
    sizes = [abs(z) @ abs(w.double()).T for w in weights]
    y, size = made[0], sizes[0]
    if len(weights) > 1:
        y, size = y * made[1], sizes[0] * abs(made[1]) + sizes[1] * abs(made[0])
    if residual is not None:
        y, size = y + residual.double(), size + abs(residual.double())
    return y, size
