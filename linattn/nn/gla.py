"""Gated linear attention, the token mixer of TransNormerLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import linattn
from linattn.errors import OptionError, ShapeError
from linattn.nn.lrpe import Lrpe
from linattn.nn.norm import SimpleRMSNorm

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class GatedLinearAttention(nn.Module):
    """W_o(u * SRMS(o)), where o is causal linear attention with a decay per head.

    One projection `qkvu_proj` gives q, k, v and the gate u, each hidden_dim wide with the heads contiguous
    inside; silu acts on q and k only. The norm runs over the concatenated heads, `out_proj` maps back to
    embed_dim. hidden_dim may differ from embed_dim, with and without LRPE.

    log_decay: [H], natural log of the factor per token, <= 0 (a schedule of `linattn.decay`), or None for no
    decay.
    use_lrpe: adds `lrpe`, learnable angles per head and feature. feature_map: what acts on q and k.

    Raises OptionError unless num_heads divides hidden_dim, ShapeError when log_decay is not [H].
    Source: TransNormerLLM, arXiv:2307.14995, section 3.2; names and order from the released
    `NormLinearAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_heads: int,
        *,
        log_decay: Float[np.ndarray, " h"] | None = None,
        use_lrpe: bool = False,
        bias: bool = False,
        feature_map: str | None = "silu",
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_dim % num_heads:
            raise OptionError(
                f"num_heads must divide hidden_dim, got {num_heads} heads and width {hidden_dim}"
            )
        if log_decay is not None and np.shape(log_decay) != (num_heads,):
            raise ShapeError(
                f"log_decay must have shape ({num_heads},), one per head, got {np.shape(log_decay)}"
            )
        self.num_heads = num_heads
        self.head_dim = hidden_dim // num_heads
        self.feature_map = feature_map
        self.qkvu_proj = nn.Linear(embed_dim, 4 * hidden_dim, bias=bias)
        self.out_proj = nn.Linear(hidden_dim, embed_dim, bias=bias)
        self.norm = SimpleRMSNorm()
        self.lrpe = Lrpe(num_heads, self.head_dim) if use_lrpe else None
        # The bits of the float64 table in an integer buffer: it follows the module to a device, and no cast
        # of the module to another float type rounds it. Not saved: the schedule and the layer's index say
        # what it is.
        self.table = None if log_decay is None else np.array(log_decay, np.float64)
        self.register_buffer("log_decay_bits", self.decay_bits(), persistent=False)

    def decay_bits(self) -> torch.Tensor | None:
        """The table of log decays as the buffer holds it."""
        return None if self.table is None else torch.from_numpy(self.table.copy()).view(torch.int64)

    @property
    def log_decay(self) -> Float[torch.Tensor, " h"] | None:
        """The log decay per head, float64 on the module's device, or None."""
        bits = self.log_decay_bits
        return bits.view(torch.float64) if isinstance(bits, torch.Tensor) else None

    def project(
        self, x: Float[torch.Tensor, "*b e"]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k, v [*b, H, D], before any activation, and the gate u [*b, hidden_dim]."""
        q, k, v, u = self.qkvu_proj(x).chunk(4, -1)
        heads = (self.num_heads, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), u

    def options(self) -> dict[str, Any]:
        """Return this layer's keywords for `linattn.attention` and `linattn.decode_step`."""
        reweight = None if self.lrpe is None else self.lrpe()
        return {"log_decay": self.log_decay, "reweight": reweight, "feature_map": self.feature_map}

    def forward(
        self,
        x: Float[torch.Tensor, "b n e"],
        *,
        state: linattn.State | None = None,
        return_state: bool = False,
        lengths: Int[torch.Tensor, " b"] | None = None,
        key_mask: Bool[torch.Tensor, "b n"] | None = None,
        cu_seqlens: Int[torch.Tensor, " s1"] | None = None,
        backend: Any = "auto",
    ) -> torch.Tensor | tuple[torch.Tensor, linattn.State]:
        """Mix the positions of x; with `return_state`, also give the state to continue from.

        state, lengths, key_mask and cu_seqlens mean what they mean to `linattn.attention`: lengths for right
        padding (the state stops there, it is not decayed by the padding), key_mask for left padding.
        Raises what `linattn.attention` raises.
        """
        q, k, v, u = self.project(x)
        out = linattn.attention(
            q, k, v, **self.options(), lengths=lengths, key_mask=key_mask, cu_seqlens=cu_seqlens,
            initial_state=state, return_state=return_state, backend=backend,
        )  # fmt: skip
        if not return_state:
            return self._gated(out, u)
        o, after = out
        return self._gated(o, u), after

    def step(
        self, x: Float[torch.Tensor, "b e"], state: linattn.State, *, backend: Any = "auto"
    ) -> torch.Tensor:
        """Mix one more token per row; the state moves on in place. The numbers are those of `forward`."""
        q, k, v, u = self.project(x)
        o = linattn.decode_step(q, k, v, state, **self.options(), backend=backend)
        return self._gated(o, u)

    def initial_state(self, sequences: int) -> linattn.State:
        """Return the state of `sequences` texts before their first token, on the module's device."""
        reweight = None if self.lrpe is None else self.lrpe()
        d = self.head_dim
        return linattn.State.zeros(
            self.out_proj.weight,
            sequences,
            self.num_heads,
            d,
            d,
            reweight=reweight,
            feature_map=self.feature_map,
        )

    def _gated(self, o: Float[torch.Tensor, "*b h d"], u: Float[torch.Tensor, "*b e"]) -> torch.Tensor:
        y: torch.Tensor = self.out_proj(self.norm.gated(o.flatten(-2), u))
        return y
