"""`linattn eval` and `linattn generate` on checkpoints and texts that are not as they should be."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from linattn.cli import app, generate
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.train import checkpoint, load_model

SIZES = {"embed_dim": 8, "hidden_dim": 8, "num_heads": 2, "num_layers": 1, "glu_dim": 8}


def saved(folder, **changes):
    """A run's folder with one checkpoint."""
    torch.manual_seed(0)
    model = TransNormerLM(TransNormerConfig(**SIZES | {k: v for k, v in changes.items() if k != "scale"}))
    torch.nn.init.normal_(model.lm_head.weight, std=changes.get("scale", 1.0))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, model, checkpoint.Run(1, {}, {}))
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 4)
    return tmp_path / "text"


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(sentence, *arguments):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sentence in result.stderr


def measured(run, *texts, **options):
    given = [part for text in texts for part in ("--text", text)]
    result = invoke("eval", "--checkpoint", run, *given, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_model_that_is_not_over_bytes_is_refused_by_both(tmp_path, text):
    run = saved(tmp_path / "run", vocab_size=300)
    for command in (("eval", "--text", text), ("generate",)):
        refused("the model's vocabulary must be 256, it is 300", *command, "--checkpoint", run)
    run = saved(tmp_path / "half")
    (checkpoint.find(run) / "tokenizer.json").write_text("{}")
    for command in (("eval", "--text", text), ("generate",)):
        refused("a tokenizer.json but no tokenizer_config.json", *command, "--checkpoint", run)


def test_several_texts_are_measured_as_one(tmp_path, text):
    run = saved(tmp_path / "run")
    (tmp_path / "b.txt").write_text("Another text.\n")
    (tmp_path / "both").write_text((text / "a.txt").read_text() + "Another text.\n")
    found = measured(run, text, tmp_path / "b.txt")
    assert found == measured(run, tmp_path / "both")
    assert found != measured(run, tmp_path / "b.txt", text)


def test_training_takes_one_text(tmp_path, text):
    both = ("--text", text, "--text", text)
    refused("--text is one file or folder, got 2", "train", *both, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_checkpoint_s_own_run_is_no_text(tmp_path, text):
    run = saved(tmp_path / "run")
    alone = measured(run, text)
    inside = saved(text / "run")
    checkpoint.save(inside, load_model(inside), checkpoint.Run(2, {}, {}))
    for path in (inside, checkpoint.find(inside)):
        assert measured(path, text) == alone
    assert measured(run, text)["bytes"] > alone["bytes"]  # somebody else's files are text


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_what_is_no_number_is_not_printed(tmp_path, text, scale, more):
    """A perplexity that overflows, neither."""
    run = saved(tmp_path / "run", scale=1.0)
    model = load_model(run)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    checkpoint.save(run, model, checkpoint.Run(2, {}, {}))
    refused("its training diverged", "eval", "--checkpoint", run, "--text", text, *more)
    if not math.isfinite(scale):
        refused("its training diverged", "generate", "--checkpoint", run, "--tokens", 3, *more)


def test_text_goes_through_where_standard_output_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert generate.on_screen("a\x1b[31m") == "a\x1b[31m"
