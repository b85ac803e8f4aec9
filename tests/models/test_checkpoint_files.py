"""What the files of a checkpoint hold, in every way that they come: looked at tensor by tensor."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from linattn.errors import CheckpointError
from linattn.models.cosformer import (
    CosformerConfig,
    CosformerDecoder,
    CosformerForCausalLM,
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
    CosformerModel,
)
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM, TransNormerModel
from tests.models.test_cosformer import build
from tests.models.test_transnormer import VOCAB, make
from tests.models.test_transnormer_checkpoints import shard, with_more

EXTRA, FILE = "layers.0.channel_mixer.l1.weight", "model.safetensors"


def local(folder):
    return {"pretrained_model_name_or_path": folder}


def pickled(folder):
    """Make a pickle of the safetensors."""
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    return {"pretrained_model_name_or_path": folder, "use_safetensors": False}


def of_a_repository(folder):
    """Put the files where those of a repository are kept."""
    revision, kept = "a" * 40, folder / "models--own--model"
    snapshot = kept / "snapshots" / revision
    for place in (kept / "refs", snapshot):
        place.mkdir(parents=True)
    (kept / "refs" / "main").write_text(revision)
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(snapshot / file.name)
    return {"pretrained_model_name_or_path": "own/model", "cache_dir": folder, "local_files_only": True}


def in_memory(folder):
    config, tensors = TransNormerConfig.from_pretrained(folder), load_file(folder / FILE)
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}


ways = pytest.mark.parametrize("way", [local, pickled, of_a_repository, in_memory])
readers = pytest.mark.parametrize("reader", [TransNormerForCausalLM, TransNormerModel])


@ways
@readers
@pytest.mark.parametrize("name", [EXTRA, "model.lm_head.weight"])
def test_a_tensor_is_there_once(tmp_path, way, reader, name):
    with_more(make(), tmp_path, **{name: torch.ones(12 if name == EXTRA else VOCAB, 8)})
    with pytest.raises(
        CheckpointError, match=rf"{name.removeprefix('model.')} is there twice, with 'model\.'"
    ):
        reader.from_pretrained(**way(tmp_path))


@readers
def test_a_name_with_the_prefix_more_than_once(tmp_path, reader):
    """transformers takes it away as often as it is there."""
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    name = f"model.{EXTRA}"
    for more, says in (
        ({f"model.{name}": tensors[name] * 0}, f"{EXTRA} is there twice"),
        ({f"model.{name}": tensors[name].int()}, f"{EXTRA} is there twice"),
    ):
        save_file(tensors | more, tmp_path / FILE, {"format": "pt"})
        with pytest.raises(CheckpointError, match=says):
            reader.from_pretrained(tmp_path)
    other = {k: x for k, x in tensors.items() if k != name} | {f"model.{name}": tensors[name].int()}
    save_file(other, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no floating point numbers of 16 to 64 bits: {EXTRA} is I32"):
        reader.from_pretrained(tmp_path)


def test_the_revision_that_is_read_is_looked_at(tmp_path):
    make().save_pretrained(tmp_path)
    config, options = TransNormerConfig.from_pretrained(tmp_path), of_a_repository(tmp_path)
    kept, other = tmp_path / "models--own--model", "b" * 40
    shutil.copytree(kept / "snapshots" / ("a" * 40), kept / "snapshots" / other)
    (kept / "refs" / "v1").write_text(other)
    with_more(make(), kept / "snapshots" / other, **{EXTRA: torch.ones(12, 8)})
    for given in ({}, {"config": config}):
        TransNormerForCausalLM.from_pretrained(**options, **given)
        with pytest.raises(CheckpointError, match="is there twice"):
            TransNormerForCausalLM.from_pretrained(**options, **given, revision="v1")


def test_a_tensor_is_there_once_in_several_files(tmp_path):
    make().save_pretrained(tmp_path, max_shard_size="4kB")
    shard(tmp_path / f"{FILE}.index.json", lambda x: x.update({EXTRA: torch.ones(12, 8)}))
    with pytest.raises(CheckpointError, match=f"{EXTRA} is there twice"):
        TransNormerForCausalLM.from_pretrained(tmp_path)


def test_a_tensor_of_cosformer_is_there_once(tmp_path):
    with_more(build(CosformerForCausalLM), tmp_path, **{"norm.weight": torch.ones(12)})
    with pytest.raises(CheckpointError, match=r"norm.weight is there twice, with 'decoder\.' and without"):
        CosformerForCausalLM.from_pretrained(tmp_path)


@ways
@readers
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.filterwarnings("ignore:Casting complex values")  # torch's, before the tensor is looked at
def test_weights_are_of_floating_point(tmp_path, way, reader, dtype):
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    name = f"model.{EXTRA}"
    save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no floating point numbers of 16 to 64 bits: {EXTRA} is "):
        reader.from_pretrained(**way(tmp_path))


@ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_floating_point_are_read(tmp_path, way, dtype):
    make().to(dtype).save_pretrained(tmp_path)
    assert TransNormerForCausalLM.from_pretrained(**way(tmp_path)).config.vocab_size == VOCAB


def test_integers_of_a_model_s_own_are_read(tmp_path):
    """As quantised weights are, and what a derived class counts."""

    class Counting(TransNormerForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("seen", torch.tensor(3))

    Counting(make().config).save_pretrained(tmp_path)
    assert Counting.from_pretrained(tmp_path).seen.item() == 3


TRUST = "pickled weights can run code: where you trust them, pass use_safetensors=False"


@pytest.mark.parametrize(
    ("files", "options", "says"),
    [
        ([], {}, "has no model.safetensors"),
        ([], {"use_safetensors": False}, "has no pytorch_model.bin"),
        ([], {"variant": "fp16"}, "has no model.fp16.safetensors"),
        (["pytorch_model.bin"], {}, f"has no model.safetensors, it has pytorch_model.bin: {TRUST}"),
        (
            ["pytorch_model.bin.index.json"],
            {},
            f"has no model.safetensors, it has pytorch_model.bin.index.json: {TRUST}",
        ),
        (["pytorch_model.fp16.bin"], {}, "has no model.safetensors"),
        (
            ["pytorch_model.bin", FILE],
            {"variant": "fp16"},
            "has no model.fp16.safetensors, it has model.safetensors: leave variant out",
        ),
        (
            [FILE],
            {"use_safetensors": False},
            "has no pytorch_model.bin, it has model.safetensors: leave use_safetensors=False out",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_the_file_that_is_missing_is_named(tmp_path, files, options, says, subfolder):
    folder = tmp_path / subfolder
    make().config.save_pretrained(folder)
    for name in files:
        (folder / name).touch()
    with pytest.raises(CheckpointError) as caught:
        TransNormerForCausalLM.from_pretrained(tmp_path, subfolder=subfolder, **options)
    assert str(caught.value) == f"{folder} {says}"


@pytest.mark.parametrize("kind", [CosformerDecoder, CosformerModel])
def test_a_bare_stack_is_read_as_what_it_is(kind, tmp_path):
    """The tensors of both have the same names and shapes."""
    build(kind).save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path)) is kind
    both_ways = CosformerModel, CosformerForMaskedLM, CosformerForSequenceClassification
    for other in (CosformerForCausalLM, CosformerDecoder) if kind is CosformerModel else both_ways:
        with pytest.raises(CheckpointError, match=f"a {kind.__name__}, which a {other.__name__} is not"):
            other.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="is of another model: a "):
            other.from_pretrained(tmp_path, config=CosformerConfig.from_pretrained(tmp_path))
        kind.from_pretrained(tmp_path, config=build(other).config)  # which says nothing of the folder
    with pytest.raises(CheckpointError, match="is of another model: a "):
        (AutoModel if kind is CosformerDecoder else AutoModelForCausalLM).from_pretrained(tmp_path)
