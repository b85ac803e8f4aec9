"""What the modules of a TransNormerLLM are, by the fields of its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import nn

from linattn import decay
from linattn.models.config import ACT_NAMES, ACTIVATIONS, SCHEDULES
from linattn.models.huggingface.model import sizes_of
from linattn.models.transnormer.configuration import TransNormerConfig
from linattn.nn import SGLU, GatedLinearAttention

__all__ = ["facts_of", "said"]

EMBED, HIDDEN, GLU = "decoder_embed_dim", "hidden_dim", "glu_dim"


def said(config: TransNormerConfig, name: str) -> Any:
    """What a field says, in the words of `facts_of`: one of all that mean the same."""
    if name == "linear_act_fun":
        return ACT_NAMES[ACTIVATIONS[str(config.linear_act_fun)]]
    if name == "linear_use_lrpe_list":
        return [int(use) for use in config.linear_use_lrpe_list or [0] * config.decoder_layers]
    return getattr(config, name)


def facts_of(embedding: nn.Module, layers: Iterable[nn.Module], schedule: str) -> Iterator[tuple[str, Any]]:
    """Yield fields and what a model has of them, sizes first; a module of somebody's own is not asked.

    schedule: what the configuration says, for decays that more than one of them could be.
    """
    layers = list(layers)
    yield "decoder_layers", len(layers)
    if isinstance(embedding, nn.Embedding):
        yield EMBED, embedding.embedding_dim
    mixers = [_mixer(layer) for layer in layers]
    for layer, mixer in zip(layers, mixers, strict=True):
        linears: list[tuple[Any, str, str]] = []
        if mixer is not None:
            yield from sizes_of(mixer.qkvu_proj, EMBED, HIDDEN, parts=4)
            yield "decoder_attention_heads", mixer.num_heads
            yield "linear_act_fun", ACT_NAMES.get(mixer.feature_map, mixer.feature_map)
            linears += [(mixer.qkvu_proj, "", ""), (mixer.out_proj, HIDDEN, EMBED)]
        for channel in (part for part in layer.modules() if isinstance(part, SGLU)):
            linears += [(channel.l1, EMBED, GLU), (channel.l2, EMBED, GLU), (channel.l3, GLU, EMBED)]
        for linear, takes, gives in linears:
            if takes:
                yield from sizes_of(linear, takes, gives)
            if isinstance(linear, nn.Linear):
                yield "bias", linear.bias is not None
    if None not in mixers:
        yield "linear_use_lrpe_list", [int(mixer is not None and mixer.lrpe is not None) for mixer in mixers]
    fits = (one for one in (schedule, *SCHEDULES) if _scheduled(mixers, one))
    yield "decay_schedule", next(fits, "other decays")


def _mixer(layer: nn.Module) -> GatedLinearAttention | None:
    """A layer's mixer, wherever it is in what somebody wrapped; None unless there is one."""
    found = [part for part in layer.modules() if isinstance(part, GatedLinearAttention)]
    return found[0] if len(found) == 1 else None


def _scheduled(mixers: list[GatedLinearAttention | None], schedule: str) -> bool:
    """Whether the decays are those of a schedule, of each layer's place among so many."""
    return all(
        mixer.table is not None
        and np.array_equal(
            mixer.table, decay.transnormer(mixer.num_heads, index, len(mixers), schedule=schedule)
        )
        for index, mixer in enumerate(mixers)
        if mixer is not None
    )
