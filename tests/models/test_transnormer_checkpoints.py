"""Configurations and checkpoints of the Hugging Face TransNormerLLM: released, saved, damaged."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from linattn.errors import CheckpointError, OptionError
from linattn.models.cosformer import (
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
    CosformerModel,
)
from linattn.models.huggingface.loading import load_whole
from linattn.models.transnormer import (
    PRESETS,
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerModel,
    preset,
)
from linattn.train import load_model
from tests.models.test_cosformer import build
from tests.models.test_transnormer import SIZES, VOCAB, make, plain, same, text


@pytest.fixture
def model():
    return make()


def equal(loaded, model):
    """Equal weights; products of weights that lie elsewhere in memory may be summed in another order."""
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    ids = text(2, 9)
    same(loaded(ids).logits, model(ids).logits)


def test_a_released_checkpoint_loads_without_remote_code(model, tmp_path):
    """Released names and fields, with the pointers to remote code that such a folder has."""
    ids = text(2, 9)
    fields = {
        **SIZES,
        "model_type": "transnormer",
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_transnormer.TransnormerConfig",
            "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
        },
        "torch_dtype": "float64",
        "linear_act_fun": "silu",
        "norm_type": "simplermsnorm",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for prefix in ("model.", ""):
        tensors = {
            (name if name.startswith("lm_head") else prefix + name): torch.tensor(x)
            for name, x in plain(model).items()
        }
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(loaded) is TransNormerForCausalLM and loaded.dtype == torch.float64
        equal(loaded, model)
        base = AutoModel.from_pretrained(tmp_path).eval()
        assert type(base) is TransNormerModel
        same(model.lm_head(base(ids).last_hidden_state), model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 8
    assert type(AutoModelForCausalLM.from_config(loaded.config)) is TransNormerForCausalLM


def test_saved_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = text(2, 9)
    equal(TransNormerForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), model)
    half = TransNormerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    own = model.model.layers[0].token_mixer
    for other in (half, made, copy.deepcopy(model).bfloat16()):
        mixer = other.model.layers[0].token_mixer
        assert other.lm_head.weight.dtype == torch.bfloat16
        assert mixer.lrpe.theta.dtype == torch.float32  # angles are not rounded
        assert torch.equal(
            mixer.lrpe.theta, (mixer.lrpe.default() if other is made else own.lrpe.theta).float()
        )
        assert torch.equal(mixer.log_decay, own.log_decay)  # nor decays
    assert {state.kv.dtype for state in half(ids, use_cache=True).past_key_values.states} == {torch.float32}


DAMAGES = {
    "lacks": (
        lambda x: x.pop("model.layers.1.channel_mixer.l2.weight"),
        "lacks model.layers.1.channel_mixer",
    ),
    "extra": (lambda x: x.update(other=torch.ones(2)), "has unknown other"),
    "bias": (lambda x: x.update({"lm_head.bias": torch.ones(VOCAB)}), "has unknown lm_head.bias"),
    "scale": (lambda x: x.update({"lm_head.weight_scale": torch.ones(1)}), "unknown lm_head.weight_scale"),
    "shape": (
        lambda x: x.update({"lm_head.weight": torch.ones(VOCAB, 9)}),
        r"lm_head.weight has shape \(23, 9\), this",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_not_loaded(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    change, words = DAMAGES[damage]
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def with_more(model, folder, **tensors):
    """Save a model and put tensors beside its own."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


LEFT_OUT = [
    (CosformerForCausalLM, CosformerForCausalLM, ("lm_head.bias", "classifier.weight")),
    (CosformerForMaskedLM, CosformerForMaskedLM, ("lm_head.bias", "classifier.scale")),
    (CosformerForMaskedLM, CosformerModel, ("lm_head.bias", "classifier.scale")),
    (CosformerForMaskedLM, CosformerForSequenceClassification, ("lm_head.scale", "classifier.scale")),
    (
        CosformerForConditionalGeneration,
        CosformerForConditionalGeneration,
        ("lm_head.bias", "classifier.bias"),
    ),
    (None, TransNormerModel, ("lm_head.bias",)),
]


@pytest.mark.parametrize(("kind", "reader", "names"), LEFT_OUT)
def test_a_model_inside_leaves_out_nothing_of_the_whole(kind, reader, names, tmp_path):
    """A model without a head reads those that have one, and leaves out what heads are made of alone."""
    made = make() if kind is None else build(kind)
    for name in names:
        with_more(made, tmp_path, **{name: torch.ones(3)})
        with pytest.raises(CheckpointError, match=f"has unknown {name}"):
            reader.from_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    reader.from_pretrained(tmp_path)


def test_a_class_of_ones_own_says_what_it_leaves_out(tmp_path):
    class Own(TransNormerForCausalLM):
        _keys_to_ignore_on_load_unexpected = [r"^extra\."]  # noqa: RUF012

        def __init__(self, config):
            super().__init__(config)
            self.post_init()  # as classes do that add modules

    with_more(make(), tmp_path, **{"extra.weight": torch.ones(3)})
    Own.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has unknown extra\.weight"):
        TransNormerForCausalLM.from_pretrained(tmp_path)
    with_more(make(), tmp_path, **{"lm_head.bias": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"has unknown lm_head\.bias"):
        Own.from_pretrained(tmp_path)


def test_a_configuration_has_a_list_of_its_own():
    given = [1, 0]
    config = TransNormerConfig(decoder_layers=2, linear_use_lrpe_list=given)
    given[1] = 1
    assert config.linear_use_lrpe_list == [1, 0]


def test_a_truncated_file_is_not_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def shard(index, change):
    """Change the file that holds the head."""
    file = index.parent / json.loads(index.read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def renamed(index, **places):
    """Change what an index says."""
    fields = json.loads(index.read_text())
    fields["weight_map"] |= places
    index.write_text(json.dumps(fields))


SHARD_DAMAGES = {
    "missing file": (
        lambda index: next(index.parent.glob("*-00002-*.safetensors")).unlink(),
        r"-00002-of-\d+.safetensors is missing: model.safetensors.index.json names it",
    ),
    "no files": (
        lambda index: [file.unlink() for file in index.parent.glob("*.safetensors")],
        r"-00001-of-\d+.safetensors is missing",
    ),
    "unknown file": (lambda index: renamed(index, other="9.safetensors"), "9.safetensors is missing"),
    "unknown tensor": (
        lambda index: renamed(index, other=next(index.parent.glob("*.safetensors")).name),
        r"index.json is damaged: its files lack other \(1 in all\)",
    ),
    "lost tensor": (
        lambda index: shard(index, lambda x: x.update(other=x.pop("lm_head.weight"))),
        "is damaged: its files lack lm_head.weight",
    ),
    "truncated file": (
        lambda index: (file := next(index.parent.glob("*.safetensors"))).write_bytes(file.read_bytes()[:-9]),
        "is damaged: Error while deserializing",
    ),
    "no JSON": (lambda index: index.write_text("{"), "index.json is damaged: Expecting property name"),
    "no map": (lambda index: index.write_text("{}"), "index.json is damaged: it must have a weight_map and"),
    "no list": (lambda index: index.write_text("[]"), "index.json is damaged: it must have a weight_map and"),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
@pytest.mark.parametrize("options", [{}, {"subfolder": "inner"}], ids=str)
def test_several_files_that_do_not_fit_are_not_loaded(model, tmp_path, damage, options):
    folder = tmp_path / options.get("subfolder", "")
    model.save_pretrained(folder, max_shard_size="4kB")
    index = folder / "model.safetensors.index.json"
    assert TransNormerForCausalLM.from_pretrained(tmp_path, **options).config.vocab_size == VOCAB
    change, words = SHARD_DAMAGES[damage]
    change(index)
    with pytest.raises(CheckpointError, match=words):
        TransNormerForCausalLM.from_pretrained(tmp_path, **options)


def test_a_missing_file_of_a_variant_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="4kB", variant="fp64")
    loaded = TransNormerForCausalLM.from_pretrained(tmp_path, variant="fp64", dtype=torch.float64)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model.fp64-00002-of-\d+.safetensors is missing"):
        TransNormerForCausalLM.from_pretrained(tmp_path, variant="fp64")
    with pytest.raises(CheckpointError, match=r"has no model\.other\.safetensors$"):
        TransNormerForCausalLM.from_pretrained(tmp_path, variant="other")


@pytest.mark.parametrize(
    ("says", "error", "words"),
    [
        (
            "a/b does not appear to have a file named model-00002-of-00003.safetensors.",
            OSError,
            "model-00002-of",
        ),
        (
            "a/b does not appear to have a file named model.safetensors or",
            CheckpointError,
            r"^a/b has no model\.safetensors$",
        ),
    ],
)
def test_what_a_repository_lacks_is_named(says, error, words):
    """Where there is no folder, transformers says which file is not there."""

    def load(*arguments, **options):
        raise OSError(says)

    with pytest.raises(error, match=words):
        load_whole(load, "a/b")


def test_one_file_is_read_whatever_an_index_beside_it_says(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    equal(TransNormerForCausalLM.from_pretrained(tmp_path), model)


def test_pickles_are_read_only_when_asked(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for options in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(CheckpointError, match="use_safetensors=False"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False, dtype=torch.float64)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decay_schedule": "linear"}, "decay_schedule"),
        ({"norm_type": "layernorm"}, "norm_type"),
        ({"linear_act_fun": "gelu"}, "linear_act_fun"),
        ({"linear_use_lrpe_list": [1]}, "linear_use_lrpe_list"),
        ({"decoder_attention_heads": 5}, "decoder_attention_heads"),
    ],
)
def test_configurations_that_cannot_be(fields, words):
    with pytest.raises(OptionError, match=words):
        TransNormerConfig(**{**SIZES, **fields})


def test_activations(model):
    ids = text(1, 6)
    logits = {}
    for act in ("silu", "swish", "relu", "1+elu", "None"):
        other = make(linear_act_fun=act)
        logits[act] = other(ids).logits
        assert other.model.layers[0].token_mixer.options()["feature_map"] in ("silu", "relu", "elu+1", None)
    assert torch.equal(logits["silu"], logits["swish"])
    assert len({x.sum().item() for x in logits.values()}) == 4


def test_tied_embeddings(tmp_path):
    model = make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = TransNormerForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# Without embeddings: layers (5 d^2 + 3 d glu), and d angles of the first layer.
@pytest.mark.parametrize(
    ("name", "inner", "in_words"),
    [
        ("385m", 333_448_192, 0.385e9),
        ("1b", 889_194_496, 1.0e9),
        ("3b", 2_747_271_680, 2.9e9),
        ("7b", 6_574_575_616, 6.8e9),
        ("15b", 14_423_168_000, 14.83e9),
        ("175b", 172_738_228_224, 175e9),
    ],
)
def test_presets_have_the_published_sizes(name, inner, in_words):
    with torch.device("meta"):
        model = TransNormerModel(preset(name))
    count = sum(x.numel() for name, x in model.named_parameters() if not name.startswith("embed"))
    assert count == inner
    # what is published counts one embedding, of a vocabulary between 50 and 100 thousand
    width = model.config.decoder_embed_dim
    assert inner + 20_000 * width < in_words * 1.03 and in_words * 0.97 < inner + 110_000 * width
    assert model.config.linear_use_lrpe_list == [1] + [0] * (model.config.decoder_layers - 1)
    assert set(PRESETS) == {"385m", "1b", "3b", "7b", "15b", "175b"}


def test_several_files_are_one_checkpoint(model, tmp_path):
    """Of transformers, read without it."""
    model.save_pretrained(tmp_path, max_shard_size="4kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_model(tmp_path)
    ids = text(2, 9)
    assert (loaded(ids) - model.float()(ids).logits).abs().max() < 1e-4
    next(tmp_path.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="00002"):
        load_model(tmp_path)
