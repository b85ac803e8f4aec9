"""Runs of transformers' Trainer: what they go on as, their learning rates, and what a kill leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import trainer_utils

from linattn.errors import CheckpointError, OptionError
from linattn.train import checkpoint, published, run_folder, trainer_checkpoint
from tests.train.runs import PLAN, begun, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("home"))


@pytest.fixture
def home(made, tmp_path):
    """A copy of all that."""
    return shutil.copytree(made, tmp_path / "home")


def ends_as_the_whole(home, **how):
    train(home, home / "cut", resume=True, **how)
    whole, again = (load_file(home / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in whole.items())


def changed(folder, **fields):
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))


def test_a_run_goes_on_with_its_own_configuration(home):
    """Not with what its preset's folder has become."""
    changed(home / "sizes", decay_schedule="paper")
    with pytest.raises(OptionError, match="cut is a run with decay_schedule 'released', not 'paper': resume"):
        train(home, home / "cut", resume=True)
    facts = home / "cut" / run_folder.FACTS
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"config": None}))
    with pytest.raises(OptionError, match="cut is a run of an older linattn"):
        train(home, home / "cut", resume=True)
    facts.unlink()  # then only the checkpoints say what the run is
    ends_as_the_whole(home)


@pytest.mark.parametrize("there", ["moved", "spelt", "gone"])
def test_a_preset_may_be_elsewhere(home, there, monkeypatch):
    preset = home / "sizes"
    if there == "moved":
        preset = preset.rename(home / "other")
    elif there == "spelt":
        monkeypatch.chdir(home)
        preset = "./sizes"
    else:
        shutil.rmtree(preset)
        facts = home / "cut" / run_folder.FACTS
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"preset": str(preset)}))
        with pytest.raises(OptionError, match=r"cut is a run with preset '\S+sizes', not '\S+nowhere'"):
            train(home, home / "cut", preset=home / "nowhere", resume=True)
    ends_as_the_whole(home, preset=preset)


def test_a_run_saves_as_often_as_it_is_told_now(home, capsys, monkeypatch):
    """And transformers does not warn of it."""
    said = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(trainer_utils.logger, name, lambda message, *more: said.append(message))
    capsys.readouterr()
    ends_as_the_whole(home, plan=dataclasses.replace(PLAN, save_every=5))
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    measured = [line["step"] for line in lines if "held_out_bits_per_byte" in line]
    assert measured == [5, 6] and not said
    assert [path.name for path in checkpoint.of_trainer(home / "cut")] == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize("steps", [1, 9, 30, 1000])
def test_learning_rates(steps):
    """A warm-up of a tenth, from its first part on, which is never nothing; then half a cosine."""
    warmup = min(published.Plan(steps=steps).warmup, steps // 10)
    rates = [trainer_checkpoint.rate(step, warmup, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates) and rates[warmup] == 1
    assert rates[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)
    half = (steps - warmup) / 2
    if half == int(half):
        assert math.isclose(rates[warmup + int(half)], 0.5)


def rates_of(monkeypatch, home, out, plan):
    """The learning rate at each step that a run takes."""
    seen, plain = [], published.Trainer.training_step

    def watched(self, *arguments, **options):
        seen.append(self.optimizer.param_groups[0]["lr"])
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(published.Trainer, "training_step", watched)
        train(home, out, plan)
    return seen


def test_short_runs_learn(home, monkeypatch):
    plan = dataclasses.replace(PLAN, save_every=100)
    for steps, warmup in ((1, 0), (20, 2)):
        seen = rates_of(monkeypatch, home, home / f"{steps}", dataclasses.replace(plan, steps=steps))
        assert seen == [plan.lr * trainer_checkpoint.rate(step, warmup, steps) for step in range(steps)]
        assert max(seen) == plan.lr and seen[0] > 0


def test_checkpoints_are_removed_by_their_steps(home):
    """Of one that was being removed when the process was killed, what is left is the newest by its time."""
    hollow = home / "cut" / "checkpoint-1"
    shutil.copytree(home / "cut" / "checkpoint-2", hollow)
    (hollow / "model.safetensors").unlink()
    ends_as_the_whole(home)
    names = [path.name for path in checkpoint.of_trainer(home / "cut", whole=False)]
    assert names == ["checkpoint-4", "checkpoint-6"]
    (home / "cut" / "checkpoint-8").mkdir()  # not written to the end
    shutil.rmtree(home / "cut" / "checkpoint-6")
    shutil.copytree(home / "cut" / "checkpoint-4", home / "cut" / "checkpoint-2")
    trainer_checkpoint.rotate(home / "cut")
    names = [path.name for path in checkpoint.of_trainer(home / "cut", whole=False)]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]


def test_a_folder_is_no_model_until_all_of_it_is_there(home, monkeypatch):
    """Killed after any of the moves that end a run."""
    out, plain = home / "whole", Path.replace
    allowed: list[str] = []
    moves: list[str] = []

    def until(path, target):
        if path.parent.name == checkpoint.PARTIAL:
            moves.append(path.name)
            if len(moves) > len(allowed):
                raise KeyboardInterrupt
        return plain(path, target)

    files = {path.name for path in out.iterdir() if path.is_file()} - {run_folder.FACTS, checkpoint.LOCK}
    assert len(files) > 2
    monkeypatch.setattr(Path, "replace", until)
    for file in files:
        moves.clear()
        for name in files:
            (out / name).unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            train(home, out, resume=True)
        assert checkpoint.find(out) == out / "checkpoint-6"
        allowed.append(file)  # one more
    assert moves[-1] == checkpoint.MODEL


def test_an_interruption_that_python_dropped_ends_the_run(home, monkeypatch):
    plain = published.Trainer.training_step

    def interrupted(self, *arguments, **options):
        if self.state.global_step == 3:
            with contextlib.suppress(KeyboardInterrupt):  # as in a `__del__`
                signal.raise_signal(signal.SIGINT)
        return plain(self, *arguments, **options)

    own = signal.default_int_handler
    before = signal.signal(signal.SIGINT, own)  # whoever started the tests may ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(published.Trainer, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(home, home / "other")
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in checkpoint.of_trainer(home / "other")] == ["checkpoint-2"]
    shutil.rmtree(home / "cut")
    (home / "other").rename(home / "cut")
    ends_as_the_whole(home)


def test_what_a_run_would_replace_is_not(home):
    before = (home / "sizes" / "config.json").read_bytes()
    with pytest.raises(OptionError, match=r"sizes holds a config.json already, which the run would replace"):
        train(home, home / "sizes")
    assert [path.name for path in (home / "sizes").iterdir()] == ["config.json"]
    assert (home / "sizes" / "config.json").read_bytes() == before


def test_a_refusal_leaves_nothing(home):
    out = home / "out"
    for plan in (dataclasses.replace(PLAN, seq_len=4096), dataclasses.replace(PLAN, batch=1000)):
        with pytest.raises(published.DataError, match="give more text"):
            train(home, out, plan)
    with pytest.raises(OptionError, match="--preset must be one of"):
        train(home, out, preset="9b")
    published.model_of(str(home / "sizes"), 256).save_pretrained(home / "damaged")
    (home / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        train(home, out, preset=home / "damaged")
    out.mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint to go on from"):
        train(home, out, resume=True)
    assert not any(out.iterdir())
