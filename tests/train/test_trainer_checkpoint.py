"""Checkpoints of transformers' Trainer: refused unless whole, and what a full disk leaves of them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerState
from typer.testing import CliRunner

from linattn.cli import app
from linattn.errors import CheckpointError
from linattn.train import checkpoint, corpus, load_model, published, run_folder, trainer_checkpoint
from tests.train.runs import PLAN, begun, train
from tests.train.test_published import CPU

MODEL = ("config.json", "model.safetensors")
NEEDED = (*MODEL, "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("home"))


@pytest.fixture
def cut(home, tmp_path):
    """A copy of the killed run."""
    shutil.copytree(home / "cut", tmp_path / "cut")
    return tmp_path / "cut"


@contextlib.contextmanager
def no_larger(size):
    """No file may grow beyond a size: what is written fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return {path.name for path in folder.iterdir()}


def ends_as_the_whole(home, out):
    train(home, out, resume=True)
    whole, again = (load_file(folder / "model.safetensors") for folder in (home / "whole", out))
    assert whole.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in whole.items())


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(home, cut, name):
    (cut / "checkpoint-4" / name).unlink()
    said = rf"^\S+checkpoint-4 is no whole checkpoint: it has no {name}; "
    with pytest.raises(CheckpointError, match=said + r"remove \S+checkpoint-4 to go on from checkpoint-2$"):
        train(home, cut, resume=True)
    assert not (cut / "model.safetensors").exists()
    shutil.rmtree(cut / "checkpoint-2")
    with pytest.raises(CheckpointError, match=said + "there is no other: train anew into another --out$"):
        train(home, cut, resume=True)


@pytest.mark.parametrize("left", [0, 0.5])
@pytest.mark.parametrize("name", [*NEEDED, checkpoint.STATE])
def test_a_file_cut_short_is_named(home, cut, name, left):
    path = cut / "checkpoint-4" / name
    os.truncate(path, int(path.stat().st_size * left))
    said = rf"^\S+checkpoint-4/{name} is damaged: .*; remove \S+ to go on from checkpoint-2$"
    with pytest.raises(CheckpointError, match=said):
        train(home, cut, resume=True)
    assert not (cut / "model.safetensors").exists()


def test_what_else_is_damaged(home, cut):
    folder = cut / "checkpoint-4"
    path = folder / "optimizer.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:60000] + bytes([whole[60000] ^ 1]) + whole[60001:])
    with pytest.raises(
        CheckpointError, match=r"optimizer.pt is damaged: the checksum of \S+/data/\d+ is not"
    ):
        train(home, cut, resume=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "there")
    with pytest.raises(CheckpointError, match=r"optimizer.pt is damaged: it is not what torch.save wrote"):
        train(home, cut, resume=True)
    path.write_bytes(whole)
    (folder / checkpoint.STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"trainer_state.json is damaged: it is of step 0; remove"):
        train(home, cut, resume=True)
    shutil.rmtree(folder)  # as the sentence says
    ends_as_the_whole(home, cut)
    (cut / run_folder.FACTS).write_text('{"steps"')
    with pytest.raises(CheckpointError, match=r"run.json is damaged: Expecting"):
        train(home, cut, resume=True)


def test_a_bit_of_the_weights_that_is_another_one(home, cut):
    """It leaves the file what safetensors reads."""
    folder = cut / "checkpoint-4"
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1001] + bytes([whole[-1001] ^ 1]) + whole[-1000:])
    said = r"checkpoint-4/model.safetensors is damaged: its checksum is not the one it was saved with; remove"
    for refused in (lambda: train(home, cut, resume=True), lambda: load_model(folder)):
        with pytest.raises(CheckpointError, match=said):
            refused()
    path.write_bytes(whole)
    (folder / checkpoint.RUN).unlink()  # as checkpoints were once written
    ends_as_the_whole(home, cut)


def test_weights_in_several_files_have_checksums(home, tmp_path):
    folder = tmp_path / "checkpoint-1"
    published.model_of(str(home / "sizes"), 256).save_pretrained(folder, max_shard_size="20KB")
    checkpoint.write_sums(folder)
    files = checkpoint.weight_files(folder)
    assert len(files) > 1
    trainer_checkpoint.check_model(folder)
    load_model(folder)
    whole = files[-1].read_bytes()
    files[-1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for read in (trainer_checkpoint.check_model, load_model):
        with pytest.raises(CheckpointError, match=f"{files[-1].name} is damaged: its checksum"):
            read(folder)


@pytest.mark.parametrize(
    "fields", ['{"do_sample": false, "temperature": 0.7}', '{"max_new_tokens": -5}', "[]"]
)
@pytest.mark.filterwarnings("ignore:.*generation")
def test_what_would_not_be_saved_with_a_model_is_refused_before_it_learns(home, tmp_path, fields):
    folder = tmp_path / "model"
    published.model_of(str(home / "sizes"), 256).save_pretrained(folder)
    trainer_checkpoint.check_model(folder)
    (folder / "generation_config.json").write_text(fields)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is none that .*: mend it, or remove"):
        published.model_of(str(folder), 256)
    (folder / "generation_config.json").write_text("{")  # which transformers leaves out
    published.model_of(str(folder), 256).save_pretrained(tmp_path / "again")


def test_files_are_read_by_whom_the_system_lets(home):
    """Not by their owner alone, as temporary files are."""
    whole = home / "whole"
    mode = (whole / "config.json").stat().st_mode
    for path in (whole / run_folder.FACTS, whole / "model.safetensors", *whole.glob("checkpoint-*/model*")):
        assert path.stat().st_mode == mode, path


def test_every_process_has_its_random_numbers(cut):
    folder = cut / "checkpoint-4"
    fields = json.loads((folder / checkpoint.STATE).read_text())
    (folder / checkpoint.STATE).write_text(json.dumps(fields | {"train_batch_size": 1}))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    with pytest.raises(CheckpointError, match=r"it has no rng_state_1.pth$"):
        trainer_checkpoint.check(folder, 2)
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    trainer_checkpoint.check(folder, 2)


def test_an_ended_run_needs_its_model_only(home, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(home / "whole", out)
    (out / "checkpoint-6" / "optimizer.pt").unlink()
    ends_as_the_whole(home, out)
    (out / "checkpoint-6" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"it has no model.safetensors; remove"):
        train(home, out, resume=True)


def test_a_model_to_fine_tune_is_looked_at(home, tmp_path):
    shutil.copytree(home / "whole", tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: "):
        published.model_of(str(tmp_path / "model"), 256)


def test_what_a_kill_left_unfinished_is_left_out(home, cut, capsys):
    (cut / "checkpoint-6").mkdir()
    shutil.copy(cut / "checkpoint-4" / "optimizer.pt", cut / "checkpoint-6")
    (cut / checkpoint.PARTIAL).mkdir()
    (cut / checkpoint.PARTIAL / "half").touch()
    ends_as_the_whole(home, cut)
    said = f"not written to the end: checkpoint-6; going on from {cut / 'checkpoint-4'}\n"
    assert said in capsys.readouterr().err and not {checkpoint.PARTIAL, "half"} & names(cut)


# a limit, and what fails: Python's own write, safetensors, torch
@pytest.mark.parametrize("size", [600, 20000, 60000])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_whole(home, cut, size):
    command = ["train", "--preset", str(home / "sizes"), "--text", str(home / "text.txt"), "--resume"]
    command += ["--out", str(cut), "--device", "cpu", "--json", "--lr", "0.01", "--save-every", "2"]
    with no_larger(size):
        found = CliRunner().invoke(app, [*command, "--steps", "6", "--batch", "2", "--seq-len", "16"])
    assert found.exit_code == 2 and found.stderr.splitlines()[-1] == (
        f"error: checkpoint {cut / 'checkpoint-6'} could not be written: File too large; "
        f"the last good checkpoint is {cut / 'checkpoint-4'}"
    )
    assert names(cut) == names(home / "cut") and names(cut / "checkpoint-4") >= set(NEEDED)
    ends_as_the_whole(home, cut)


def test_a_tokenizer_on_a_full_disk(home, tmp_path):
    """It says so in a bare Exception."""
    vocabulary = {"[UNK]": 0, "fox": 1, "x" * 100_000: 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    ids = corpus.read_corpus(home / "text.txt", tokenizer)
    said = "checkpoint-2 could not be written: File too large; there is no earlier checkpoint$"
    with no_larger(60000), pytest.raises(CheckpointError, match=said):
        published.train(
            str(home / "sizes"), ids, PLAN, tmp_path / "out", device=CPU, as_json=True, tokenizer=tokenizer
        )
    assert names(tmp_path / "out") == {checkpoint.LOCK, run_folder.FACTS}


def test_a_disk_that_is_full_at_the_last_file(home, cut, monkeypatch):
    def torn(self, path):
        Path(path).write_text('{"global_step": 6')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", torn)
        with pytest.raises(
            CheckpointError, match=r"checkpoint-6 could not be written: No space left on device;"
        ):
            train(home, cut, resume=True)
    assert checkpoint.of_trainer(cut, whole=False) == [cut / "checkpoint-2", cut / "checkpoint-4"]
    ends_as_the_whole(home, cut)


def test_a_disk_that_is_full_at_the_checksums(home, cut, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_sums", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: No space left on device;"):
        train(home, cut, resume=True)
    assert checkpoint.of_trainer(cut, whole=False) == [cut / "checkpoint-2", cut / "checkpoint-4"]


def test_an_output_that_is_full_is_no_full_disk(home, tmp_path, monkeypatch):
    """What is printed at a step that is saved cannot be; the disk is not to blame."""
    plain = published.typer.echo

    def full(message, **options):
        if json.loads(message)["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(message, **options)

    monkeypatch.setattr(published.typer, "echo", full)
    with pytest.raises(OSError, match="No space left on device"):  # a CheckpointError is none
        train(home, tmp_path / "out")
    assert checkpoint.of_trainer(tmp_path / "out") == [tmp_path / "out" / "checkpoint-2"]


def test_a_model_that_is_there_stays_until_the_new_one_is_whole(home, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(home / "whole", out)
    before = {name: (out / name).read_bytes() for name in MODEL}
    said = r"the model in \S+out could not be written: File too large; the last good .* is \S+checkpoint-6$"
    for size in (600, 20000):
        with no_larger(size), pytest.raises(CheckpointError, match=said):
            train(home, out, resume=True)
        assert before == {name: (out / name).read_bytes() for name in MODEL}
        assert names(out) == names(home / "whole")


def test_other_errors_while_saving_pass_as_they_are(home, cut, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        train(home, cut, resume=True)
