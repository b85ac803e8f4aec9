"""What models of transformers do not take: refused in a sentence, before anything has moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linattn.errors import (
    ArgumentTypeError,
    DtypeError,
    OptionError,
    ShapeError,
    StateError,
    ValueRangeError,
)
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.models.cosformer import (
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
)
from tests.models.test_cosformer import build, text
from tests.models.test_transnormer import make, same

MODELS = {
    "transnormer": make,
    "causal": lambda: build(CosformerForCausalLM),
    "masked": lambda: build(CosformerForMaskedLM),
    "encoder-decoder": lambda: build(CosformerForConditionalGeneration),
}
CAUSAL = ["transnormer", "causal"]
IDS = text(2, 6)
causal = pytest.mark.parametrize("model", CAUSAL, indirect=True)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def call(model, ids=IDS, **options):
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(ids, **options)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, 0.5, 2, -1])
def test_masks_hold_ones_and_zeros(model, value):
    mask = torch.ones(2, 6, dtype=torch.float64)
    mask[1, 2] = value
    with pytest.raises(ValueRangeError, match=f"1 for real tokens and 0 for padding, got {float(value)}"):
        call(model, attention_mask=mask)


def test_masks_to_add_are_refused(model):
    with pytest.raises(ValueRangeError, match="added to scores"):
        call(model, attention_mask=torch.tensor([[0.0] * 6, [-torch.inf] * 2 + [0.0] * 4]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
def test_any_dtype_says_it(model, dtype):
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    found, want = (call(model, attention_mask=mask.to(kind)).logits for kind in (dtype, torch.int64))
    assert torch.equal(found, want)


@pytest.mark.parametrize("mask", [{"full": None}, [[1] * 6] * 2, IDS.numpy()], ids=["dict", "list", "NumPy"])
def test_masks_are_tensors(model, mask):
    with pytest.raises(
        ArgumentTypeError, match=f"attention_mask must be a tensor, got {type(mask).__name__}"
    ):
        call(model, attention_mask=mask)


@pytest.mark.parametrize("ids", [IDS.numpy(), IDS.tolist()], ids=["NumPy", "list"])
def test_ids_are_tensors(model, ids):
    with pytest.raises(ArgumentTypeError, match=f"input_ids must be a tensor, got {type(ids).__name__}"):
        call(model, ids)


def test_embeddings(model):
    width = model.config.hidden_size
    for embeds, error in (
        (torch.zeros(2, 6, width + 1), ShapeError),
        (torch.zeros(6, width), ShapeError),
        (torch.zeros(2, 6, width, dtype=torch.int64), DtypeError),
        ([[0.0]], ArgumentTypeError),
    ):
        with pytest.raises(error, match="inputs_embeds"):
            call(model, None, inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["key_mask", "lengths", "states", "initial_state", "return_state"])
def test_names_of_functions_and_layers_are_not_ignored(model, name):
    with pytest.raises(OptionError, match=f"{name} is not taken by models of transformers, pass "):
        call(model, **{name: torch.ones(2, 6)})
    call(model, **{name: None})


MISSPELT = {
    "atention_mask": "attention_mask",
    "attention_maskk": "attention_mask",
    "attentian_mask": "attention_mask",
    "attentionmask": "attention_mask",
    "input_embeds": "inputs_embeds",
    "past_key_value": "past_key_values",
    "cache_params": "past_key_values",
    "num_logits_to_keep": "logits_to_keep",
    "lables": "labels",
    "output_hidden_state": "output_hidden_states",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_misspelt_keywords_are_not_ignored(model, name):
    with pytest.raises(OptionError, match=f"{name} is not taken .*, did you mean {MISSPELT[name]}?"):
        call(model, **{name: torch.ones(2, 6)})
    torch.compiler.reset()
    compiled, options = torch.compile(model, backend="eager"), {name: 1}
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = IDS
    with pytest.raises(OptionError, match=f"did you mean {MISSPELT[name]}?"):
        compiled(IDS, **options)


def test_keywords_of_others_come_along(model):
    names = [
        "token_type_ids",
        "special_tokens_mask",
        "max_length_q",
        "cu_seq_lens_k",
        "cache_position",
        "weights",
        "attention_bias",
        "position_bias",
        "soft_labels",
        "encoder_attentions",
        "decoder_input_mask",
        "video_inputs_embeds",
    ]
    want = call(model).logits
    assert torch.equal(call(model, **dict.fromkeys(names, 3)).logits, want)
    assert torch.equal(call(model, atention_mask=None).logits, want)
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager", fullgraph=model.config.model_type == "transnormer")
    given = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert torch.equal(whole(IDS, weights=3, **given).logits, want)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@causal
def test_a_cache_is_of_its_own_texts(model, rows, n, masked):
    cache = call(model, use_cache=True).past_key_values
    before = [state.clone() for state in cache.states]
    mask = torch.ones(rows, 6 + n) if masked else None
    with pytest.raises(StateError, match=f"of 2 texts, the input is of {rows}"):
        call(model, text(rows, n), past_key_values=cache, attention_mask=mask)
    unmoved(cache, before)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("sources", "texts"), [(1, 2), (2, 1), (2, 3)])
def test_every_text_has_a_source(use_cache, sources, texts):
    model = build(CosformerForConditionalGeneration)
    with pytest.raises(ShapeError, match=f"a source for each of {texts} texts"):
        model(text(sources, 5), decoder_input_ids=text(texts, 4), use_cache=use_cache)


def unmoved(cache, before):
    assert cache.columns == 6
    for state, old in zip(cache.states, before, strict=True):
        assert torch.equal(state.kv, old.kv) and torch.equal(state.length, old.length)


@pytest.mark.parametrize("n", [1, 3])
def test_a_later_layers_wrong_state_moves_no_layer(n):
    model, other = make(linear_use_lrpe_list=[1, 0, 1]), make(linear_use_lrpe_list=[1, 0, 0])
    cache = call(other, use_cache=True).past_key_values
    before = [state.clone() for state in cache.states]
    with pytest.raises(StateError, match="must have shape"):
        call(model, IDS[:, :n], past_key_values=cache)
    unmoved(cache, before)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_later_blocks_wrong_state_or_memory_moves_no_block(n, layer):
    model, other = (build(CosformerForConditionalGeneration, act_fun=act_fun) for act_fun in ("relu", "elu"))
    cache, wrong = (call(one, use_cache=True).past_key_values for one in (model, other))
    cache.states[layer] = wrong.states[layer]
    before = [state.clone() for state in cache.states]
    with pytest.raises(StateError, match="its feature_map is 'elu\\+1'"), torch.no_grad():
        model(IDS, decoder_input_ids=IDS[:, :n], past_key_values=cache)
    unmoved(cache, before)


def test_steps_of_the_small_model_move_no_layer_either():
    fields = {
        "vocab_size": 11,
        "embed_dim": 8,
        "hidden_dim": 8,
        "num_heads": 2,
        "glu_dim": 8,
        "num_layers": 2,
    }
    model = TransNormerLM(TransNormerConfig(**fields, linear_use_lrpe_list=(1, 0)))
    states = model.initial_states(2)
    model.step(IDS[:, 0], states)
    kept = states[0].clone()
    with pytest.raises(StateError, match="must have shape"):
        model.step(IDS[:, 1], [states[0], states[0]])
    assert torch.equal(states[0].kv, kept.kv) and torch.equal(states[0].length, kept.length)


@causal
def test_a_prompt_has_a_token(model):
    for options in ({}, {"num_beams": 2, "do_sample": False}):
        with pytest.raises(ShapeError, match="at least one token"):
            model.generate(IDS[:, :0], max_new_tokens=2, **options)
    width = model.config.hidden_size
    model.generate(inputs_embeds=torch.zeros(2, 3, width, dtype=torch.float64), max_new_tokens=2)


@pytest.mark.parametrize("name", ["position_ids", "seq_idx", "cu_seqlens", "cu_seq_lens_q"])
@pytest.mark.parametrize("value", [[[0, 1, 2, 0, 1, 2]] * 2, IDS.numpy()], ids=["list", "NumPy"])
def test_places_are_tensors(name, value):
    for one in (made := make(), made.model):
        with pytest.raises(ArgumentTypeError, match=f"{name} must be a tensor, got {type(value).__name__}"):
            call(one, **{name: value})


@causal
@pytest.mark.parametrize(
    ("keep", "error"),
    [
        (-1, ValueRangeError), ("a", ArgumentTypeError), (2.5, ArgumentTypeError), (True, ArgumentTypeError),
        ([0], ArgumentTypeError), (torch.tensor(2), ShapeError), (torch.ones(2), DtypeError),
        (slice(None, None, -1), ValueRangeError),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_of_logits(model, keep, error):
    for options in ({}, {"labels": IDS}):
        with pytest.raises(error, match="logits_to_keep must"):
            call(model, logits_to_keep=keep, **options)


@causal
def test_every_number_of_logits(model):
    want = call(model).logits
    for keep, part in ((None, want), (0, want), (1, want[:, 5:]), (4, want[:, 2:]), (9, want)):
        same(call(model, logits_to_keep=keep).logits, part)
    for keep, columns in ((torch.tensor([0, 5]), [0, 5]), (slice(1, 3), [1, 2]), (np.uint8(2), [4, 5])):
        same(call(model, logits_to_keep=keep).logits, want[:, columns])
    assert call(model, logits_to_keep=None, labels=IDS).loss == call(model, labels=IDS).loss


@causal
def test_rows_of_a_cache(model):
    cache = call(model, use_cache=True).past_key_values
    before = [state.clone() for state in cache.states]
    for repeats in (0, -1, 1.0, True, "2"):
        with pytest.raises(ValueRangeError, match=f"repeats must be an int of at least 1, got {repeats!r}"):
            cache.batch_repeat_interleave(repeats)
    for move in (cache.batch_select_indices, cache.reorder_cache):
        with pytest.raises(ArgumentTypeError, match="must be a tensor, got list"):
            move([0])
    unmoved(cache, before)


def test_a_text_to_classify_has_a_token():
    with pytest.raises(ShapeError, match="at least one token"):
        build(CosformerForSequenceClassification)(IDS[:, :0])
