"""The learnable angles of LRPE with decay, under the released parameter's name and shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from linattn.nn.norm import unseen
from linattn.reweight import LRPE

HALF = (
    "LRPE's angles are rounded to {}: their cosine is off, the more the longer a text is; keep them float32 "
    "(FSDP: fully_shard each linattn.nn.Lrpe by itself, without a param_dtype, before what holds it)"
)


class Lrpe(nn.Module):
    """Holds theta [H, 1, D], one angle in radians per token for each head and feature.

    Calling it gives the `linattn.LRPE` to pass as `reweight=`. It never sees a position: the attention works
    with distances, so there is no offset to keep, to forget to reset, or to round to bfloat16.

    theta starts as `linattn.LRPE.default_theta(H, D)` and keeps the released shape, so that the state-dict
    entry `token_mixer.lrpe.theta` loads as it is. Angles are float32 or wider: a cast of the module to a half
    precision (`half`, `bfloat16`, `to`) leaves them float32, as cos(theta * distance) would be off by 0.18 at
    distance 100 with angles in bfloat16. Those that something else puts there in a half precision are widened
    before use, with a warning. FSDP's mixed precision does that: shard these modules by themselves, without
    a param_dtype.

    Source: `Lrpe` of the released TransNormerLLM code; LRPE, https://arxiv.org/abs/2307.09270.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.theta = nn.Parameter(self.default().to(device_of_new(), wide))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What moves and casts the module: angles, and their gradients, go along, and stay wide."""

        def kept(x: torch.Tensor) -> torch.Tensor:
            y = fn(x)
            if not _is_half(y) or _is_half(x):
                return y
            return x.detach().to(y.device, torch.float32)

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Write the angles to begin with again, as materializing from the meta device asks for."""
        with torch.no_grad():
            self.theta.copy_(self.default())

    def default(self) -> torch.Tensor:
        """The angles to begin with, float64 [H, 1, D]."""
        return torch.from_numpy(LRPE.default_theta(self.num_heads, self.head_dim))[:, None]

    def forward(self) -> LRPE:
        """Return the reweighting of these angles; gradients reach theta through it."""
        theta = self.theta[:, 0]
        if _is_half(theta):
            if not torch.compiler.is_compiling():
                warnings.warn(HALF.format(str(theta.dtype).removeprefix("torch.")), stacklevel=2)
            return LRPE(theta.float())
        owned = type(self.theta) is nn.Parameter and unseen(self) and not torch.compiler.is_compiling()
        return LRPE(theta if owned else theta.clone())  # FSDP frees what it gathered once this has returned


def _is_half(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize < 4


def device_of_new() -> torch.device:
    """Where torch makes new tensors, which those that come from NumPy do not ask for."""
    return torch.empty(0).device
