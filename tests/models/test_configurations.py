"""What configurations refuse: a field that cannot be, by its name, with what may be there and what came."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linattn.errors import CheckpointError, LinattnError, OptionError, ValueRangeError
from linattn.models import TransNormerConfig as PlainConfig
from linattn.models.cosformer import CosformerConfig, CosformerForCausalLM, CosformerForSequenceClassification
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM, preset

SIZES = {
    TransNormerConfig: {
        "vocab_size": 23, "decoder_embed_dim": 8, "decoder_layers": 2, "decoder_attention_heads": 2,
        "hidden_dim": 8, "glu_dim": 12,
    },
    CosformerConfig: {
        "vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 16,
    },
}  # fmt: skip
MODELS = {TransNormerConfig: TransNormerForCausalLM, CosformerConfig: CosformerForCausalLM}
BOTH = pytest.mark.parametrize("kind", SIZES)
# By field: values that cannot be.
FLAGS = ("false", "no", "maybe", 3, 0, 1, None)
IDS = (23, -1, "2", 2.0, True)
WRONG = {
    **dict.fromkeys(("use_cache", "tie_word_embeddings"), FLAGS),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), (*IDS, [2])),
    "eos_token_id": (*IDS, [2, 23], [None], ["2"]),
    "initializer_range": (-1, 0, 0.0, "0.02", float("nan"), float("inf"), None, True),
    "output_hidden_states": ("maybe",),  # transformers' own field and check
    "is_encoder_decoder": ("no", "false", 1),
}
OWN = {
    TransNormerConfig: {
        **dict.fromkeys(("bias", "no_scale_embedding", "add_bos_token"), FLAGS),
        "init_std": (-1, "0.02"),
        "linear_use_lrpe_list": (5, "10", [1], [2, 0]),
    },
    CosformerConfig: {
        "decoder_start_token_id": (*IDS, [2]),
        "layer_norm_eps": (0, "1e-5", None),
        "dropout": ("0.1", None, -0.1, 1),
        "hidden_act": (["gelu"], None, "none"),
        "act_fun": (["relu"], None),
    },
}


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        (TransNormerConfig, "decay_shedule", "decay_schedule"),
        (TransNormerConfig, "decoder_layer", "decoder_layers"),
        (TransNormerConfig, "num_hidden_layer", "num_hidden_layers"),
        (CosformerConfig, "max_position_embedding", "max_position_embeddings"),
        (CosformerConfig, "num_decoder_layer", "num_decoder_layers"),
    ],
)
def test_misspelt_fields_are_refused(kind, name, meant, tmp_path):
    with pytest.raises(OptionError, match=f"{kind.__name__} has no field '{name}', did you mean {meant}?"):
        kind(**SIZES[kind], **{name: 1})
    fields = {
        "sep_token_id": 3,
        "cls_token_id": 4,
        "architectures": ["x"],
        "torch_dtype": "float32",
        "my_own": 5,
    }
    config = kind(**SIZES[kind], **fields)  # as transformers keeps them
    config.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).my_own == config.my_own == 5
    assert config.sep_token_id == 3


@BOTH
@pytest.mark.parametrize("name", ["use_cach", "use_cahce", "usecache", "tie_word_embedding"])
def test_misspelt_fields_are_refused_when_they_are_set(kind, name, tmp_path):
    config = kind(**SIZES[kind])
    with pytest.raises(OptionError, match=f"has no field '{name}'"):
        setattr(config, name, True)
    config.save_pretrained(tmp_path)  # as it was
    assert not hasattr(kind.from_pretrained(tmp_path), name)


@BOTH
@pytest.mark.parametrize(
    "name",
    [
        "tie_encoder_decoder", "eot_token_id", "eoi_token_id", "boi_token_id", "bos_token", "eos_token",
        "pad_token", "add_eos_token", "encoder_layers", "kv_hidden_dim", "cls_token_id",
    ],
)  # fmt: skip
def test_fields_of_other_models_are_kept(kind, name, tmp_path):
    """Near names that are no slips, in a folder and on a configuration that is trained with."""
    config = kind(**SIZES[kind], **{name: 1})
    setattr(config, f"{name}s_own", 2)
    MODELS[kind](config).train().save_pretrained(tmp_path)
    found = MODELS[kind].from_pretrained(tmp_path).config
    assert getattr(found, name) == 1 and getattr(found, f"{name}s_own") == 2


@BOTH
def test_training_begins_with_tokens_that_have_embeddings(kind):
    """What is learned without them could not be saved."""
    model = MODELS[kind](kind(**SIZES[kind])).eval()
    model.config.pad_token_id = 23
    with pytest.raises(ValueRangeError, match="pad_token_id 23 is not among 23 rows of embeddings"):
        model.train()
    model.resize_token_embeddings(24)
    assert model.train() is model and model.training and not model.eval().training


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kind in SIZES
        for name, values in {**WRONG, **OWN[kind]}.items()
        for value in values
    ],
)
def test_a_field_that_cannot_be_is_named(kind, name, value):
    own = kind.attribute_map.get(name, name)
    with pytest.raises((OptionError, ValueRangeError)) as caught:
        kind(**SIZES[kind], **{name: value})
    says = str(caught.value)
    shown = value[-1] if isinstance(value, list) else value
    assert own in says and str(shown) in says, says


@pytest.mark.parametrize(
    ("kind", "name", "value", "says"),
    [
        (TransNormerConfig, "bias", "false", "bias must be True or False, got 'false'"),
        (TransNormerConfig, "init_std", -1, "init_std must be above 0 and finite, got -1"),
        (TransNormerConfig, "bos_token_id", -7, "bos_token_id must lie in 0 … 22, got -7"),
        (TransNormerConfig, "decoder_layers", 0, "decoder_layers must be an int of at least 1, got 0"),
        (TransNormerConfig, "decoder_embed_dim", 0, "decoder_embed_dim must be an int of at least 1, got 0"),
        (
            TransNormerConfig,
            "hidden_dim",
            9,
            "decoder_attention_heads must divide hidden_dim, got 2 heads and width 9",
        ),
        (
            TransNormerConfig,
            "linear_use_lrpe_list",
            [1],
            "linear_use_lrpe_list must hold a 0 or 1 for each of 2 decoder_layers, or nothing, got (1,)",
        ),
        (CosformerConfig, "use_cache", "maybe", "use_cache must be True or False, got 'maybe'"),
        (CosformerConfig, "eos_token_id", [2, "3"], "eos_token_id must lie in 0 … 22, got '3'"),
    ],
)
def test_a_refusal_says_what_may_be_there(kind, name, value, says):
    with pytest.raises(LinattnError) as caught:
        kind(**{**SIZES[kind], name: value})
    assert str(caught.value) == says


@BOTH
def test_what_may_be_is_taken(kind):
    none = kind(**SIZES[kind], pad_token_id=None, bos_token_id=None, eos_token_id=None)
    assert none.pad_token_id is none.bos_token_id is none.eos_token_id is None
    for ids in (0, 22, [2, 22], (0, 1)):
        assert kind(**SIZES[kind], eos_token_id=ids).eos_token_id == ids
    for flag in (True, False):
        assert kind(**SIZES[kind], use_cache=flag, tie_word_embeddings=flag).use_cache is flag


@BOTH
@pytest.mark.parametrize(("name", "value"), [("use_cache", "maybe"), ("eos_token_id", 23)])
def test_a_folder_or_an_argument_that_cannot_be_is_refused(kind, name, value, tmp_path):
    MODELS[kind](kind(**SIZES[kind])).save_pretrained(tmp_path)
    with pytest.raises(LinattnError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{name: value})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(LinattnError, match=name):
        AutoConfig.from_pretrained(tmp_path)


@BOTH
def test_a_field_that_transformers_checks_is_refused_when_it_is_set(kind):
    config = kind(**SIZES[kind])
    with pytest.raises(OptionError, match="is_encoder_decoder"):
        config.is_encoder_decoder = "yes"
    assert config.is_encoder_decoder is False


@BOTH
@pytest.mark.parametrize("tokens", [40, 7])
def test_a_resized_vocabulary_is_saved_and_loaded(kind, tokens, tmp_path):
    model = MODELS[kind](kind(**SIZES[kind])).eval()
    model.resize_token_embeddings(tokens)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == tokens
    ids = torch.tensor([[3, 4, tokens - 1]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert type(loaded)(copy.deepcopy(model.config)).config.vocab_size == tokens


@BOTH
@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_a_vocabulary_is_not_cut_below_a_special_token(kind, name, tmp_path):
    model = MODELS[kind](kind(**SIZES[kind], **{name: 17}))
    with pytest.raises(ValueRangeError, match=f"{name} 17 is not among 16 rows .*: set config.{name}"):
        model.resize_token_embeddings(13, pad_to_multiple_of=8)
    with pytest.raises(ValueRangeError, match="at least 1 row, got 0"):
        model.resize_token_embeddings(0)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == 23
    model.resize_token_embeddings(18)
    setattr(model.config, name, None if name == "pad_token_id" else 2)
    model.resize_token_embeddings(13, pad_to_multiple_of=8)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 16


@BOTH
@pytest.mark.parametrize(("name", "value"), [("use_cache", "maybe"), ("vocab_size", 2), ("eos_token_id", 99)])
def test_what_would_not_be_loaded_is_not_saved(kind, name, value, tmp_path):
    model = MODELS[kind](kind(**SIZES[kind]))
    setattr(model.config, name, value)
    for one in (model, model.config):
        with pytest.raises(LinattnError, match="token_id must lie in" if name == "vocab_size" else name):
            one.save_pretrained(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


CHANGED = [
    (TransNormerConfig, {"decay_schedule": "paper"}),
    (TransNormerConfig, {"linear_act_fun": "relu"}),
    (TransNormerConfig, {"linear_use_lrpe_list": [1, 0]}),
    (TransNormerConfig, {"decoder_embed_dim": 16}),
    (TransNormerConfig, {"bias": True}),
    *((CosformerConfig, {name: value}) for name, value in (("act_fun", "elu"), ("num_hidden_layers", 1))),
    (CosformerConfig, {"max_position_embeddings": 8}),
    *((kind, {"vocab_size": 40}) for kind in SIZES),
]


@pytest.mark.parametrize(("kind", "change"), CHANGED, ids=str)
def test_what_would_be_loaded_as_another_model_is_not_saved(kind, change, tmp_path):
    model = MODELS[kind](kind(**SIZES[kind]))
    ((name, value),) = change.items()
    before = getattr(model.config, name)
    for one in (model, model.base_model):
        setattr(model.config, name, value)
        with pytest.raises(
            OptionError, match=r"configuration makes .*: what would be loaded is another model"
        ):
            one.save_pretrained(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
        setattr(model.config, name, before)
        one.save_pretrained(tmp_path / "again")


def test_decays_that_would_be_lost_are_not_saved(tmp_path):
    model = TransNormerForCausalLM(TransNormerConfig(**SIZES[TransNormerConfig]))
    mixer = model.model.layers[1].token_mixer
    mixer.log_decay.mul_(2)
    with pytest.raises(
        OptionError, match=r"layers\.1\.token_mixer has other decays than decay_schedule says"
    ):
        model.save_pretrained(tmp_path)
    mixer.reset_parameters()
    copy.deepcopy(model).save_pretrained(tmp_path)


def test_a_classifier_of_other_labels_is_not_saved(tmp_path):
    config = CosformerConfig(**SIZES[CosformerConfig], num_labels=3)
    model = CosformerForSequenceClassification(config)
    model.config.num_labels = 4
    with pytest.raises(OptionError, match=r"classifier\.out_features is 3, and the configuration makes 4"):
        model.save_pretrained(tmp_path)
    model.encoder.save_pretrained(tmp_path)  # for a classifier yet to come
    assert CosformerForSequenceClassification.from_pretrained(tmp_path).classifier.out_features == 4


@BOTH
def test_a_folder_of_another_model_says_so_first(kind, tmp_path):
    (other,) = {*SIZES} - {kind}
    MODELS[other](other(**SIZES[other])).save_pretrained(tmp_path)
    says = f"is of a model of type '{other.model_type}', not '{kind.model_type}'"
    for one in (kind, MODELS[kind]):
        with pytest.raises(OptionError, match=says):
            one.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["decoder_layers", "num_hidden_layers"])
def test_presets_of_fewer_layers(name):
    assert preset("1b", **{name: 3}).linear_use_lrpe_list == [1, 0, 0]
    assert preset("1b").linear_use_lrpe_list == [1] + [0] * 15
    assert preset("1b", **{name: 2}, linear_use_lrpe_list=[0, 1]).linear_use_lrpe_list == [0, 1]
    assert preset("1b", **{name: 2}, linear_use_lrpe_list=None).linear_use_lrpe_list == []
    for wrong in ("3", 0, 2.0):
        with pytest.raises(ValueRangeError, match="decoder_layers must be an int of at least 1"):
            preset("1b", **{name: wrong})


def test_the_released_configuration_is_read(tmp_path):
    """The fields of the released 385M model, as its folder has them."""
    fields = {
        "architectures": ["TransnormerForCausalLM"], "model_type": "transnormer", "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64000, "use_cache": True, "init_std": 0.02,
        "decoder_embed_dim": 1024, "decoder_layers": 24, "decoder_attention_heads": 8,
        "no_scale_embedding": False, "add_bos_token": False, "norm_type": "simplermsnorm",
        "linear_use_lrpe_list": [1] + [0] * 23, "hidden_dim": 1024, "linear_act_fun": "swish",
        "glu_dim": 2816, "bias": False, "torch_dtype": "bfloat16", "transformers_version": "4.31.0",
        "auto_map": {"AutoConfig": "configuration_transnormer.TransnormerConfig"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.eos_token_id, config.bias, config.dtype) == (2, False, torch.bfloat16)


@pytest.mark.parametrize("name", ["bias", "no_scale_embedding"])
@pytest.mark.parametrize("value", FLAGS)
def test_flags_of_the_plain_configuration(name, value):
    with pytest.raises(OptionError, match=f"{name} must be True or False, got {value!r}"):
        PlainConfig(**{name: value})
    with pytest.raises(CheckpointError, match=f"damaged: {name} must be True or False, got {value!r}"):
        PlainConfig.from_dict({**PlainConfig().to_dict(), name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder_layers": 2, "hidden_dim": 64, "depth": 3},
        {"num_attention_heads": 16, "num_hidden_layers": 3, "intermediate_size": 24, "hidden_size": 40},
        {"decoder_attention_heads": 2, "num_attention_heads": 4},
        {"num_heads": 2, "embed_dim": 8},  # no fields of a released configuration
        {"add_bos_token": False, "bos_token_id": 1, "pad_token_id": 0, "dtype": "float32", "init_std": 0.1},
        {"linear_act_fun": None, "decay_schedule": "paper", "linear_use_lrpe_list": None, "bias": True},
    ],
    ids=str,
)
def test_both_classes_read_the_same(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transnormer", **fields}))
    assert PlainConfig.from_dict(fields) == AutoConfig.from_pretrained(tmp_path).parts()


@pytest.mark.parametrize(
    "fields",
    [
        {"decay_schedul": "paper", "eos_token_id": 2}, {"linear_act_func": "relu", "architectures": ["x"]},
        {"num_atention_heads": 4}, {"num_attention_heads": 3}, {"init_std": 0}, {"initializer_range": "0.1"},
        {"eos_token_id": 64000}, {"use_cache": 1}, {"norm_type": None}, {"linear_use_lrpe_list": "10"},
        {"hidden_size": 1.5}, {"add_bos_token": None}, {"bias": "false"}, {"tie_word_embeddings": 0},
    ],
    ids=str,
)  # fmt: skip
def test_both_classes_refuse_the_same(fields):
    with pytest.raises((OptionError, ValueRangeError)) as of_transformers:
        TransNormerConfig.from_dict(fields)
    with pytest.raises(CheckpointError) as caught:
        PlainConfig.from_dict(fields)
    assert str(caught.value) == f"the configuration is damaged: {of_transformers.value}"


def test_a_derived_configuration_reads_what_it_comes_from(tmp_path):
    class Own(TransNormerConfig):
        model_type = "own"

    TransNormerConfig(vocab_size=33).save_pretrained(tmp_path)
    assert Own.from_pretrained(tmp_path).vocab_size == 33
    Own(vocab_size=34).save_pretrained(tmp_path)
    assert Own.from_pretrained(tmp_path).vocab_size == 34
    with pytest.raises(OptionError, match="is of a model of type 'own', not 'transnormer'"):
        TransNormerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [TransNormerConfig, CosformerConfig])
def test_remote_code_is_asked_for(kind, tmp_path):
    """As TRL does; nothing of it is saved that was not there."""
    config = kind()
    assert config.auto_map == {} and "auto_map" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert type(AutoConfig.from_pretrained(tmp_path)) is kind
    given = {"AutoConfig": "configuration_own.Own"}
    config.auto_map = given
    assert kind.from_dict(config.to_dict()).auto_map == given and kind().auto_map == {}
