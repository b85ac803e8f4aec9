"""Training by transformers' Trainer: interrupted and continued, fine-tuned, with words, on a dataset."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from linattn.cli import app
from linattn.errors import CheckpointError, DataError, OptionError, ValueRangeError
from linattn.models.transnormer import TransNormerConfig
from linattn.train import checkpoint, corpus, load_model, published, run_folder, tokenizers
from linattn.train.evaluate import nats_of
from tests.train.stopping import killed_after

LINE = "The quick brown fox jumps over the lazy dog.\n"
SIZES = {
    "decoder_embed_dim": 16,
    "hidden_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "glu_dim": 24,
    "linear_use_lrpe_list": [1, 0],
    "pad_token_id": None,
}
PLAN = published.Plan(steps=6, batch=2, seq_len=16, lr=1e-2, warmup=2, save_every=3)
CPU = torch.device("cpu")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINE * 60)
    return path


@pytest.fixture
def sizes(tmp_path):
    folder = tmp_path / "sizes"
    TransNormerConfig(vocab_size=256, **SIZES).save_pretrained(folder)
    return folder


def words(folder):
    """A tokenizer of words and spaces, as a folder holds it."""
    found = sorted({"<eos>", *LINE.replace("\n", "").split(" "), "Ġ", "Ċ", "[UNK]"})
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(found)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return tokenizer


def run(sizes, text, out, plan=PLAN, **options):
    published.train(str(sizes), corpus.read_corpus(text), plan, out, device=CPU, as_json=True, **options)
    return load_file(out / "model.safetensors")


def test_an_interrupted_run_goes_on_bit_for_bit(sizes, text, tmp_path, capsys):
    whole = run(sizes, text, tmp_path / "whole")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    bits = [line["held_out_bits_per_byte"] for line in lines if "held_out_bits_per_byte" in line]
    assert len(bits) == 2 and bits[1] < bits[0] < 8.5
    with killed_after(4):
        run(sizes, text, tmp_path / "cut")
    with pytest.raises(OptionError, match="checkpoint-3"):
        run(sizes, text, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoint-10").mkdir()  # as a killed run leaves one
    again = run(sizes, text, tmp_path / "cut", resume=True)
    assert whole.keys() == again.keys()
    for name, x in whole.items():
        assert torch.equal(x, again[name]), name


def test_a_finished_run_learns_nothing_more(sizes, text, tmp_path, capsys):
    out = tmp_path / "out"
    whole = run(sizes, text, out)
    (out / "model.safetensors").unlink()  # as a run leaves it that was killed after its last step
    capsys.readouterr()
    again = run(sizes, text, out, resume=True)
    assert whole.keys() == again.keys() and capsys.readouterr().out == ""
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    assert [path.name for path in published.checkpoint.of_trainer(out)] == ["checkpoint-3", "checkpoint-6"]


def test_a_finished_run_is_read_everywhere(sizes, text, tmp_path):
    out = tmp_path / "out"
    run(sizes, text, out)
    model = load_model(out)  # without transformers
    found = CliRunner().invoke(app, ["eval", "--checkpoint", str(out), "--text", str(text), "--json"])
    assert found.exit_code == 0, found.output
    fields = json.loads(found.output)
    ids = np.frombuffer((LINE * 60).encode(), np.uint8).astype(np.int32)
    assert fields["tokens"] == fields["bytes"] == len(ids)
    assert fields["bits_per_byte"] == pytest.approx(nats_of(model, ids) / math.log(2) / len(ids), rel=1e-12)
    assert nats_of(model, ids, chunk=7) == pytest.approx(nats_of(model, ids), rel=1e-5)
    read: list[int] = []
    assert nats_of(model, ids, context=5, progress=read.append) > nats_of(model, ids)
    assert sum(read) == len(ids) - -(-len(ids) // 5)  # nothing predicts a context's first
    made = CliRunner().invoke(
        app, ["generate", "--checkpoint", str(out), "--prompt", "The ", "--tokens", "9", "--device", "cpu"]
    )
    assert made.exit_code == 0 and made.output.startswith("The ") and len(made.output.encode()) >= 14
    # its weights are what a fine-tuning begins with
    lr = 1e-6
    tuned = run(
        out, text, tmp_path / "tuned", published.Plan(steps=1, batch=2, seq_len=16, lr=lr, save_every=1)
    )
    before = load_file(out / "model.safetensors")
    for (
        name,
        x,
    ) in before.items():  # AdamW's first step moves a weight by the learning rate at most, and decays it
        assert (tuned[name] - x).abs().max() <= 2 * lr, name


def test_with_a_tokenizer(sizes, text, tmp_path):
    tokenizer = words(tmp_path / "words")
    out = tmp_path / "out"
    found = CliRunner().invoke(
        app,
        ["train", "--preset", str(sizes), "--text", str(text), "--out", str(out), "--json", "--device", "cpu",
         "--tokenizer", str(tmp_path / "words"), "--steps", "3", "--batch", "2", "--seq-len", "8"],
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert load_model(out).config.vocab_size == len(tokenizer)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(out, interrupted / "checkpoint-3")
    (interrupted / "checkpoint-3" / "trainer_state.json").touch()
    for folder in (out, interrupted):
        made = CliRunner().invoke(
            app, ["generate", "--checkpoint", str(folder), "--prompt", "The quick", "--tokens", "5"]
        )
        assert made.exit_code == 0 and made.output.startswith("The quick"), made.output
        judged = CliRunner().invoke(app, ["eval", "--checkpoint", str(folder), "--text", str(text)])
        assert "over 541 tokens of 2,700 bytes" in judged.output


def test_a_dataset(sizes, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [f"text {i}: {LINE}" for i in range(40)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "data")
    tokenizer = words(tmp_path / "words")
    found = corpus.read_corpus(tmp_path / "data", tokenizer)
    assert (found.train == tokenizer.eos_token_id).sum() == 38 and found.held_out_bytes == sum(
        map(len, rows[38:])
    )
    run(sizes, tmp_path / "data", tmp_path / "out")
    datasets.Dataset.from_dict({"other": rows}).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match='no column "text", only other'):
        corpus.read_corpus(tmp_path / "bad")


def test_a_run_goes_on_as_what_it_was(sizes, text, tmp_path):
    out = tmp_path / "out"
    run(sizes, text, out)
    with pytest.raises(OptionError, match=r"a run with lr 0\.01, not 0\.1"):
        run(
            sizes,
            text,
            out,
            published.Plan(steps=6, batch=2, seq_len=16, lr=0.1, warmup=2, save_every=3),
            resume=True,
        )
    text.write_text(LINE * 61)
    with pytest.raises(OptionError, match="a run with text "):
        run(sizes, text, out, resume=True)
    small = CliRunner().invoke(app, ["train", "--text", str(text), "--out", str(out), "--device", "cpu"])
    assert small.exit_code == 2 and "a run of a published size (checkpoint-" in small.output
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        run(sizes, text, tmp_path / "file")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_that_is_no_run_s_is_not_replaced(sizes, text, tmp_path, name):
    """Neither the weights to fine-tune nor others; nor is a run of the small loop hidden behind them."""
    out = tmp_path / "out"
    published.model_of(str(sizes), 256).save_pretrained(out)
    (out / "model.safetensors").rename(out / name)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said = rf"out holds a model already \({name}\): choose another --out$"
    presets = [sizes, out] if name.endswith("safetensors") else [sizes]
    for preset in presets:
        with pytest.raises(OptionError, match=said):
            run(preset, text, out)
    command = ["train", "--text", str(text), "--out", str(out), "--steps", "1", "--device", "cpu"]
    for more in ([], ["--resume"]):
        small = CliRunner().invoke(app, [*command, "--batch", "1", "--seq-len", "16", *more])
        assert small.exit_code == 2 and f"holds a model already ({name})" in small.stderr
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_tokenizer_is_part_of_a_run(sizes, text, tmp_path):
    """Another of the same size, whose tokens have other ids, is not the one."""
    out, folder = tmp_path / "out", tmp_path / "words"
    words(folder)

    def go_on(**options):
        tokenizer = tokenizers.load_tokenizer(folder)
        ids = corpus.read_corpus(text, tokenizer)
        plan = dataclasses.replace(PLAN, steps=2)
        published.train(str(sizes), ids, plan, out, device=CPU, as_json=True, tokenizer=tokenizer, **options)

    go_on()
    go_on(resume=True)
    place = folder / "tokenizer.json"
    before, fields = place.read_text(), json.loads(place.read_text())
    ids = fields["model"]["vocab"]
    ids["fox"], ids["dog."] = ids["dog."], ids["fox"]
    place.write_text(json.dumps(fields))
    with pytest.raises(OptionError, match=r"out is a run with tokenizer '\w{8}', not '\w{8}'"):
        go_on(resume=True)
    place.write_text(before)
    go_on(resume=True)
    facts = json.loads((out / run_folder.FACTS).read_text())
    assert facts.pop("config")
    (out / run_folder.FACTS).write_text(json.dumps(facts))  # as runs were once written down
    with pytest.raises(OptionError, match="out is a run of an older linattn"):
        go_on(resume=True)


def test_what_a_text_and_transformers_cannot_give(sizes, text, tmp_path):
    with pytest.raises(DataError, match=r"has 158 windows of 16 tokens, a batch needs 159: give more text"):
        run(sizes, text, tmp_path / "out", dataclasses.replace(PLAN, batch=159))
    run(sizes, text, tmp_path / "all", dataclasses.replace(PLAN, batch=158, steps=1, seed=2**32 - 1))
    command = ["train", "--preset", str(sizes), "--text", str(text), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*command, "--seed", str(2**32)])
    assert found.exit_code == 2 and f"seed must be from 0 to {2**32 - 1} for" in found.stderr
    with pytest.raises(ValueRangeError, match="seed must be from 0"):
        dataclasses.replace(PLAN, seed=-1)


def test_bad_runs(sizes, text, tmp_path):
    config = sizes / "config.json"
    (sizes / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a pickle"):
        published.model_of(str(sizes), 256)
    (sizes / "pytorch_model.bin").unlink()
    before = config.read_text()
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="type 'llama', not 'transnormer'"):
        published.model_of(str(sizes), 256)
    config.write_text(before)
    with pytest.raises(OptionError, match="tiny, small, 385m"):
        published.model_of("9b", 256)
    with pytest.raises(DataError, match="one window needs 4096"):
        run(sizes, text, tmp_path / "a", published.Plan(seq_len=4096))
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        run(sizes, text, tmp_path / "b", resume=True)
    assert not (tmp_path / "b").exists()
    with checkpoint.alone(tmp_path / "b"):
        with pytest.raises(OptionError, match="another run is training into"):
            run(sizes, text, tmp_path / "b")
        assert [path.name for path in (tmp_path / "b").iterdir()] == [checkpoint.LOCK]
    with pytest.raises(DataError, match="holds no tokenizer"):
        tokenizers.load_tokenizer(tmp_path)
    published.model_of(str(sizes), 256).bfloat16().save_pretrained(tmp_path / "weights")
    assert published.model_of(str(tmp_path / "weights"), 256).dtype == torch.float32
    with pytest.raises(CheckpointError, match="a vocabulary of 256, the text's tokens need 300"):
        published.model_of(str(tmp_path / "weights"), 300)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_pads_and_cuts_is_not_learned(sizes, text, tmp_path, side, monkeypatch):
    """Windows are full of text: no token is padding, so none of their labels has to say so."""
    tokenizer = words(tmp_path / "words")
    whole = corpus.encoded([LINE * 3, "fox", LINE], tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.backend_tokenizer.enable_padding(direction=side, length=64, pad_id=tokenizer.pad_token_id)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(tmp_path / "padding")
    saved = json.loads((tmp_path / "padding" / "tokenizer.json").read_text())
    assert saved["padding"]["direction"].lower() == side and saved["truncation"]["max_length"] == 8
    tokenizer = tokenizers.load_tokenizer(tmp_path / "padding")
    assert np.array_equal(corpus.encoded([LINE * 3, "fox", LINE], tokenizer), whole)
    seen, plain = [], published.Trainer.training_step

    def watched(self, model, inputs, *arguments, **options):
        seen.append(inputs)
        return plain(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(published.Trainer, "training_step", watched)
    ids = corpus.read_corpus(text, tokenizer)
    published.train(str(sizes), ids, PLAN, tmp_path / "out", device=CPU, tokenizer=tokenizer)
    assert len(seen) == PLAN.steps
    for inputs in seen:
        assert not (inputs["input_ids"] == tokenizer.pad_token_id).any()
        assert torch.equal(inputs["labels"], inputs["input_ids"]) and "attention_mask" not in inputs
