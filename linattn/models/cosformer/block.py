"""The pre-norm block of cosFormer models, and its attention: within padded rows, to a source, to a memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

import linattn
from linattn import features
from linattn.models.cosformer.configuration import CosformerConfig
from linattn.nn import CosformerAttention

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EPS = 1e-6  # the least denominator, as in the released module


class CosformerBlock(GradientCheckpointingLayer):
    """x += attention(LN(x)); with a source x += cross_attention(LN(x), source); x += MLP(LN(x))."""

    def __init__(self, config: CosformerConfig, causal: bool, crosses: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(width, eps)
        self.attention = _attention(config, causal)
        self.crosses = crosses
        if crosses:
            self.cross_attention_norm = nn.LayerNorm(width, eps)
            self.cross_attention = _attention(config, causal=False)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[torch.Tensor, "b n e"],
        lengths: Int[torch.Tensor, " b"] | None = None,
        state: linattn.State | None = None,
        return_state: bool = False,
        source: Float[torch.Tensor, "b m e"] | None = None,
        source_lengths: Int[torch.Tensor, " b"] | None = None,
        memory: linattn.State | None = None,
        positions: Int[torch.Tensor, "b n"] | None = None,
    ) -> tuple[torch.Tensor, linattn.State | None]:
        """Return the block's output and, if asked for, its state after the last token.

        lengths, source_lengths: tokens from there on do not exist. A block that crosses takes the source
        itself, for a text that begins at its first token, or the memory of it and the text's positions.
        """
        found = attend(self.attention, self.attention_norm(x), lengths, state, return_state)
        x = x + self.dropout(found[0])
        if self.crosses:
            query = self.cross_attention_norm(x)
            if memory is not None and positions is not None:
                seen = recall(self.cross_attention, query, positions, memory)
            else:
                assert source is not None
                seen = across(self.cross_attention, query, source, source_lengths)
            x = x + self.dropout(seen)
        return self._mixed(x), found[1]

    def step(
        self,
        x: Float[torch.Tensor, "b e"],
        state: linattn.State,
        memory: linattn.State | None,
        positions: Int[torch.Tensor, "b 1"],
    ) -> Float[torch.Tensor, "b e"]:
        """Take one more token per row; the state moves on in place, the memory stays."""
        x = x + self.dropout(self.attention.step(self.attention_norm(x), state, eps=EPS))
        if memory is not None:
            query = self.cross_attention_norm(x)[:, None]
            x = x + self.dropout(recall(self.cross_attention, query, positions, memory)[:, 0])
        return self._mixed(x)

    def check_states(
        self, x: Float[torch.Tensor, "b n e"], state: linattn.State, memory: linattn.State | None
    ) -> None:
        """Raise what `linattn.attention` raises for states that are not this block's, for rows x."""
        self.attention.check_state(x, state)
        if memory is not None:
            self.cross_attention.check_state(x, memory)

    def _mixed(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = x + self.dropout(self.fc2(self.act(self.fc1(self.mlp_norm(x)))))
        return mixed


def attend(
    layer: CosformerAttention,
    x: Float[torch.Tensor, "b n e"],
    lengths: Int[torch.Tensor, " b"] | None,
    state: linattn.State | None,
    return_state: bool,
) -> tuple[Float[torch.Tensor, "b n e"], linattn.State | None]:
    """Attend within rows that end at their lengths; outputs from there on say nothing."""
    q, k, v = (_heads(layer, project(x)) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    found = linattn.attention(
        q, k, v, **layer.options(), eps=EPS, causal=layer.causal, lengths=lengths, initial_state=state,
        return_state=return_state,
    )  # fmt: skip
    o, after = found if return_state else (found, None)
    return layer.out_proj(o.flatten(2)), after


def across(
    layer: CosformerAttention,
    x: Float[torch.Tensor, "b n e"],
    source: Float[torch.Tensor, "b m e"],
    source_lengths: Int[torch.Tensor, " b"] | None,
) -> Float[torch.Tensor, "b n e"]:
    """Attend from rows to all of the source; both begin at position 0."""
    mask = None
    if source_lengths is not None:
        mask = torch.arange(source.shape[1], device=source.device) < source_lengths[:, None]
    out: torch.Tensor = layer(x, source, source, eps=EPS, key_mask=mask)
    return out


def remember(
    layer: CosformerAttention,
    source: Float[torch.Tensor, "b m e"],
    source_lengths: Int[torch.Tensor, " b"] | None,
) -> linattn.State:
    """Return all that `across` needs of a source: its state, of a size that does not depend on m."""
    k, v = _heads(layer, layer.k_proj(source)), _heads(layer, layer.v_proj(source))
    _, state = linattn.attention(
        k, k, v, **layer.options(), causal=True, lengths=source_lengths, return_state=True
    )
    assert isinstance(state, linattn.State)
    return state


def recall(
    layer: CosformerAttention,
    x: Float[torch.Tensor, "b n e"],
    positions: Int[torch.Tensor, "b n"],
    memory: linattn.State,
) -> Float[torch.Tensor, "b n e"]:
    """Attend from rows at any positions to a remembered source, as `across` does from position 0 on.

    The state's frame is the source's last token at e: cos θ(p - j) = cos θ(p - e) cos θ(e - j) minus
    sin θ(p - e) sin θ(e - j), so a query turned by θ(p - e) reads C and S directly.
    """
    assert memory.z is not None and layer.reweight.max_len is not None
    q = features.apply(torch, layer.feature_map, _heads(layer, layer.q_proj(x))).to(memory.kv.dtype)
    ahead = (positions - memory.length[:, None] + 1)[..., None, None].to(torch.float64)
    angle = ahead * (math.pi / (2 * layer.reweight.max_len))
    turned = torch.cat([q * angle.cos().to(q.dtype), q * -angle.sin().to(q.dtype)], -1)  # [b n h 2d]
    total = torch.einsum("bnhf,bhfe->bnhe", turned, memory.kv)
    weight = torch.einsum("bnhf,bhf->bnh", turned, memory.z)
    o = total / weight.clamp(min=EPS)[..., None]
    out: torch.Tensor = layer.out_proj(o.flatten(2).to(x.dtype))
    return out


def _heads(layer: CosformerAttention, x: torch.Tensor) -> Any:
    return x.reshape(*x.shape[:-1], layer.num_heads, x.shape[-1] // layer.num_heads)  # [b n h d]


def _attention(config: CosformerConfig, causal: bool) -> CosformerAttention:
    return CosformerAttention(
        config.hidden_size, config.num_attention_heads, causal=causal, act_fun=config.act_fun,
        batch_first=True, max_len=config.max_position_embeddings,
    )  # fmt: skip
