"""`generate` in every mode and with every cache gives one text, or refuses the call with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linattn.errors import OptionError
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
