"""SimpleRMSNorm: divide by the root mean square, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis: no weight, no bias, no mean taken off.

    Computed in float32 (float64 for float64) and returned in the dtype of x. The released module is given the
    width and never uses it; here none is asked for.

    Source: TransNormerLLM, arXiv:2307.14995, section 3.4; eps inside the root as in the released
    `SimpleRMSNorm`.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[torch.Tensor, "... e"]) -> Float[torch.Tensor, "... e"]:
        """Return x with every row scaled to a root mean square of (almost) 1."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Show eps when the module is printed."""
        return f"eps={self.eps}"
