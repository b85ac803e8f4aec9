"""What the modules of cosFormer models are, by the fields of their configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from linattn.models.cosformer.block import CosformerBlock
from linattn.models.huggingface.model import sizes_of
from linattn.nn import CosformerAttention
from linattn.nn.cosformer import FEATURE_MAPS

if TYPE_CHECKING:
    from linattn.models.cosformer.base import CosformerStack

__all__ = ["facts_of"]

WIDTH, INNER, LONGEST = "hidden_size", "intermediate_size", "max_position_embeddings"
NAMES = {feature_map: name for name, feature_map in FEATURE_MAPS.items()}


def facts_of(stack: CosformerStack, act: str) -> Iterator[tuple[str, Any]]:
    """Yield fields and what a stack has of them, sizes first; a module of somebody's own is not asked.

    act: the hidden_act of the configuration, for an activation that has several names.
    """
    layers, embedding, table = stack.blocks(), stack.embed_tokens, stack.embed_positions
    parts = [part for layer in layers for part in layer.modules()]
    blocks = [part for part in parts if isinstance(part, CosformerBlock)]
    attentions = [part for part in parts if isinstance(part, CosformerAttention)]
    if stack.crosses:
        yield "num_decoder_layers", len(layers)
    else:
        yield "num_hidden_layers", len(layers)
        if any(attention.causal for attention in attentions):  # an encoder's is anything
            yield "num_decoder_layers", 0
    if isinstance(embedding, nn.Embedding):
        yield WIDTH, embedding.embedding_dim
    for block in blocks:
        yield from sizes_of(block.fc1, WIDTH, INNER)
        yield from sizes_of(block.fc2, INNER, WIDTH)
        yield "hidden_act", _name(block.act, act)
    for attention in attentions:
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            yield from sizes_of(linear, WIDTH, WIDTH)
        yield "num_attention_heads", attention.num_heads
        yield LONGEST, attention.reweight.max_len
        yield "act_fun", NAMES.get(attention.feature_map, attention.feature_map)
    if isinstance(table, nn.Embedding | None):
        yield "position_embeddings", "none" if table is None else "learned"
    if isinstance(table, nn.Embedding):
        yield LONGEST, table.num_embeddings
    norms = [one for block in blocks for one in (block.attention_norm, block.mlp_norm)]
    norms += [block.cross_attention_norm for block in blocks if block.crosses]
    for norm in (*norms, stack.norm):
        if isinstance(norm, nn.LayerNorm):
            yield "layer_norm_eps", norm.eps


def _name(act: nn.Module, wanted: str) -> str:
    """What an activation is called: as is wanted where it is that one under any name, or one of no name."""
    other = ACT2FN[wanted]
    named = {has[0] if isinstance(has, tuple) else has for has in ACT2FN.values()}
    if type(act) not in named or repr(act) == repr(other):
        return wanted
    if not [*act.parameters(), *other.parameters()]:
        x = torch.linspace(-12, 12, 97, dtype=torch.float64, device="cpu")
        if torch.allclose(type(act).forward(act, x), type(other).forward(other, x)):  # past any hooks
            return wanted
    return type(act).__name__
