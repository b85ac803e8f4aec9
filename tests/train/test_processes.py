"""`linattn train` as processes: two into one folder, one that is killed, and what is on which output."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from linattn.cli import app
from linattn.errors import CheckpointError, OptionError
from linattn.models.transnormer import TransNormerConfig
from linattn.train.checkpoint import LOCK, alone, checkpoints
from tests.train.test_published import SIZES

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(params=["tiny", pytest.param("folder", marks=pytest.mark.slow)])
def size(request, tmp_path):
    """What the small loop trains, and what transformers' Trainer does."""
    if request.param == "tiny":
        return "tiny"
    TransNormerConfig(vocab_size=256, **SIZES).save_pretrained(tmp_path / "sizes")
    return str(tmp_path / "sizes")


def command(size, tmp_path, out, *more):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    words = {"preset": size, "text": text, "out": out, "steps": STEPS, "batch": 1, "seq-len": 16}
    options = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    run = [sys.executable, "-m", "linattn", "train", "--device", "cpu", "--save-every", "1"]
    return [*run, *options, *more]


def finished(arguments):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)


def weights(out):
    return load_file((checkpoints(out) or [out])[-1] / "model.safetensors")


def test_two_runs_at_once_and_one_that_is_killed(size, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert CliRunner().invoke(app, command(size, tmp_path, whole)[3:]).exit_code == 0
    first = subprocess.Popen(
        command(size, tmp_path, shared, "--json"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with first:
        for line in first.stdout:
            if json.loads(line)["step"] >= 2:
                break
        os.kill(first.pid, signal.SIGSTOP)  # at work until the second is done
        second = finished(command(size, tmp_path, shared, "--resume"))
        assert second.returncode == 2 and "another run is training into" in second.stderr, second.stderr
        assert "Traceback" not in second.stderr
        os.kill(first.pid, signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL and (shared / LOCK).is_file()
    third = finished(command(size, tmp_path, shared, "--json", "--resume"))
    assert third.returncode == 0 and "%|" not in third.stderr, third.stderr
    steps = [json.loads(line)["step"] for line in third.stdout.splitlines()]
    assert steps[0] >= 1 and steps[-1] == STEPS
    expected, found = weights(whole), weights(shared)
    assert expected.keys() == found.keys() and all(x.equal(found[name]) for name, x in expected.items())


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    imported = "import sys, torch; sys.modules['fcntl'] = None; import linattn.train.checkpoint"
    assert finished([sys.executable, "-c", imported]).returncode == 0
    with alone(tmp_path), alone(tmp_path):
        pass


def test_a_folder_is_held_by_one(tmp_path):
    out = tmp_path / "new" / "out"
    with alone(out):
        with pytest.raises(OptionError, match="another run is training into"), alone(out):
            raise AssertionError("held twice")
        with alone(tmp_path / "other"):
            pass
    with pytest.raises(ZeroDivisionError), alone(out):
        raise ZeroDivisionError
    with alone(out):  # whatever ended the one before
        pass
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written to"), alone(tmp_path / "file"):
        raise AssertionError("a file is no folder")


def on_a_terminal(arguments):
    """Standard output, piped, and what a terminal shows that standard error is."""
    screen, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=end, text=True) as process:
        os.close(end)
        out = process.stdout.read()
    shown = b""
    try:
        while part := os.read(screen, 1 << 16):
            shown += part
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(screen)
    assert process.returncode == 0, shown
    return out, shown.decode()


@pytest.mark.slow
def test_standard_output_is_json_alone(tmp_path):
    sizes, out = tmp_path / "sizes", tmp_path / "out"
    TransNormerConfig(vocab_size=256, **SIZES).save_pretrained(sizes)
    written, shown = on_a_terminal(command(sizes, tmp_path, out, "--json"))
    events = [json.loads(line) for line in written.splitlines()]
    assert events[-1]["step"] == STEPS and "%|" not in shown  # warnings may be there
    # weights that are read and written have bars on a terminal, and nowhere else
    written, shown = on_a_terminal(command(out, tmp_path, tmp_path / "more"))
    assert "%|" in shown and "%|" not in written and f"{STEPS} of {STEPS}" in written
    words = ["--checkpoint", str(out), "--device", "cpu"]
    text = ["--text", str(tmp_path / "text.txt"), "--json"]
    written, shown = on_a_terminal([sys.executable, "-m", "linattn", "eval", *words, *text])
    assert json.loads(written)["tokens"] == 2700 and "%|" not in shown
    prompt = ["--prompt", "The ", "--tokens", "5"]
    written, shown = on_a_terminal([sys.executable, "-m", "linattn", "generate", *words, *prompt])
    assert written.startswith("The ") and "\x1b" not in written and "%|" not in shown
