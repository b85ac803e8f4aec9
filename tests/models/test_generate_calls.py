"""`generate` in every mode and with every cache gives one text, or refuses the call with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from linattn.errors import OptionError, ShapeError
from linattn.models.cosformer import CosformerForCausalLM, CosformerForConditionalGeneration
from tests.models.test_cosformer import build, text
from tests.models.test_transnormer import make

GREEDY = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
MODELS = {
    "transnormer": make,
    "cosformer": lambda: build(CosformerForCausalLM),
    "encoder-decoder": lambda: build(CosformerForConditionalGeneration),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def test_checkpointing_in_training_changes_no_text(model: Any) -> None:
    ids = text(2, 7)
    want = model.generate(ids, **GREEDY)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(model.generate(ids, **GREEDY), want)
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert model(ids, use_cache=True, **given).past_key_values.columns == 7
    assert model(ids, use_cache=True, **given).past_key_values is None  # formed twice, with gradients


def test_a_cache_that_is_not_to_be_used(model: Any) -> None:
    ids = text(2, 7)
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True, **{name: x[:, :6] for name, x in given.items()})
    with pytest.raises(OptionError, match="past_key_values with use_cache=False"):
        model.generate(ids, past_key_values=cache.past_key_values, use_cache=False, **given, **GREEDY)
    assert cache.past_key_values.columns == 6


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded", "sliding_window"])
def test_caches_of_keys_are_not_ignored(model: Any, kind: str) -> None:
    ids = text(2, 7)
    with pytest.raises(OptionError, match=f"cache_implementation='{kind}' is a way to keep keys"):
        model.generate(ids, cache_implementation=kind, **GREEDY)


def test_continuous_batching_is_refused_at_once(model: Any) -> None:
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        with pytest.raises(OptionError, match="continuous batching keeps pages of keys"):
            getattr(model, name)([[3, 4, 5]])


def test_keys_in_place_of_states_are_refused_with_the_reason(model: Any) -> None:
    given = {"decoder_input_ids": text(2, 7)} if model.config.is_encoder_decoder else {}
    with pytest.raises(
        OptionError, match=r"got DynamicCache: a state has no place for keys .* prefix tuning"
    ):
        model(text(2, 7), past_key_values=DynamicCache(), **given)


@torch.no_grad()
def test_rows_are_kept_by_a_mask(model: Any) -> None:
    given = {"decoder_input_ids": text(3, 7)} if model.config.is_encoder_decoder else {}
    by_mask, by_number = (model(text(3, 7), use_cache=True, **given).past_key_values for _ in range(2))
    by_mask.batch_select_indices(torch.tensor([True, False, True]))
    by_number.batch_select_indices(torch.tensor([0, 2]))
    assert by_mask.rows == by_number.rows == 2
    for state, other in zip(by_mask.states, by_number.states, strict=True):
        assert torch.equal(state.kv, other.kv)
    with pytest.raises(ShapeError, match=r"a mask of rows must have shape \[2\], got \[3\]"):
        by_mask.batch_select_indices(torch.tensor([True, False, True]))


def test_texts_of_a_prompt_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's seq_idx, wider than what comes after it, does not follow the generated tokens."""
    model, ids = make(), text(2, 7)
    monkeypatch.setattr(model, "_validate_model_kwargs", lambda given: None)  # transformers 5.4 refuses it
    want = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, seq_idx=torch.zeros_like(ids), **GREEDY), want)
    with pytest.raises(ShapeError, match="seq_idx must have shape"):
        model.generate(ids, seq_idx=torch.zeros_like(ids), use_cache=False, **GREEDY)
    parted = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    for name, value in (
        ("cu_seqlens", torch.tensor([0, 3, 7])),
        ("cu_seq_lens_q", torch.tensor([0, 7])),
        ("seq_idx", parted),
    ):
        with pytest.raises(OptionError, match=f"{name}.*: generate takes one text a row"):
            model.generate(ids[:1], **{name: value}, **GREEDY)
    alone = model.generate(ids[:1], attention_mask=parted, **GREEDY)  # numbers of padding say nothing
    assert torch.equal(model.generate(ids[:1], attention_mask=parted, seq_idx=parted, **GREEDY), alone)
