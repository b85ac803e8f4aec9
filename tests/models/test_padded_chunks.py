"""Padded texts in chunks: a row that ends while others go on still ends with its last token's outputs."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from linattn.errors import StateError
from linattn.models.cosformer import CosformerForCausalLM, CosformerForConditionalGeneration
from tests.models.test_cosformer import build, text
from tests.models.test_transnormer import make, same

N = 12
MASK = torch.tensor(
    [
        [1] * N,
        [1] * 4 + [0] * 8,  # ended
        [0] * 5 + [1] * 7,  # not begun
        [0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0],
        [0] * N,
    ]
)
CUTS = [(0, 4, 8, N), (0, 2, 3, 4, 9, 10, 11, N), (0, 1, N), (0, 6, 6, N), tuple(range(N + 1))]
ENDLESS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Translator(torch.nn.Module):
    """The decoder of an encoder-decoder, called as the causal models are."""

    def __init__(self):
        super().__init__()
        self.both = build(CosformerForConditionalGeneration)
        self.source = text(len(MASK), 5, seed=4)

    def forward(self, ids, attention_mask=None, **options):
        return self.both(self.source, decoder_input_ids=ids, decoder_attention_mask=attention_mask, **options)


MODELS = {
    "transnormer": make,
    "cosformer": lambda: build(CosformerForCausalLM),
    "encoder-decoder": Translator,
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def ids_of(n=N):
    return text(len(MASK), n)


def outputs(found, each):
    hidden = found.get("decoder_hidden_states" if "decoder_hidden_states" in found else "hidden_states")
    return [found.logits, *(hidden if each else ())]


@pytest.mark.parametrize("each", [False, True], ids=["logits", "hidden states"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@torch.no_grad()
def test_chunks_have_the_outputs_of_the_whole(model, cuts, each):
    ids, cache, parts = ids_of(), None, []
    want = outputs(model(ids, attention_mask=MASK, use_cache=False, output_hidden_states=each), each)
    for begin, end in pairwise(cuts):
        found = model(
            ids[:, begin:end], attention_mask=MASK[:, :end], past_key_values=cache, use_cache=True,
            output_hidden_states=each,
        )  # fmt: skip
        cache = found.past_key_values
        parts.append(outputs(found, each))
    for i, rows in enumerate(want):
        same(torch.cat([part[i] for part in parts], 1), rows)


@pytest.mark.parametrize("fields", [{}, {"position_embeddings": "none"}], ids=str)
@torch.no_grad()
def test_padding_may_lie_behind_the_last_position(fields):
    """Texts of 14 and 10 tokens of 16: beside the second one's end, the first one's columns go on to 18."""
    model, source, ids = build(CosformerForConditionalGeneration, **fields), text(2, 5, seed=4), text(2, 18)
    mask = torch.ones(2, 18, dtype=torch.int64)
    mask[0, 14:] = mask[1, 4:12] = 0
    cache = model(
        source, decoder_input_ids=ids[:, :12], decoder_attention_mask=mask[:, :12], use_cache=True
    ).past_key_values
    found = model(
        source, decoder_input_ids=ids[:, 12:], decoder_attention_mask=mask, past_key_values=cache
    ).logits
    want = model(source, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False).logits[:, 12:]
    same(found, want)


@torch.no_grad()
def test_padding_in_front_of_a_text_has_zeros(model):
    ids, options = ids_of(), {"use_cache": True, "output_hidden_states": True}
    cache = model(ids[:, :4], attention_mask=MASK[:, :4], **options).past_key_values
    found = model(ids[:, 4:], attention_mask=MASK, past_key_values=cache, **options)
    for rows in outputs(found, True):
        assert not rows[2, 0].any() and rows[2, 1].any()


@pytest.mark.parametrize("model", ["transnormer", "cosformer"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"output_hidden_states": True}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_prompts_read_in_chunks_go_on_as_whole_ones(model, options, size):
    ids, mask = ids_of()[:4], MASK[:4]
    given = {"attention_mask": mask, "return_dict_in_generate": True, **ENDLESS, **options}
    want, found = (model.generate(ids, **given, **chunk) for chunk in ({}, {"prefill_chunk_size": size}))
    assert torch.equal(found.sequences, want.sequences)


@pytest.fixture
def begun(model):
    """A cache that has seen texts 0 to 3, and what the model gave for each text's last token."""
    model.source = text(4, 5, seed=4)
    with torch.no_grad():
        first = model(ids_of(6)[:4], attention_mask=MASK[:4, :6], use_cache=True)
    return first.past_key_values, first.logits[:, -1]


def padded(model, cache):
    """What texts without a new token give."""
    rows, nothing = cache.rows, cache.columns + 2
    mask = torch.ones(rows, nothing, dtype=torch.int64)
    mask[:, : cache.columns] = (torch.arange(cache.columns) < cache.states[0].length[:, None]).long()
    mask[:, -2:] = 0
    model.source = text(rows, 5, seed=4)
    with torch.no_grad():
        return model(text(rows, 2), attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("rows", [[3, 1], [1, 0, 1, 3]], ids=str)
def test_outputs_go_where_their_texts_go(model, begun, rows):
    cache, last = begun
    for change in ("reorder_cache", "batch_select_indices"):
        kept = copy.deepcopy(cache)
        getattr(kept, change)(torch.tensor(rows))
        found = padded(model, kept)
        torch.testing.assert_close(found, last[rows][:, None].expand_as(found))
    cache.batch_select_indices(torch.tensor(rows))
    cache.batch_repeat_interleave(2)
    found = padded(model, cache)
    torch.testing.assert_close(found, last[rows].repeat_interleave(2, 0)[:, None].expand_as(found))


def test_a_copy_keeps_its_own(model, begun):
    cache, last = begun
    kept = copy.deepcopy(cache)
    with torch.no_grad():
        model(ids_of(1)[:4], past_key_values=cache)
    found = padded(model, kept)
    torch.testing.assert_close(found[[0, 1, 3]], last[[0, 1, 3], None].expand(-1, 2, -1))
    cache.reset()
    assert not cache.outputs


def test_a_step_is_a_last_token(model, begun):
    cache, _ = begun
    with torch.no_grad():
        step = model(ids_of(1)[:4], past_key_values=cache).logits
    torch.testing.assert_close(padded(model, cache), step.expand(-1, 2, -1))


def test_no_token_changes_nothing(model, begun):
    cache, last = begun
    with torch.no_grad():
        assert model(ids_of(0)[:4], past_key_values=cache).logits.shape[1] == 0
    torch.testing.assert_close(padded(model, cache)[[0, 1, 3]], last[[0, 1, 3], None].expand(-1, 2, -1))


def test_hidden_states_that_were_not_asked_for_are_not_made_up(model, begun):
    cache, _ = begun
    states = [state.clone() for state in cache.states]
    options = {"past_key_values": cache, "output_hidden_states": True}
    mask = MASK[:4, :8].clone()
    with pytest.raises(StateError, match="row 1 has only padding"), torch.no_grad():
        model(ids_of(2)[:4], attention_mask=mask, **options)
    assert cache.columns == 6
    for state, before in zip(cache.states, states, strict=True):
        assert torch.equal(state.kv, before.kv) and torch.equal(state.length, before.length)
    mask[[1, 3], 7] = 1  # now every text that has begun goes on
    with torch.no_grad():
        model(ids_of(2)[:4], attention_mask=mask, **options)


@torch.no_grad()
def test_of_hidden_states_the_last_is_what_is_asked_for_alone(model):
    model.source = text(4, 5, seed=4)
    first = model(ids_of(6)[:4], attention_mask=MASK[:4, :6], use_cache=True, output_hidden_states=True)
    found, last = padded(model, first.past_key_values), first.logits[:, -1:]
    torch.testing.assert_close(found[[0, 1, 3]], last[[0, 1, 3]].expand(-1, 2, -1))


def test_texts_back_to_back_leave_outputs_of_their_own():
    model, ids = make(), text(1, 9)
    borders = torch.tensor([0, 4, 4, 9])
    with torch.no_grad():
        first = model(ids, cu_seqlens=borders, use_cache=True)
        cache = first.past_key_values
        second = model(ids[:, :3], cu_seqlens=torch.tensor([0, 0, 3, 3]), past_key_values=cache).logits
        found = padded(model, cache)
    want = torch.stack([first.logits[0, 3], second[0, 2], first.logits[0, 8]])
    torch.testing.assert_close(found, want[:, None].expand_as(found))


def test_gradients_reach_the_call_that_read_the_last_token(model):
    rows = MASK[:2]
    model.source = text(2, 5, seed=4)

    def gradient(cuts):
        cache = None
        for begin, until in pairwise(cuts):
            found = model(
                ids_of()[:2, begin:until],
                attention_mask=rows[:, :until],
                past_key_values=cache,
                use_cache=True,
            )
            cache = found.past_key_values
        model.zero_grad()
        found.logits[1, -1].square().sum().backward()
        return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])

    same(gradient((0, 4, 6)), gradient((0, 6)))
