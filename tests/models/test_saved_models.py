"""What is saved is compared with what a model is now, not with what it was when it was built."""

from __future__ import annotations

import pickle
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune

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


# of a field another value, and what of the model differs from what that makes
OTHER = {
    TransNormerForCausalLM: {
        "vocab_size": (24, "model.embed_tokens.num_embeddings is 23"),
        "decoder_embed_dim": (16, "model.embed_tokens.embedding_dim is 8"),
        "decoder_layers": (2, "there is model.layers.2"),
        "decoder_attention_heads": (4, "model.layers.0.token_mixer.num_heads is 2"),
        "hidden_dim": (16, "model.layers.0.token_mixer.qkvu_proj.out_features is 32"),
        "glu_dim": (13, "model.layers.0.channel_mixer.l1.out_features is 12"),
        "linear_act_fun": ("relu", "model.layers.0.token_mixer.feature_map is silu"),
        "linear_use_lrpe_list": ([0, 0, 1], "there is no model.layers.2.token_mixer.lrpe"),
        "bias": (True, "model.layers.0.token_mixer.qkvu_proj.bias is None"),
        "decay_schedule": ("paper", "model.layers.0.token_mixer.table is [-0.06250063 -0.00390629]"),
    },
    CosformerForMaskedLM: {
        "vocab_size": (24, "encoder.embed_tokens.num_embeddings is 23"),
        "hidden_size": (16, "encoder.embed_tokens.embedding_dim is 8"),
        "num_hidden_layers": (2, "there is encoder.layers.2"),
        "num_attention_heads": (4, "encoder.layers.0.attention.num_heads is 2"),
        "intermediate_size": (13, "encoder.layers.0.fc1.out_features is 12"),
        "max_position_embeddings": (17, "encoder.embed_positions.num_embeddings is 16"),
        "act_fun": ("elu", "encoder.layers.0.attention.feature_map is relu"),
        "hidden_act": ("gelu_new", "encoder.layers.0.act is GELUActivation()"),
        "layer_norm_eps": (1e-6, "encoder.layers.0.attention_norm.eps is 1e-05"),
        "position_embeddings": ("none", "there is encoder.embed_positions"),
    },
    CosformerForCausalLM: {
        "num_decoder_layers": (1, "num_decoder_layers must be 0 for a causal model, got 1"),
        "hidden_act": ("relu", "decoder.layers.0.act is GELUActivation()"),
        "num_hidden_layers": (4, "there is no decoder.layers.3"),
        "position_embeddings": ("none", "there is decoder.embed_positions"),
        "max_position_embeddings": (17, "decoder.embed_positions.num_embeddings is 16"),
    },
    CosformerForSequenceClassification: {
        "num_labels": (3, "classifier.out_features is 2"),
        "hidden_size": (4, "encoder.embed_tokens.embedding_dim is 8"),
        "hidden_act": ("prelu", "encoder.layers.0.act is GELUActivation()"),
    },
}
CASES = [(kind, name, *found) for kind, changes in OTHER.items() for name, found in changes.items()]


@pytest.mark.parametrize(("kind", "name", "value", "says"), CASES)
def test_what_would_be_loaded_as_another_model_is_not_saved(kind, name, value, says, tmp_path):
    model = make(kind)
    setattr(model.config, name, value)
    with pytest.raises(OptionError, match=f"^{re.escape(says)}"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("value", [0, 1, 3])
def test_layers_of_a_decoder_with_a_source(value, tmp_path):
    model = make(CosformerForConditionalGeneration, num_decoder_layers=2)
    model.config.num_decoder_layers = value
    with pytest.raises(LinattnError, match=r"num_decoder_layers|there is (no )?decoder\.layers"):
        model.save_pretrained(tmp_path)


def test_layers_that_keep_the_decays_of_another_place_are_not_saved(tmp_path):
    model = make(TransNormerForCausalLM)
    model.model.layers, model.config.decoder_layers = model.model.layers[:2], 2
    with pytest.raises(OptionError, match=r"layers\.1\.token_mixer\.table is \["):
        model.save_pretrained(tmp_path)


def test_a_model_pickled_by_a_former_version_is_saved(tmp_path):
    for kind in (TransNormerForCausalLM, CosformerForSequenceClassification):
        model = make(kind)
        vars(model).pop("_built", None)
        saved_and_loaded(pickle.loads(pickle.dumps(model)), tmp_path)


class Half(TransNormerForCausalLM):
    """Has the layers and decays that it likes."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = self.model.layers[:2]


class Marked(Half):
    """Wants more than a configuration."""

    def __init__(self, config, mark):
        super().__init__(config)


class Tagger(TransNormerForCausalLM):
    """May be told more than a configuration."""

    def __init__(self, config, tags=3):
        super().__init__(config)
        self.tagger = nn.Linear(8, tags)
        self.post_init()


def test_a_class_of_ones_own_may_do_as_it_likes(tmp_path):
    model = make(Half)
    saved_and_loaded(model, tmp_path)
    model.save_pretrained(tmp_path)
    model.config.glu_dim = 16
    with pytest.raises(OptionError, match=r"l1\.out_features is 12, and the configuration makes 16"):
        model.save_pretrained(tmp_path)
    marked = Marked(TransNormerConfig(**SIZES[TransNormerConfig]), "x")
    marked.double().eval().save_pretrained(tmp_path / "marked")
    loaded = Marked.from_pretrained(tmp_path / "marked", "x", dtype=torch.float64)
    same(output(loaded), output(marked))
    tagger = Tagger(TransNormerConfig(**SIZES[TransNormerConfig]), tags=5)
    tagger.save_pretrained(tmp_path / "tagger")
    assert Tagger.from_pretrained(tmp_path / "tagger", tags=5).tagger.out_features == 5


def test_modules_of_ones_own_are_not_asked(tmp_path):
    model = make(TransNormerForCausalLM)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    mixer = model.model.layers[0].token_mixer
    mixer.qkvu_proj = nn.Sequential(mixer.qkvu_proj)
    model.save_pretrained(tmp_path / "one")
    other = make(CosformerForMaskedLM)
    other.encoder.layers[0].act = nn.Sequential(nn.GELU())
    parametrizations.weight_norm(other.encoder.layers[0].fc1)
    other.encoder.layers[1].extra = nn.Dropout(0.5)
    other.config.dropout, other.config.pad_token_id = 0.25, 3
    other.save_pretrained(tmp_path / "two")
    model = make(TransNormerForCausalLM)
    model.value_head = nn.Linear(8, 1)
    model.save_pretrained(tmp_path / "three")
    assert "value_head.weight" in load_file(tmp_path / "three" / "model.safetensors")


class Named(TransNormerForCausalLM):
    """Takes its configuration by name."""

    def __init__(self, *, config):
        super().__init__(config)


def test_weights_that_are_elsewhere_or_no_numbers_are_not_compared():
    Named(config=TransNormerConfig(**SIZES[TransNormerConfig])).check_saved()
    for tied in (True, False):
        model = make(TransNormerForCausalLM, tie_word_embeddings=tied)
        model.model.embed_tokens.weight.data[0, 0] = torch.nan
        model.check_saved()
        for parameter in model.parameters():
            parameter.data = torch.empty(0)  # as DeepSpeed does
        model.check_saved()


def test_compiled_modules_take_either_name(tmp_path):
    model, other = (make(TransNormerForCausalLM).double() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    plain = model.state_dict()
    want = output(model)
    for one in (model, other):
        one.model.layers[1] = torch.compile(one.model.layers[1], backend="eager")
    for given in (plain, model.state_dict()):
        fresh = make(TransNormerForCausalLM).double()
        fresh.model.layers[1] = torch.compile(fresh.model.layers[1], backend="eager")
        assert not fresh.load_state_dict(given, strict=False).missing_keys
        same(output(fresh), want)
    whole = {f"_orig_mod.{name}": x for name, x in plain.items()}
    other.save_pretrained(tmp_path, state_dict=whole)
    same(output(TransNormerForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()), want)


def assigned(model):
    model.load_state_dict(model.state_dict(), assign=True)


def pruned(model):
    prune.l1_unstructured(model.lm_head, "weight", 0.3)


def wrapped(model):
    model.lm_head = nn.Sequential(model.lm_head)


def adapted(model):
    """As `add_adapter` of transformers does, which wants a newer peft in newer versions."""
    config = peft.LoraConfig(target_modules=["qkvu_proj"], modules_to_save=["lm_head", "norm"], r=2)
    peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("change", [assigned, pruned, wrapped, adapted])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft's, of merging
def test_heads_that_are_not_asked(change, tmp_path):
    """Of the same numbers, or of somebody's own."""
    model = make(TransNormerForCausalLM, tie_word_embeddings=True)
    change(model)
    if change in (wrapped, adapted):
        model.check_saved()
    else:
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_are_embeddings_or_not(tied, tmp_path):
    model = make(TransNormerForCausalLM, tie_word_embeddings=tied)
    saved_and_loaded(model, tmp_path / "one")
    model.config.tie_word_embeddings = not tied
    says = f"the head {'is' if tied else 'is not'} the embedding, and the configuration says otherwise"
    with pytest.raises(OptionError, match=says):
        model.save_pretrained(tmp_path / "two")
    with pytest.raises(OptionError, match=r"lm_head\.bias is a tensor, and the configuration makes None"):
        other = make(TransNormerForCausalLM)
        other.lm_head = nn.Linear(8, 23)
        other.save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_an_eps_of_ones_own_would_be_lost(tmp_path):
    model = make(TransNormerForCausalLM)
    model.model.layers[1].norm.eps = 0.25
    with pytest.raises(OptionError, match=r"layers\.1\.norm\.eps is 0\.25, .* makes 1e-06"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["5GB", "4kB"])
def test_compiled_layers_are_saved_under_their_own_names(tied, size, tmp_path):
    model = make(TransNormerForCausalLM, tie_word_embeddings=tied).double()
    want = output(model)
    for whole, part in ((model.model, "layers.1"), (model, "lm_head"), (model.model, "embed_tokens")):
        whole.set_submodule(part, torch.compile(whole.get_submodule(part), backend="eager"))
        for i, given in enumerate(([], [True], [True, model.state_dict()])):
            model.save_pretrained(tmp_path / str(i), *given, max_shard_size=size)
            loaded = TransNormerForCausalLM.from_pretrained(tmp_path / str(i), dtype=torch.float64).eval()
            same(output(loaded), want)
            shutil.rmtree(tmp_path / str(i))


def test_saving_draws_no_numbers(tmp_path):
    """Else a run that saves would go on otherwise than one that does not."""
    model = make(TransNormerForCausalLM)
    before = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
