"""Checkpoints and tokenizers that are read: whatever is wrong with them is said before anything is used."""

from __future__ import annotations

import json
import math
import os
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from linattn.cli import app
from linattn.errors import CheckpointError, DataError
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.models.transnormer import TransNormerConfig as Released
from linattn.models.transnormer import TransNormerForCausalLM
from linattn.train import checkpoint, load_model, presets, tokenizers

SIZES = {"embed_dim": 8, "hidden_dim": 8, "num_heads": 2, "num_layers": 1, "glu_dim": 8}
WORDS = {"<eos>": 0, "one": 1, "two": 2, "?": 3}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a run."""
    model = TransNormerLM(TransNormerConfig(**SIZES, linear_use_lrpe_list=(1,)))
    return checkpoint.save(tmp_path, model, checkpoint.Run(1, {}, {}))


@pytest.fixture
def bare(folder):
    """The same without checksums, as somebody else's."""
    (folder / checkpoint.RUN).unlink()
    return folder


def words(folder, vocabulary=WORDS, **more):
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, **more).save_pretrained(folder)
    return folder


def of_words(folder, **more):
    """A checkpoint with a tokenizer."""
    folder.mkdir(exist_ok=True)
    model = TransNormerLM(TransNormerConfig(vocab_size=4, **SIZES))
    found = checkpoint.save(folder, model, checkpoint.Run(1, {}, {}))
    return words(found, **{"eos_token": "<eos>", "unk_token": "?", **more})


def changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def said(*arguments):
    """The sentence of a command that refuses."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def measured(run, *texts):
    given = [part for text in texts for part in ("--text", text)]
    result = invoke("eval", "--checkpoint", run, *given, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("fields", [{"decay_schedule": "paper"}, {"linear_act_fun": "relu"}])
def test_a_configuration_is_the_one_that_was_saved(folder, fields):
    changed(folder / "config.json", **fields)
    refused(folder, r"config\.json is damaged: its checksum")
    (folder / checkpoint.RUN).unlink()
    load_model(folder)  # of somebody else


@pytest.mark.parametrize("step", [0, 2, -1, True, "1", None])
def test_a_step_is_the_one_of_its_folder(folder, step):
    assert checkpoint.load_run(folder).step == 1
    changed(folder / checkpoint.RUN, step=step)
    with pytest.raises(CheckpointError, match=r"training\.json is damaged"):
        checkpoint.load_run(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "layers.0.token_mixer.lrpe.theta"])
def test_weights_are_finite(bare, name, value):
    tensors = load_file(bare / checkpoint.MODEL)
    tensors[name].flatten()[-1] = value
    save_file(tensors, bare / checkpoint.MODEL)
    refused(bare, f"NaN or infinite, in {name}: its training diverged; take an earlier")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_are_floating_point_numbers(bare, dtype):
    tensors = load_file(bare / checkpoint.MODEL)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, bare / checkpoint.MODEL)
    name = str(dtype).removeprefix("torch.")
    refused(bare, f"no floating point numbers of 16 to 64 bits: lm_head.weight is {name}")
    for command in (("generate",), ("eval", "--text", bare / "config.json")):
        assert f"lm_head.weight is {name}" in said(*command, "--checkpoint", bare)


def test_a_tensor_is_there_once(bare):
    tensors = load_file(bare / checkpoint.MODEL)
    tensors["model.lm_head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, bare / checkpoint.MODEL)
    refused(bare, r"lm_head\.weight is there twice")


@pytest.mark.parametrize("name", [None, ["model.safetensors"], "..", "a/b.safetensors", 3])
@pytest.mark.parametrize("others", [{}, {"lm_head.weight": "one.safetensors"}])
def test_an_index_names_files(bare, name, others):
    (bare / checkpoint.MODEL).rename(bare / "one.safetensors")
    places = {"metadata": {}, "weight_map": {"embed_tokens.weight": name, **others}}
    (bare / checkpoint.SHARDS).write_text(json.dumps(places))
    refused(bare, "it names no files of its folder")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100000, '{"weight_map": {}, "metadata": {}}', "\xff"])
def test_an_index_that_is_none(bare, text):
    (bare / checkpoint.MODEL).unlink()
    (bare / checkpoint.SHARDS).write_text(text, encoding="latin-1")
    refused(bare, r"safetensors\.index\.json is damaged: ")


def test_one_file_counts_where_there_is_an_index_too(tmp_path):
    """As transformers has it, whose `save_pretrained` leaves the index of an earlier call there."""
    config = Released(
        vocab_size=9, decoder_embed_dim=8, hidden_dim=8, decoder_attention_heads=2, decoder_layers=2,
        glu_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = [TransNormerForCausalLM(config) for _ in range(2)]
    made[0].save_pretrained(tmp_path, max_shard_size="1kB")
    shards = [*tmp_path.glob("model-*.safetensors")]
    kept = [(path, path.read_bytes()) for path in (*shards, tmp_path / checkpoint.SHARDS)]
    made[1].save_pretrained(tmp_path)
    for left in (kept[-1:], kept):
        for path, data in left:
            path.write_bytes(data)
        assert checkpoint.weight_files(tmp_path) == [tmp_path / checkpoint.MODEL]
        loaded, ours = TransNormerForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)
        for model in (loaded, ours):
            assert torch.equal(model.lm_head.weight, made[1].lm_head.weight)


def test_sizes_and_flags_of_a_configuration(bare):
    changed(bare / "config.json", tie_word_embeddings="false", eos_token_id=0)
    refused(bare, "tie_word_embeddings must be true or false, got 'false'")
    changed(bare / "config.json", tie_word_embeddings=False, vocab_size=10**30)
    refused(bare, "vocab_size must be at most 2147483647")
    (bare / "config.json").write_text("[" * 100000)
    refused(bare, r"config\.json is damaged")


def test_a_file_is_no_folder(folder):
    refused(folder / checkpoint.MODEL, f"is a file: give the folder of the checkpoint, {folder}")
    refused(folder.parent / "nowhere", "does not exist")
    shutil.rmtree(folder)
    refused(folder.parent, r"neither model\.safetensors nor a folder step-… or checkpoint-…")


def test_the_run_around_a_checkpoint_by_other_names(folder, tmp_path, monkeypatch):
    text = tmp_path.parent / f"{tmp_path.name} text"
    text.mkdir()
    (text / "a.txt").write_text("The quick brown fox.\n" * 9)
    alone = measured(folder, text)
    shutil.move(tmp_path, text / "run")
    step = text / "run" / folder.name
    (text / "run" / "latest").symlink_to(folder.name)
    os.utime(step)
    monkeypatch.chdir(step)
    for path in (step, text / "run" / "latest", "."):
        assert measured(path, text) == alone


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--out", "run", "--text"), ("eval", "--checkpoint", "step-00000001", "--text"),
        ("eval", "--text", "run", "--checkpoint"), ("generate", "--checkpoint"),
        ("train", "--text", "run", "--out", "out", "--preset"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_text_where_a_path_belongs(tmp_path, folder, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").write_text("text")
    assert "aaa" in said(*arguments, "a" * 400)


def test_a_path_that_is_empty(folder):
    assert "--checkpoint is empty" in said("generate", "--checkpoint", "")
    assert "--checkpoint is empty" in said("eval", "--checkpoint", "", "--text", folder)
    assert "--text is empty" in said("eval", "--checkpoint", folder, "--text", "")


def test_damaged_tokenizers_are_sentences(tmp_path):
    def fails(name, content, sentence):
        folder = words(tmp_path / "words")
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=sentence) as caught:
            tokenizers.load_tokenizer(folder)
        assert "\n" not in str(caught.value)

    fails("tokenizer.json", "{}", "holds no tokenizer: ")
    fails("tokenizer_config.json", "[]", "holds no tokenizer: ")
    fails("tokenizer_config.json", '{"tokenizer_class": 5}', "holds no tokenizer: ")
    remote = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    fails("tokenizer_config.json", json.dumps(remote), "holds no tokenizer: .*custom code")
    folder = words(tmp_path / "none", {}, eos_token=None)
    with pytest.raises(DataError, match="without a vocabulary"):
        tokenizers.load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer"])
def test_a_tokenizer_that_has_lost_its_vocabulary(folder, tmp_path, kind):
    """transformers makes one of special tokens alone, by which any text is one token, or none."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    fields = {"content": "  ", "special": False, "lstrip": False, "rstrip": False, "normalized": True}
    added = {"added_tokens_decoder": {"9": fields | {"single_word": False}}}
    (tmp_path / "text").write_text("one two")
    with pytest.raises(DataError, match="the file of its vocabulary is missing"):
        (tmp_path / "added").mkdir()
        place = tmp_path / "added" / "tokenizer_config.json"
        place.write_text(json.dumps({"tokenizer_class": kind, **added}))
        tokenizers.load_tokenizer(tmp_path / "added")
    for command in (("generate",), ("eval", "--text", tmp_path / "text")):
        assert "the file of its vocabulary is missing" in said(*command, "--checkpoint", folder)
    assert tokenizers.load_tokenizer(
        words(tmp_path / "one", {"<eos>": 0, "?": 1, "one": 2}, eos_token="<eos>")
    )


def test_tokens_that_were_added_are_a_vocabulary(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    bare.add_tokens([*"ACGT"])
    bare.save_pretrained(tmp_path / "letters")
    assert tokenizers.load_tokenizer(tmp_path / "letters").encode("ACGT") == [0, 1, 2, 3]
    special = words(
        tmp_path / "special", additional_special_tokens=[*WORDS], eos_token="<eos>", unk_token="?"
    )
    assert len(tokenizers.load_tokenizer(special)) == len(WORDS)


def test_rows_without_text_are_no_text(tmp_path):
    datasets.Dataset.from_dict({"text": [""] * 5}).save_to_disk(tmp_path / "rows")
    folder = of_words(tmp_path / "run")  # for which each row has a token, its end
    assert "there is no text to measure" in said("eval", "--checkpoint", folder, "--text", tmp_path / "rows")


def test_one_of_two_tied_tensors_will_do(bare):
    tensors = load_file(bare / checkpoint.MODEL)
    changed(bare / "config.json", tie_word_embeddings=True)
    want = tensors["embed_tokens.weight"]
    for left in ("embed_tokens.weight", "lm_head.weight"):
        names = {"embed_tokens.weight", "lm_head.weight"} - {left}
        save_file(
            {k: x for k, x in tensors.items() if k not in names} | {left: want}, bare / checkpoint.MODEL
        )
        model = load_model(bare)
        assert torch.equal(model.embed_tokens.weight, want) and torch.equal(model.lm_head.weight, want)
    save_file({k: x for k, x in tensors.items() if "norm" in k or "layers" in k}, bare / checkpoint.MODEL)
    refused(bare, "it lacks embed_tokens.weight, lm_head.weight")


@pytest.mark.parametrize("dtype", ["float99", 16, "nn", [], ""])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_that_torch_does_not_have(tmp_path, name, dtype):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transnormer", name: dtype}))
    with pytest.raises(CheckpointError, match="torch has no dtype"):
        presets.config_of(str(tmp_path), 256)


def test_a_tokenizer_that_the_model_does_not_know(tmp_path):
    folder = of_words(tmp_path)
    assert tokenizers.own_tokenizer(folder, 4) is not None
    with pytest.raises(CheckpointError, match="a tokenizer of 4 tokens for a model of 3"):
        tokenizers.own_tokenizer(folder, 3)


def test_unknown_words_are_counted(tmp_path):
    folder = of_words(tmp_path / "run")
    (tmp_path / "known").write_text("one two one")
    (tmp_path / "unknown").write_text("one three four")
    assert measured(folder, tmp_path / "known")["unknown_tokens"] == 0
    assert measured(folder, tmp_path / "unknown")["unknown_tokens"] == 2
    spoken = invoke("eval", "--checkpoint", folder, "--text", tmp_path / "unknown", "--device", "cpu")
    assert "2 of them stand for words that the tokenizer does not know" in spoken.stdout
    assert "unknown_tokens" in measured(of_words(tmp_path / "end", unk_token="<eos>"), tmp_path / "known")
    found = measured(of_words(tmp_path / "same", unk_token="<eos>"), tmp_path / "known")
    assert found["unknown_tokens"] == 0  # the end of a text is not a word
    bare = of_words(tmp_path / "bare", unk_token=None)  # its tokenizer.json alone names one
    assert measured(bare, tmp_path / "unknown")["unknown_tokens"] == 2


def test_a_tokenizer_s_longest_text_is_no_limit(tmp_path, monkeypatch):
    """Nothing is cut, and nothing is said: transformers' would be that reading on must fail."""
    folder, said = of_words(tmp_path / "run", model_max_length=2), []
    monkeypatch.setattr("logging.Logger.warning", lambda *given, **more: said.append(given))
    (tmp_path / "text").write_text("one two " * 9)
    assert measured(folder, tmp_path / "text")["tokens"] == 19 and not said


def test_a_prompt_that_is_no_utf8(tmp_path):
    found = invoke("generate", "--checkpoint", of_words(tmp_path), "--prompt", "one \udce9", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["prompt"] == "one \udce9"
