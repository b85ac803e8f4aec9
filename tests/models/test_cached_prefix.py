"""Several beams or samples of each prompt, from a cache that has seen the prompts' beginning."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import GenerationMixin

from linattn.errors import StateError
from linattn.models.cosformer import CosformerForCausalLM, CosformerForConditionalGeneration
from tests.models.test_cosformer import build, text
from tests.models.test_transnormer import make, same

ENDLESS = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
SEVERAL = {
    "beams": {"num_beams": 4, "do_sample": False},
    "beams, several kept": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "samples": {"num_return_sequences": 5, "do_sample": True},
    "sampled beams": {"num_beams": 3, "do_sample": True},
}


@pytest.fixture(params=["transnormer", "cosformer"])
def model(request):
    return make() if request.param == "transnormer" else build(CosformerForCausalLM)


def drawn(model, ids, **options):
    torch.manual_seed(5)
    return model.generate(ids, **ENDLESS, **options)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", SEVERAL.values(), ids=list(SEVERAL))
def test_a_cached_prefix_changes_nothing(model, rows, options):
    ids = text(rows, 9)
    want = drawn(model, ids, use_cache=False, **options)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    before = copy.deepcopy(cache)
    for _ in range(2):  # the caller's cache is as it was
        assert torch.equal(drawn(model, ids, past_key_values=cache, **options), want)
        assert cache.rows == rows and cache.columns == 6
        for state, old in zip(cache.states, before.states, strict=True):
            assert torch.equal(state.kv, old.kv) and torch.equal(state.length, old.length)
    assert len({tuple(row.tolist()) for row in want}) == len(want)  # else rows need not be told apart


def test_padded_prefixes(model):
    ids, mask = text(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    want = drawn(model, ids, attention_mask=mask, use_cache=False, num_beams=3)
    with torch.no_grad():
        cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    assert torch.equal(drawn(model, ids, attention_mask=mask, past_key_values=cache, num_beams=3), want)


def test_a_cache_with_a_row_for_every_text_is_continued_itself(model):
    ids = text(2, 9)
    want = drawn(model, ids, use_cache=False, num_beams=3)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    assert torch.equal(drawn(model, ids, past_key_values=cache, num_beams=3), want)
    assert cache.rows == 6 and cache.columns == 9 + 4


@pytest.mark.parametrize("options", SEVERAL.values(), ids=list(SEVERAL))
def test_an_encoder_decoder(options):
    model = build(CosformerForConditionalGeneration)
    source, ids = text(2, 7), text(2, 5, seed=3)
    ids[:, 0] = model.config.decoder_start_token_id  # else generate puts it in front
    want = drawn(model, source, decoder_input_ids=ids, use_cache=False, **options)
    with torch.no_grad():
        cache = model(source, decoder_input_ids=ids[:, :3], use_cache=True).past_key_values
    mask = torch.ones_like(ids)  # says that ids are the whole text, the cache's part included
    found = drawn(
        model, source, decoder_input_ids=ids, decoder_attention_mask=mask, past_key_values=cache, **options
    )
    assert torch.equal(found, want) and cache.rows == 2 and cache.columns == 3


@pytest.mark.parametrize("options", SEVERAL.values(), ids=list(SEVERAL))
def test_transformers_may_repeat_prompts_by_a_method(model, options, monkeypatch):
    """Up to 5.17 a static function does it."""
    name = "_expand_inputs_for_generation"
    own = inspect.getattr_static(GenerationMixin, name)
    asked = []

    def method(self, *arguments, **named):
        asked.append(self)
        return own.__get__(self, type(self))(*arguments, **named)

    ids = text(2, 9)
    want = drawn(model, ids, use_cache=False, **options)
    monkeypatch.setattr(GenerationMixin, name, method)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    assert torch.equal(drawn(model, ids, past_key_values=cache, **options), want)
    assert asked == [model]


MADE = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


@MADE
@pytest.mark.parametrize("hidden", [False, True])
def test_a_copy_of_a_cache_goes_on_by_itself(model, mode, hidden):
    ids = text(2, 9)
    with mode():
        cache = model(ids[:, :6], use_cache=True, output_hidden_states=hidden).past_key_values
    cache.of_mine = [1]
    copied, again = copy.deepcopy([cache, cache])
    assert copied is again and type(copied) is type(cache) and len(copied.outputs) == len(cache.outputs)
    assert copied.of_mine == [1] and copied.of_mine is not cache.of_mine
    together = copy.deepcopy({"cache": cache, "first": cache.states[0], "rows": cache.outputs})
    assert together["cache"].states[0] is together["first"] and together["cache"].outputs is together["rows"]
    assert not any(x.requires_grad for x in (*copied.outputs, *(state.kv for state in copied.states)))
    want = model(ids, use_cache=False).logits[:, 6:]
    before = [state.clone() for state in cache.states]
    with torch.no_grad():
        got = [model(ids[:, i : i + 1], past_key_values=copied).logits for i in range(6, 9)]
    same(torch.cat(got, 1), want)
    assert cache.columns == 6 and copied.columns == 9
    for state, old in zip(cache.states, before, strict=True):
        assert torch.equal(state.kv, old.kv) and torch.equal(state.length, old.length)


@pytest.mark.parametrize("n", [1, 3])
def test_a_cache_of_inference_mode_stays_there(model, n):
    ids = text(2, 9)
    with torch.inference_mode():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    with pytest.raises(StateError, match="made in inference mode"):
        model(ids[:, 6 : 6 + n], past_key_values=cache)
    with pytest.raises(StateError, match="made in inference mode"):
        model.generate(ids[:, :7], past_key_values=cache, max_new_tokens=2)
    model(ids[:, 6 : 6 + n], past_key_values=copied).logits.sum().backward()
    with torch.inference_mode():
        model(ids[:, 6 : 6 + n], past_key_values=cache)
    assert cache.columns == copied.columns == 6 + n
