"""cosFormer models as the Hugging Face ecosystem uses them: checkpoints, gradients, losses, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from linattn.errors import CheckpointError, DtypeError, OptionError, ShapeError, StateError, ValueRangeError
from linattn.models.cosformer import (
    CosformerCache,
    CosformerConfig,
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
    CosformerModel,
)
from tests.models.test_cosformer import SIZES, M, V, build, log_softmax, text

ALL = {
    CosformerModel: AutoModel,
    CosformerForMaskedLM: AutoModelForMaskedLM,
    CosformerForSequenceClassification: AutoModelForSequenceClassification,
    CosformerForCausalLM: AutoModelForCausalLM,
    CosformerForConditionalGeneration: AutoModelForSeq2SeqLM,
}


def more(kind):
    """What an encoder-decoder takes besides its source."""
    return {"decoder_input_ids": text(2, 6)} if kind is CosformerForConditionalGeneration else {}


def answer(model, **options):
    found = model(text(2, 6), **more(type(model)), **options)
    return found.last_hidden_state if isinstance(model, CosformerModel) else found.logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "auto"), ALL.items())
def test_checkpoints_come_back_through_the_auto_classes(kind, auto, tied, tmp_path):
    model = build(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is kind and loaded.config.num_labels == 3
    torch.testing.assert_close(answer(loaded), answer(model))
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    if hasattr(loaded, "lm_head"):
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
        loaded.resize_token_embeddings(V + 2)
        new = torch.full((2, 3), V + 1)
        assert loaded(new, **dict.fromkeys(more(kind), new)).logits.shape == (2, 3, V + 2)


def test_an_encoder_becomes_a_classifier_and_a_damaged_classifier_nothing(tmp_path):
    model, file = build(CosformerForMaskedLM), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    load = CosformerForSequenceClassification.from_pretrained
    classifier, ids = load(tmp_path, num_labels=4), text(2, 5)
    want = classifier.classifier(model.encoder(ids).last_hidden_state[:, 0])
    torch.testing.assert_close(classifier(ids).logits, want)
    assert want.shape == (2, 4) and want.std() > 0
    hidden = CosformerModel.from_pretrained(tmp_path)(ids)[0]
    torch.testing.assert_close(hidden, model.encoder(ids).last_hidden_state)
    classifier.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(ids).logits, want)
    tensors = load_file(file)
    save_file({k: x for k, x in tensors.items() if k != "classifier.bias"}, file)
    with pytest.raises(CheckpointError, match=r"lacks classifier\.bias \(1 in all\)"):
        load(tmp_path)
    save_file(tensors | {"encoder.other": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"has unknown encoder\.other"):
        load(tmp_path)
    save_file(tensors | {"classifier.bias": torch.zeros(9)}, file)
    with pytest.raises(CheckpointError, match=r"classifier\.bias has shape \(9,\), this"):
        load(tmp_path)
    file.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path)
    file.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        load(tmp_path)


@pytest.mark.parametrize("kind", [CosformerForCausalLM, CosformerForConditionalGeneration])
def test_what_looks_back_is_not_read_as_what_looks_both_ways(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForMaskedLM):
        with pytest.raises(CheckpointError, match="is of another model"):
            auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ALL)
def test_every_parameter_learns_and_checkpointing_changes_nothing(kind):
    model, gradients = build(kind).train(), []
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    calls = []
    (getattr(model, "decoder", None) or getattr(model, "encoder", model)).layers[0].fc1.register_forward_hook(
        lambda *_: calls.append(1)
    )
    for checkpointing, use_cache in ((False, False), (True, False), (True, True)):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        (answer(model, attention_mask=mask, use_cache=use_cache) ** 2).sum().backward()
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters()})
    assert len(calls) == 5  # with checkpoints forwards twice
    assert all(bool(x.abs().sum() > 0) for x in gradients[0].values())
    assert all(torch.equal(x, gradients[1][name]) for name, x in gradients[0].items())
    largest = max(float(x.abs().max()) for x in gradients[0].values())
    for name, x in gradients[2].items():  # a source is read through its state: equal up to rounding
        assert (x - gradients[0][name]).abs().max() <= 2000 * np.finfo(np.float64).eps * largest


def test_gradients_pass_through_what_is_remembered():
    model, ids, gradients = build(CosformerForCausalLM), text(2, 6), []
    for cuts in ([6], [4, 5, 6]):
        cache, start, total = CosformerCache(), 0, 0.0
        for end in cuts:
            total = total + (model(ids[:, start:end], past_key_values=cache).logits ** 2).sum()
            start = end
        model.zero_grad()
        total.backward()
        gradients.append([x.grad.clone() for x in model.parameters()])
    largest = max(float(x.abs().max()) for x in gradients[0])
    for x, y in zip(*gradients, strict=True):
        assert (x - y).abs().max() <= 2000 * np.finfo(np.float64).eps * largest
    assert model(ids).past_key_values is not None and model.train()(ids).past_key_values is None


def test_dropout_acts_in_training_alone():
    model = build(CosformerForMaskedLM, dropout=0.5)
    assert torch.equal(answer(model), answer(model))
    model.train()
    first, second = (model(text(2, 6), output_hidden_states=True).hidden_states for _ in range(2))
    assert not any(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_losses_are_what_their_labels_say():
    ids, labels = text(2, 6), text(2, 6, seed=1)
    labels[0, 1] = labels[1, 4] = -100

    def entropy(logits, wanted):
        chosen = log_softmax(logits.detach().numpy())[wanted != -100]
        return -chosen[np.arange(len(chosen)), wanted[wanted != -100]].mean()

    masked, causal = build(CosformerForMaskedLM), build(CosformerForCausalLM)
    paired, classifier = build(CosformerForConditionalGeneration), build(CosformerForSequenceClassification)
    shifted = torch.cat([torch.ones(2, 1, dtype=torch.int64), labels[:, :-1].clamp(min=0)], 1)
    wanted = torch.tensor([2, 0])
    for got, want in (
        (masked(ids, labels=labels).loss, entropy(masked(ids).logits, labels)),
        (causal(ids, labels=labels).loss, entropy(causal(ids).logits[:, :-1], labels[:, 1:])),
        (paired(ids, labels=labels).loss, entropy(paired(ids, decoder_input_ids=shifted).logits, labels)),
        (classifier(ids, labels=wanted).loss, entropy(classifier(ids).logits, wanted)),
    ):
        # transformers takes losses of language models in float32
        assert abs(got.item() - want) <= 16 * np.finfo(np.float32).eps * want


@pytest.mark.parametrize("kind", ALL)
def test_the_shapes_of_an_answer(kind):
    model, ids = build(kind), text(2, 6)
    named = model(ids, output_hidden_states=True, **more(kind))
    hidden = named.decoder_hidden_states if more(kind) else named.hidden_states
    assert len(hidden) == 3 and all(x.shape == (2, 6, 12) for x in hidden)
    stack = getattr(model, "decoder", None) or getattr(model, "encoder", model)
    assert torch.equal(hidden[0], model.get_input_embeddings()(ids) + stack.embed_positions.weight[:6])
    plain = model(ids, return_dict=False, **more(kind))
    assert isinstance(plain, tuple)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), **more(kind))
    assert torch.equal(plain[0], named[0]) and torch.equal(embedded[0], named[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", [CosformerForCausalLM, CosformerForConditionalGeneration])
def test_half_precision_keeps_float32_states(kind):
    model, ids = build(kind).to(torch.bfloat16), text(2, 6)
    found = model(ids, **more(kind))
    assert found.logits.dtype == torch.bfloat16
    assert {state.kv.dtype for state in found.past_key_values.states} == {torch.float32}
    assert model.generate(ids, max_new_tokens=3, num_beams=2).shape[0] == 2


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_of_a_padded_prompt(chunk):
    model, ids = build(CosformerForCausalLM), text(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **options), want)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), want[:, 9:])


def test_a_mask_must_agree_with_what_the_states_hold():
    model, ids = build(CosformerForCausalLM), text(2, 4)
    cache = model(ids, use_cache=True).past_key_values
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(StateError, match=r"2 real tokens .* its state of row 0 holds 4"):
        model(text(2, 1), attention_mask=mask, past_key_values=cache)
    with pytest.raises(StateError, match="all of the prompt"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("masked", [True, False])
def test_an_encoder_decoder_continues_a_text_from_its_cache(masked):
    model, source = build(CosformerForConditionalGeneration), text(2, 6)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    whole = model.generate(source, **options)
    begun = model.generate(source, **{**options, "max_new_tokens": 3})
    known = {"decoder_input_ids": begun.sequences, "past_key_values": begun.past_key_values}
    if masked:
        known["decoder_attention_mask"] = torch.ones_like(begun.sequences)
    more = model.generate(source, **known, **{**options, "max_new_tokens": 2})
    assert torch.equal(more.sequences, whole.sequences)
    torch.testing.assert_close(more.scores, whole.scores[3:])
    with pytest.raises(StateError, match="all of the prompt"):
        model.generate(source, **known, **options)


def test_logits_of_the_last_columns_alone():
    model, ids = build(CosformerForCausalLM), text(2, 6)
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=2).logits, model.lm_head(model.decoder(ids)[0][:, -2:]))
    assert model(ids, logits_to_keep=torch.tensor([1, 3])).logits.shape == whole[:, [1, 3]].shape


def test_the_configuration_is_plain_json(tmp_path):
    made = config(num_decoder_layers=1)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["is_encoder_decoder"] and saved["decoder_start_token_id"] == 1
    assert CosformerConfig.from_pretrained(tmp_path).to_dict() == made.to_dict()


def config(**change):
    return CosformerConfig(**{**SIZES, **change})


def encoder(*arguments, **options):
    return build(CosformerModel)(*arguments, **options)


def causal(*arguments, **options):
    return build(CosformerForCausalLM)(*arguments, **options)


def paired(*arguments, **options):
    return build(CosformerForConditionalGeneration)(*arguments, **options)


@torch.no_grad()
def beyond(steps):
    model = build(CosformerForCausalLM)
    cache = model(text(2, M + 1 - steps)).past_key_values
    return model(text(2, steps), past_key_values=cache)


@torch.no_grad()
def elsewhere(reset=False):
    """A text goes on in a model with another M."""
    cache = build(CosformerForCausalLM)(few).past_key_values
    if reset:
        cache.reset()
    return build(CosformerForCausalLM, max_position_embeddings=2 * M)(few, past_key_values=cache)


@torch.no_grad()
def of_as_many_states(turned=False):
    """A causal model's two layers and an encoder-decoder's one layer have two states each."""
    looks_back, pairs = (
        build(CosformerForCausalLM),
        build(CosformerForConditionalGeneration, num_decoder_layers=1),
    )
    if turned:
        return looks_back(few, past_key_values=pairs(few, decoder_input_ids=few).past_key_values)
    return pairs(few, decoder_input_ids=few, past_key_values=looks_back(few).past_key_values)


few, long = text(2, 3), text(2, M + 1)
REFUSED = [
    (lambda: config(num_attention_heads=5), OptionError, "num_attention_heads must divide hidden_size, got"),
    (lambda: config(hidden_size=0), ValueRangeError, "hidden_size must be an int of at least 1, got 0"),
    (lambda: config(vocab_size="11"), ValueRangeError, "vocab_size must be an int of at least 1, got '11'"),
    (lambda: config(num_decoder_layers=-1), ValueRangeError, "num_decoder_layers must be an int of at lea"),
    (lambda: config(act_fun="gelu"), OptionError, "act_fun must be one of elu, relu, got 'gelu'"),
    (lambda: config(hidden_act="none"), OptionError, "hidden_act must be one of"),
    (lambda: config(position_embeddings="sin"), OptionError, "must be one of learned, none, got 'sin'"),
    (lambda: config(dropout=1.0), ValueRangeError, r"dropout must lie in \[0, 1\), got 1.0"),
    (lambda: config(layer_norm_eps=0.0), ValueRangeError, "layer_norm_eps must be above 0"),
    (lambda: config(eos_token_id=[2, V]), ValueRangeError, "eos_token_id must lie in 0 … 10, got 11"),
    (lambda: config(is_encoder_decoder=True), OptionError, "needs num_decoder_layers of at least 1"),
    (lambda: build(CosformerForCausalLM, num_decoder_layers=2), OptionError, "must be 0 for a causal"),
    (lambda: CosformerForConditionalGeneration(config()), OptionError, "must be at least 1 for an"),
    (lambda: build(CosformerForSequenceClassification, num_labels=0), ValueRangeError, "num_labels must"),
    (lambda: encoder(long), ValueRangeError, "of 17 tokens is longer than max_position_embeddings = 16"),
    (lambda: causal(long), ValueRangeError, "a text of 17 tokens is longer than"),
    (lambda: elsewhere(), StateError, "were begun with max_position_embeddings = 16, this model has 32"),
    (
        lambda: of_as_many_states(),
        StateError,
        "hold 0 states of a source, this model has 1: they are of another",
    ),
    (lambda: of_as_many_states(turned=True), StateError, "hold 1 states of a source, this model has 0"),
    (lambda: beyond(8), ValueRangeError, "a text of 17 tokens is longer"),
    (lambda: beyond(1), ValueRangeError, "a text of 17 tokens is"),
    (lambda: paired(few, decoder_input_ids=long), ValueRangeError, "a text of 17 tokens"),
    (lambda: encoder(few, output_attentions=True), OptionError, "forms no matrix of weights to return"),
    (lambda: causal(few, output_attentions=True), OptionError, "forms no matrix of weights"),
    (lambda: causal(few, position_ids=few), OptionError, "position_ids: positions count"),
    (lambda: causal(few, cu_seq_lens_q=few), OptionError, "texts back to back are not taken"),
    (lambda: encoder(few, seq_idx=few), OptionError, "seq_idx: texts back to back are not taken"),
    (lambda: causal(few, head_mask=torch.ones(2, 3)), OptionError, "head_mask: no head can be left out"),
    (
        lambda: paired(few, decoder_input_ids=few, cross_attn_head_mask=few),
        OptionError,
        "cross_attn_head_mask: no",
    ),
    (lambda: encoder(few, token_type_ids=few % 2), OptionError, "token_type_ids must all be 0: these models"),
    (lambda: causal(few, past_key_values=DynamicCache()), OptionError, "must be a CosformerCache, got Dyn"),
    (lambda: causal(few, encoder_hidden_states=torch.zeros(2, 3, 12)), OptionError, "are for models with"),
    (
        lambda: build(CosformerForConditionalGeneration).decoder(
            inputs_embeds=torch.zeros(2, 3, 12, dtype=torch.float64)
        ),
        OptionError,
        "needs encoder_hidden_states",
    ),
    (
        lambda: build(CosformerForConditionalGeneration).decoder(few),
        OptionError,
        "the encoder embeds both texts",
    ),
    (lambda: paired(few), OptionError, "pass either decoder_input_ids or decoder_inputs_embeds"),
    (
        lambda: paired(
            few, encoder_outputs=(torch.zeros(2, 4, 12),), attention_mask=few, decoder_input_ids=few
        ),
        ShapeError,
        r"the source's attention_mask must have shape \(2, 4\), got \(2, 3\)",
    ),
    (
        lambda: build(CosformerForConditionalGeneration, bos_token_id=None)(few, labels=few),
        OptionError,
        "labels alone need decoder_start_token_id",
    ),
    (lambda: encoder(), OptionError, "pass either input_ids or inputs_embeds"),
    (lambda: encoder(few[0]), ShapeError, r"input_ids must have shape \[b, n\]"),
    (lambda: encoder(inputs_embeds=torch.zeros(2, 3, 5)), ShapeError, r"must have shape \[b, n, 12\]"),
    (lambda: encoder(few + 9), ValueRangeError, "ids must lie in 0 … 10"),
    (lambda: encoder(few / 2), DtypeError, "ids must be int64 or int32"),
    (lambda: encoder(few, torch.ones(2, 3, 3)), ShapeError, "attention_mask must have shape"),
    (lambda: causal(few).past_key_values.crop(1), StateError, "cannot be rolled back"),
]


@pytest.mark.parametrize(("call", "error", "sentence"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize("kind", ALL)
def test_what_tokenizers_give_for_single_texts_changes_nothing(kind):
    model, zeros = build(kind), torch.zeros(2, 6, dtype=torch.int64)
    assert torch.equal(answer(model, token_type_ids=zeros, head_mask=None, seq_idx=None), answer(model))


def test_a_cache_that_was_reset_serves_any_model() -> None:
    assert elsewhere(reset=True).past_key_values.get_seq_length() == few.shape[1]
