"""Checkpoints: whole or not at all, and a run continued from one is the run that never stopped."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch

from linattn.errors import CheckpointError, OptionError, ValueRangeError
from linattn.models import TransNormerConfig
from linattn.train import Settings, Text, Trainer, checkpoint, load_model, loading

CONFIG = TransNormerConfig(
    embed_dim=8, hidden_dim=8, num_heads=2, num_layers=2, glu_dim=8, linear_use_lrpe_list=(1, 0)
)
SETTINGS = Settings(steps=8, batch=2, seq_len=16, warmup=2, lr=1e-2)
FILES = ("config.json", "model.safetensors", "training.safetensors", "training.json")


def some_text(seed=0):
    data = np.random.default_rng(seed).integers(97, 123, 500).astype(np.uint8)
    return Text(data[:400], data[400:], 1, 0, f"seed {seed}")


def trainer(out, config=CONFIG, settings=SETTINGS, text=None, **options):
    return Trainer(config, text or some_text(), settings, out=out, **options)


def run(it, steps=None, **options):
    """Train to the end, or stop as a kill would after so many steps of this process."""
    seen = []
    for progress in it.run(**options):
        seen.append(progress)
        if steps is not None and len(seen) == steps:
            break
    return seen


def same(first, second):
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    losses = run(trainer(whole), save_every=3)
    first = run(trainer(cut), save_every=3, steps=5)  # steps 4 and 5 are lost with the process
    again = trainer(cut)
    again.resume()
    assert again.step == 3
    rest = run(again, save_every=3)
    assert [step.train_bits for step in first[:3] + rest] == [step.train_bits for step in losses]
    assert [step.held_out_bits for step in rest] == [step.held_out_bits for step in losses[3:]]
    assert losses[-1].train_bits != losses[0].train_bits
    for step in (6, 8):
        assert same(checkpoint.folder_of(whole, step), checkpoint.folder_of(cut, step))


def test_only_the_newest_two_are_kept_and_the_last_step_is_saved(tmp_path):
    saved = [step.saved for step in run(trainer(tmp_path), save_every=3)]
    assert [entry.name for entry in checkpoint.checkpoints(tmp_path)] == ["step-00000006", "step-00000008"]
    assert [index + 1 for index, entry in enumerate(saved) if entry] == [3, 6, 8]


def test_the_loaded_model_is_the_saved_one(tmp_path):
    it = trainer(tmp_path)
    run(it)
    for path in (tmp_path, checkpoint.folder_of(tmp_path, 8)):
        model = load_model(path)
        assert model.config == CONFIG
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), it.model.parameters(), strict=True))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    it = trainer(tmp_path)
    run(it, save_every=3, steps=5)
    before = {name: (checkpoint.folder_of(tmp_path, 3) / name).read_bytes() for name in FILES}
    for writes in range(6):  # full at any of the writes, the folders' included
        left = [writes]

        def fsync(handle, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint.os, "fsync", fsync)
        if writes < 5:
            with pytest.raises(
                CheckpointError, match=r"No space left.*last good checkpoint is .*step-00000003"
            ):
                it.save()
            names = sorted(entry.name for entry in tmp_path.iterdir())
            assert names == ["step-00000003"]
    monkeypatch.undo()
    assert before == {name: (checkpoint.folder_of(tmp_path, 3) / name).read_bytes() for name in FILES}
    again = trainer(tmp_path)
    again.resume()
    run(again)
    assert again.step == 8


def test_a_file_that_may_not_grow_is_an_error_not_a_torn_checkpoint(tmp_path):
    it = trainer(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a real write fails half-way
    try:
        with pytest.raises(CheckpointError, match=r"File too large; there is no earlier checkpoint"):
            run(it, save_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_unfinished_is_no_checkpoint(tmp_path):
    run(trainer(tmp_path), save_every=3, steps=4)
    partial = tmp_path / ".step-00000006.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    again = trainer(tmp_path)
    again.resume()
    assert again.step == 3 and not partial.exists()


def damaged(folder, name, change):
    path = folder / name
    data = bytearray(path.read_bytes())
    if change == "gone":
        path.unlink()
    elif change == "short":
        path.write_bytes(data[: len(data) // 2])
    elif change == "flipped":
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(change)


DAMAGE = [
    (
        "model.safetensors",
        "short",
        "checksum is not the one it was saved with; remove .* to go on from step-00000006",
    ),
    ("model.safetensors", "flipped", "checksum"),
    ("model.safetensors", "gone", "holds no checkpoint|is no whole checkpoint"),
    ("training.safetensors", "flipped", "checksum"),
    ("training.safetensors", "gone", "no whole checkpoint: it has no training.safetensors"),
    ("training.json", "short", "training.json is damaged"),
    ("training.json", b"[1]", "holds no JSON object"),
    ("training.json", b"{}", "has no step or no facts"),
    ("config.json", "gone", "it has no config.json"),
    ("config.json", b'{"model_type": "gpt2"}', "type 'gpt2', this is 'transnormer'"),
    (
        "config.json",
        b'{"model_type": "transnormer", "decoder_attention_heads": 3}',
        "heads must divide hidden_dim",
    ),
]


@pytest.mark.parametrize(("name", "change", "sentence"), DAMAGE, ids=[f"{row[0]} {row[1]}" for row in DAMAGE])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path, name, change, sentence):
    run(trainer(tmp_path), save_every=3)
    damaged(checkpoint.folder_of(tmp_path, 8), name, change)
    it = trainer(tmp_path)
    before = [parameter.clone() for parameter in it.model.parameters()]
    with pytest.raises(CheckpointError, match=sentence):
        it.resume()
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))
    assert it.step == 0


def test_a_damaged_one_can_be_removed_to_use_the_one_before(tmp_path):
    run(trainer(tmp_path), save_every=3)
    shutil.rmtree(checkpoint.folder_of(tmp_path, 8))
    it = trainer(tmp_path)
    it.resume()
    assert it.step == 6


def test_weights_without_a_run_are_checked_too(tmp_path):
    run(trainer(tmp_path))
    folder = checkpoint.folder_of(tmp_path, 8)
    (folder / "training.json").unlink()
    load_model(folder)
    for tensors, sentence in (
        ({"lm_head.weight": torch.zeros(256, 8)}, "of another model: it lacks embed_tokens.weight"),
        (load_model(folder).state_dict() | {"more": torch.zeros(1)}, "has unknown more"),
        (
            load_model(folder).state_dict() | {"lm_head.weight": torch.zeros(3)},
            r"lm_head.weight has shape \(3,\)",
        ),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            loading.load_weights(load_model(folder), tensors, folder)
    damaged(folder, "model.safetensors", "short")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        load_model(folder)


OTHERS = [
    ({"config": dataclasses.replace(CONFIG, glu_dim=9)}, "glu_dim is 8 there and 9 here"),
    ({"settings": dataclasses.replace(SETTINGS, steps=9)}, "steps is 8 there and 9 here"),
    ({"settings": dataclasses.replace(SETTINGS, seed=1)}, "seed is 0 there and 1 here"),
    ({"text": some_text(1)}, "its text is 'seed 0' there and 'seed 1' here"),
]


@pytest.mark.parametrize(("change", "sentence"), OTHERS, ids=[row[1] for row in OTHERS])
def test_another_run_is_not_continued(tmp_path, change, sentence):
    run(trainer(tmp_path))
    with pytest.raises(CheckpointError, match=f"is of another run: .*{sentence}"):
        trainer(tmp_path, **change).resume()


def test_a_new_run_does_not_mix_with_an_older_one(tmp_path):
    run(trainer(tmp_path))
    with pytest.raises(OptionError, match="holds later checkpoints of an earlier run"):
        run(trainer(tmp_path), steps=1)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        trainer(tmp_path).resume()
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="only a run with a folder"):
        trainer(None).resume()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written to: Not a directory; choose another --out"):
        trainer(tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="cannot be written to: File exists"):
        trainer(tmp_path / "file")


def test_a_run_by_the_clock_ends_in_time(tmp_path):
    seen = run(trainer(tmp_path, seconds=0.3), evaluations=3)
    assert seen[-1].fraction == 1.0 and seen[-1].saved is not None
    assert 1 <= sum(step.held_out_bits is not None for step in seen) <= 3
    assert all(a.fraction <= b.fraction for a, b in itertools.pairwise(seen))


def test_training_learns(tmp_path):
    data = np.frombuffer(b"abcdefgh" * 100, np.uint8)
    text = Text(data[:720], data[720:], 1, 0, "")
    seen = run(trainer(None, text=text, settings=dataclasses.replace(SETTINGS, steps=60, lr=2e-2)))
    assert seen[0].train_bits > 7.9 and seen[-1].held_out_bits < 1.5


def test_divergence_is_said(tmp_path):
    it = trainer(tmp_path)
    with torch.no_grad():
        it.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(ValueRangeError, match="the loss of step 1 is nan: training diverged"):
        run(it)
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch": 0}, {"seq_len": 0}, {"lr": 0.0}, {"clip": -1.0}, {"seed": -1}]
)
def test_settings_outside_their_domain(change):
    with pytest.raises(ValueRangeError, match=f"{next(iter(change))} must be"):
        dataclasses.replace(SETTINGS, **change)


def test_training_json_says_what_the_run_was(tmp_path):
    run(trainer(tmp_path))
    fields = json.loads((checkpoint.folder_of(tmp_path, 8) / "training.json").read_text())
    assert fields["step"] == 8 and fields["facts"]["settings"]["seq_len"] == 16
