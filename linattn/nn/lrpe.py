"""The learnable angles of LRPE with decay, under the released parameter's name and shape."""

from __future__ import annotations

import torch
from torch import nn

from linattn.reweight import LRPE


class Lrpe(nn.Module):
    """Holds theta [H, 1, D], one angle in radians per token for each head and feature.

    Calling it gives the `linattn.LRPE` to pass as `reweight=`. It never sees a position: the attention works
    with distances, so there is no offset to keep, to forget to reset, or to round to bfloat16.

    theta starts as `linattn.LRPE.default_theta(H, D)` and keeps the released shape, so that the state-dict
    entry `token_mixer.lrpe.theta` loads as it is. A module cast to a half precision rounds its angles once;
    they are widened to float32 before use.

    Source: `Lrpe` of the released TransNormerLLM code; LRPE, https://arxiv.org/abs/2307.09270.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.theta = nn.Parameter(self.default().to(device_of_new(), torch.get_default_dtype()))

    def reset_parameters(self) -> None:
        """Write the angles to begin with again, as materializing from the meta device asks for."""
        with torch.no_grad():
            self.theta.copy_(self.default())

    def default(self) -> torch.Tensor:
        """The angles to begin with, float64 [H, 1, D]."""
        return torch.from_numpy(LRPE.default_theta(self.num_heads, self.head_dim))[:, None]

    def forward(self) -> LRPE:
        """Return the reweighting of these angles; gradients reach theta through it."""
        theta = self.theta if self.theta.dtype in (torch.float32, torch.float64) else self.theta.float()
        return LRPE(theta[:, 0])


def device_of_new() -> torch.device:
    """Where torch makes new tensors, which those that come from NumPy do not ask for."""
    return torch.empty(0).device
