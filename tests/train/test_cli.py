"""The commands as a user meets them: a real kill, real folders, real refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linattn.cli import app
from linattn.train.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--steps",
    "12",
    "--batch",
    "1",
    "--seq-len",
    "16",
    "--save-every",
    "1",
    "--device",
    "cpu",
    "--json",
]


def train(text, out, *more):
    return [sys.executable, "-m", "linattn", "train", "--text", str(text), "--out", str(out), *OPTIONS, *more]


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return path


def test_a_killed_run_goes_on_as_if_nothing_had_happened(text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(train(text, whole), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(train(text, killed), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout:
            if json.loads(line).get("step", 0) >= 4 and json.loads(line)["event"] == "step":
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    left = checkpoints(killed)
    assert left and left[-1].name < "step-00000012"
    ended = subprocess.run(
        train(text, killed, "--resume"), cwd=ROOT, check=True, capture_output=True, text=True
    )
    events = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [event["step"] for event in events] == list(range(int(left[-1].name[5:]), 13))
    for name in ("model.safetensors", "training.safetensors", "config.json"):
        assert (checkpoints(killed)[-1] / name).read_bytes() == (checkpoints(whole)[-1] / name).read_bytes()


def test_train_then_generate(text, tmp_path):
    out = tmp_path / "run"
    trained = invoke("train", "--text", text, "--out", out, *OPTIONS[:-1])
    assert trained.exit_code == 0, trained.output
    for part in (
        "parameters on cpu",
        "1,688 bytes to learn from",
        "zlib needs",
        "lzma needs",
        "step     12",
        "saved",
    ):
        assert part in trained.output
    said = [
        invoke("generate", "--checkpoint", path, "--prompt", "é The", "--tokens", 20, "--device", "cpu")
        for path in (out, checkpoints(out)[-1])
    ]
    assert said[0].exit_code == 0 and said[0].output.startswith("é The") and len(said[0].output) > 10
    assert said[0].output == said[1].output


def refused(result, *sentences):
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ") and "Traceback" not in result.output
    for sentence in sentences:
        assert sentence in result.output


def test_train_refusals(text, tmp_path):
    out = tmp_path / "run"

    def run(path, *more):
        return invoke("train", "--text", path, "--out", out, *more)

    refused(run(tmp_path / "none"), "none does not exist")
    (tmp_path / "empty").touch()
    refused(run(tmp_path / "empty"), "empty is empty")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    refused(run(tmp_path / "binary"), "binary is not text: byte 0 is NUL")
    (tmp_path / "short").write_text("short")
    refused(run(tmp_path / "short"), "one window needs")
    refused(
        run(text, "--preset", "huge"), "--preset must be one of tiny, small, 385m, 1b, 3b, 7b, 15b, 175b, or"
    )
    refused(run(text, "--steps", "0"), "steps must be at least 1")
    refused(run(text, "--save-every", "0"), "--save-every must be at least 1")
    refused(run(text, "--device", "tpu"), "device must be cpu, cuda, cuda:N or auto, got 'tpu'")
    refused(run(text, "--device", "cuda:99"), "there is no cuda:99 here")
    refused(run(text, "--resume", *OPTIONS), "holds no checkpoint")
    refused(invoke("train", "--text", text, "--out", text, *OPTIONS), "cannot be written to")
    refused(invoke("generate", "--checkpoint", tmp_path / "none"), "none does not exist")


def test_a_run_is_not_overwritten_by_mistake(text, tmp_path):
    out = tmp_path / "run"
    assert invoke("train", "--text", text, "--out", out, *OPTIONS).exit_code == 0
    refused(invoke("train", "--text", text, "--out", out, *OPTIONS), "holds a run already", "--resume")
    refused(invoke("train", "--text", text, "--out", out, *OPTIONS, "--resume", "--lr", "0.1"), "lr is")
    # a folder of text with the run inside it: the checkpoints are not read as text
    inside = text.parent / "folder"
    inside.mkdir()
    text.rename(inside / "text.txt")
    for more in ((), ("--resume",)):
        result = invoke("train", "--text", inside, "--out", inside / "run", *OPTIONS, *more)
        assert result.exit_code == 0, result.output
