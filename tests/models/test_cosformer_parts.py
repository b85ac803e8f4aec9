"""cosFormer models whose parts hooks watch, or somebody wrapped or replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linattn.models.cosformer import (
    CosformerCache,
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
    CosformerModel,
)
from linattn.nn import CosformerAttention
from tests.models.test_cosformer import build, close, text

SINGLE = [CosformerModel, CosformerForMaskedLM, CosformerForSequenceClassification, CosformerForCausalLM]
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def louder(out):
    return (1.5 * out[0], out[1]) if isinstance(out, tuple) else 1.5 * out


class Louder(CosformerAttention):
    """An attention with another output, which says nothing of steps."""

    def forward(self, *arguments, **options):
        return louder(super().forward(*arguments, **options))


class Around(nn.Module):
    """The same around one."""

    def __init__(self, attention):
        super().__init__()
        self.inside = attention

    def forward(self, *arguments, **options):
        return louder(self.inside(*arguments, **options))


def subclassed(block, name):
    getattr(block, name).__class__ = Louder


def wrapped(block, name):
    setattr(block, name, Around(getattr(block, name)))


def hooked(block, name):
    getattr(block, name).register_forward_hook(lambda module, given, out: louder(out))


def rescaled(block, name):
    """What all of those come to."""
    with torch.no_grad():
        for parameter in getattr(block, name).out_proj.parameters():
            parameter *= 1.5


WAYS = pytest.mark.parametrize("way", [subclassed, wrapped, hooked])


def blocks(model):
    return (getattr(model, "decoder", None) or getattr(model, "encoder", model)).layers


@torch.no_grad()
@WAYS
@pytest.mark.parametrize("kind", SINGLE)
def test_an_attention_of_ones_own_counts(kind, way):
    ids, mask = text(2, 6), torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    model, plain = build(kind), build(kind)
    plainly = plain(ids, mask)[0]
    way(blocks(model)[1], "attention")
    rescaled(blocks(plain)[1], "attention")
    close(model(ids, mask)[0], plain(ids, mask)[0].numpy())
    assert not torch.equal(plainly, plain(ids, mask)[0])


@torch.no_grad()
@WAYS
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (CosformerForCausalLM, "attention"),
        (CosformerForConditionalGeneration, "attention"),
        (CosformerForConditionalGeneration, "cross_attention"),
    ],
)
def test_it_counts_for_every_generated_token(kind, name, way):
    ids, model, plain = text(2, 6), build(kind), build(kind)
    way(blocks(model)[0], name)
    rescaled(blocks(plain)[0], name)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **GREEDY, **options), plain.generate(ids, **GREEDY, **options))
    paired = kind is CosformerForConditionalGeneration
    cache, pieces = CosformerCache(), []
    for piece in ids.split([3, 1, 2], 1):
        given = {"input_ids": ids, "decoder_input_ids": piece} if paired else {"input_ids": piece}
        pieces.append(model(**given, past_key_values=cache).logits)
    want = plain(ids, **({"decoder_input_ids": ids} if paired else {})).logits
    close(torch.cat(pieces, 1), want.numpy())


@torch.no_grad()
def test_hooks_on_attentions_see_every_token_once():
    model, ids, seen = build(CosformerForConditionalGeneration), text(2, 6), []
    for name in ("attention", "cross_attention"):
        model.decoder.layers[1].get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: seen.append((name, given[0].shape[1]))
        )
    model.generate(ids, **GREEDY)
    assert seen == [("attention", 1), ("cross_attention", 1)] * 5
    model(ids, decoder_input_ids=ids, use_cache=False)
    assert seen[10:] == [("attention", 6), ("cross_attention", 6)]
