"""The pre-norm block of cosFormer models: attention to a text, to a source or a memory of it, an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

import linattn
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
    ) -> tuple[torch.Tensor, linattn.State | None, *tuple[linattn.State | None, ...]]:
        """Return the block's output and, if asked for, its state after the last token.

        A block that crosses returns what it remembers of the source, too, a third: `memory`, or if states are
        asked for that of the source. lengths, source_lengths: tokens from there on do not exist. positions:
        of the text's tokens, for a memory; without one the text begins at its first token.
        """
        found = self.attention(
            self.attention_norm(x), eps=EPS, lengths=lengths, state=state, return_state=return_state
        )
        mixed, after = found if return_state else (found, None)
        x = x + self.dropout(mixed)
        if not self.crosses:
            return self._mixed(x), after
        query = self.cross_attention_norm(x)
        if memory is not None:
            seen = self.cross_attention(query, eps=EPS, state=memory, positions=positions)
            return self._mixed(x + self.dropout(seen)), after, memory
        assert source is not None
        if return_state:  # in here, where the weights are whole: they may be shards elsewhere
            seen, memory = self.cross_attention(
                query, source, source, eps=EPS, lengths=source_lengths, return_state=True, positions=positions
            )
        else:
            seen = self.cross_attention(query, source, source, eps=EPS, lengths=source_lengths)
        return self._mixed(x + self.dropout(seen)), after, memory

    def step(
        self,
        x: Float[torch.Tensor, "b e"],
        state: linattn.State,
        memory: linattn.State | None,
        positions: Int[torch.Tensor, "b 1"],
    ) -> Float[torch.Tensor, "b e"]:
        """Take one more token per row; the state moves on in place, the memory stays.

        `attention` takes its own step, which hooks on it, and a `forward` of a subclass, do not see.
        """
        x = x + self.dropout(self.attention.step(self.attention_norm(x), state, eps=EPS))
        if memory is not None:
            query = self.cross_attention_norm(x)[:, None]
            seen = self.cross_attention(query, eps=EPS, state=memory, positions=positions)
            x = x + self.dropout(seen[:, 0])
        return self._mixed(x)

    def check_states(
        self, x: Float[torch.Tensor, "b n e"], state: linattn.State, memory: linattn.State | None
    ) -> None:
        """Raise what `step` does for states that are not this block's; nothing is computed.

        A cross_attention that somebody wrapped looks at its state when it is called.
        """
        self.attention.check_state(x, state)
        if memory is not None and isinstance(self.cross_attention, CosformerAttention):
            self.cross_attention.check_state(x, memory)

    def _mixed(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = x + self.dropout(self.fc2(self.act(self.fc1(self.mlp_norm(x)))))
        return mixed


def _attention(config: CosformerConfig, causal: bool) -> CosformerAttention:
    return CosformerAttention(
        config.hidden_size, config.num_attention_heads, causal=causal, act_fun=config.act_fun,
        batch_first=True, max_len=config.max_position_embeddings,
    )  # fmt: skip
