"""What is saved is compared with what a model is now, not with what it was when it was built."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import nn

from linattn.errors import LinattnError, OptionError
from linattn.models.cosformer import (
    CosformerConfig,
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
    CosformerModel,
)
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM
from tests.models.test_configurations import SIZES as TWO
from tests.models.test_transnormer import same

LAYERS = {TransNormerConfig: "decoder_layers", CosformerConfig: "num_hidden_layers"}
SIZES = {kind: TWO[kind] | {layers: 3} for kind, layers in LAYERS.items()}
LRPE = "linear_use_lrpe_list"
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def make(kind, **fields):
    torch.manual_seed(0)
    config = kind.config_class
    return kind(config(**SIZES[config] | fields)).eval()


def output(model):
    options = (
        {"decoder_input_ids": IDS} if model.config.is_encoder_decoder and hasattr(model, "decoder") else {}
    )
    with torch.no_grad():
        return model(IDS, **options)[0]


def saved_and_loaded(model, folder):
    model.double().save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    weights = loaded.state_dict()
    assert all(torch.equal(weights.pop(name), x) for name, x in model.state_dict().items()) and not weights
    same(output(loaded), output(model))


def first_layer(model):
    model.model.layers = model.model.layers[:1]
    model.config.decoder_layers = 1


def without_the_second(model):
    layers = model.base_model.layers
    model.base_model.layers = nn.ModuleList([layers[0], layers[2]])
    model.config.num_hidden_layers = 2


def another_classifier(model):
    model.classifier = nn.Linear(8, 5)
    model.config.num_labels = model.num_labels = 5


def another_embedding(model):
    model.base_model.embed_positions = nn.Embedding(9, 8)
    for layer in model.base_model.layers:
        layer.attention.reweight = type(layer.attention.reweight)(9)
    model.config.max_position_embeddings = 9


def with_elu(model):
    for layer in model.model.layers:
        layer.token_mixer.feature_map = "elu+1"
    model.config.linear_act_fun = "1+elu"


def with_wider_mlps(model):
    for layer in model.base_model.layers:
        layer.fc1, layer.fc2 = nn.Linear(8, 20), nn.Linear(20, 8)
    model.config.intermediate_size = 20


def field(name, value):
    return lambda model: setattr(model.config, name, value)


SAME = {
    "first layer": (TransNormerForCausalLM, {}, first_layer),
    "feature map": (TransNormerForCausalLM, {}, with_elu),
    "no lrpe": (TransNormerForCausalLM, {}, field(LRPE, [0, 0, 0])),
    "nor a list": (TransNormerForCausalLM, {}, field(LRPE, None)),
    "an empty one": (TransNormerForCausalLM, {"linear_use_lrpe_list": [0] * 3}, field(LRPE, ())),
    "swish": (TransNormerForCausalLM, {}, field("linear_act_fun", "swish")),
    "None": (TransNormerForCausalLM, {"linear_act_fun": None}, field("linear_act_fun", "None")),
    "two layers": (CosformerForMaskedLM, {}, without_the_second),
    "two causal layers": (CosformerForCausalLM, {}, without_the_second),
    "two encoding layers": (CosformerForConditionalGeneration, {"num_decoder_layers": 1}, lambda model: (
        setattr(model.encoder, "layers", model.encoder.layers[1:]), field("num_hidden_layers", 2)(model))),
    "classifier": (CosformerForSequenceClassification, {}, another_classifier),
    "positions": (CosformerForCausalLM, {}, another_embedding),
    "mlps": (CosformerForMaskedLM, {}, with_wider_mlps),
    "an encoder's decoder": (CosformerModel, {}, field("num_decoder_layers", 2)),
    "activation": (CosformerForMaskedLM, {"hidden_act": "silu"}, field("hidden_act", "swish")),
    "tanh": (CosformerForMaskedLM, {"hidden_act": "gelu_new"}, field("hidden_act", "gelu_pytorch_tanh")),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "change"), SAME.values(), ids=SAME)
def test_what_would_be_loaded_right_is_saved(kind, fields, change, tmp_path):
    model = make(kind, **fields)
    change(model)
    saved_and_loaded(model, tmp_path)


OTHER = {
    TransNormerForCausalLM: {
        "vocab_size": 24, "decoder_embed_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 4,
        "hidden_dim": 16, "glu_dim": 13, "linear_act_fun": "relu", "linear_use_lrpe_list": [0, 0, 1],
        "bias": True, "decay_schedule": "paper",
    },
    CosformerForMaskedLM: {
        "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 13, "max_position_embeddings": 17, "act_fun": "elu", "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-6, "position_embeddings": "none",
    },
    CosformerForCausalLM: {"num_decoder_layers": 1, "hidden_act": "relu", "num_hidden_layers": 4},
    CosformerForSequenceClassification: {"num_labels": 3, "hidden_size": 4, "hidden_act": "prelu"},
}  # fmt: skip
CASES = [(kind, name, value) for kind, changes in OTHER.items() for name, value in changes.items()]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_what_would_be_loaded_as_another_model_is_not_saved(kind, name, value, tmp_path):
    model = make(kind)
    setattr(model.config, name, value)
    with pytest.raises(
        OptionError, match=re.escape(f"config.{name} is {value!r}, this model was built with")
    ):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("value", [0, 1, 3])
def test_layers_of_a_decoder_with_a_source(value, tmp_path):
    model = make(CosformerForConditionalGeneration, num_decoder_layers=2)
    model.config.num_decoder_layers = value
    with pytest.raises(LinattnError, match="num_decoder_layers"):
        model.save_pretrained(tmp_path)


def test_layers_that_keep_the_decays_of_another_place_are_not_saved(tmp_path):
    model = make(TransNormerForCausalLM)
    model.model.layers, model.config.decoder_layers = model.model.layers[:2], 2
    with pytest.raises(OptionError, match=r"decay_schedule is 'released', .* built with 'other decays'"):
        model.save_pretrained(tmp_path)


def test_a_model_pickled_by_a_former_version_is_saved(tmp_path):
    for kind in (TransNormerForCausalLM, CosformerForSequenceClassification):
        model = make(kind)
        vars(model).pop("_built", None)
        saved_and_loaded(pickle.loads(pickle.dumps(model)), tmp_path)


class Half(TransNormerForCausalLM):
    """Has the layers and decays that it likes."""

    def __init__(self, config, mark=None):
        super().__init__(config)
        self.model.layers = self.model.layers[:2]


class Marked(Half):
    """Wants more than a configuration."""

    def __init__(self, config, mark):
        super().__init__(config)


def test_a_class_of_ones_own_may_do_as_it_likes(tmp_path):
    model = make(Half)
    saved_and_loaded(model, tmp_path)
    model.save_pretrained(tmp_path)
    model.config.glu_dim = 16
    with pytest.raises(OptionError, match=r"config\.glu_dim is 16, this model was built with 12"):
        model.save_pretrained(tmp_path)
    marked = Marked(model.config.__class__(**SIZES[TransNormerConfig]), "x")
    with pytest.raises(OptionError, match="decoder_layers"):
        marked.save_pretrained(tmp_path)


def test_modules_of_ones_own_are_not_asked(tmp_path):
    model = make(TransNormerForCausalLM)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    mixer = model.model.layers[0].token_mixer
    mixer.qkvu_proj = nn.Sequential(mixer.qkvu_proj)
    model.save_pretrained(tmp_path / "one")
    other = make(CosformerForMaskedLM)
    other.encoder.layers[0].act = nn.Sequential(nn.GELU())
    other.save_pretrained(tmp_path / "two")
