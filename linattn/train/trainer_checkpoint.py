"""Checkpoints of transformers' Trainer: what is missing or damaged, and what could not be written."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from linattn.errors import CheckpointError
from linattn.train import checkpoint

UNFIT = (EOFError, RuntimeError, ValueError)  # what zipfile and torch say to garbage, too
MORE = 1 << 20  # bytes that a disk is asked to take once more


def check_model(folder: Path) -> None:
    """Raise CheckpointError that names the first file of a saved model that is missing or damaged."""
    checkpoint.read_json(folder / checkpoint.CONFIG)
    for path in checkpoint.weight_files(folder):
        _there(path)
        try:
            with safe_open(path, framework="pt"):
                pass
        except OSError as error:
            raise _unreadable(path, error) from error
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def check(folder: Path, windows: int) -> None:
    """Raise CheckpointError that names the first file that a run lacks to go on, or that is damaged.

    windows: how many the processes of the run take together in one pass.
    """
    path = folder / checkpoint.STATE
    try:
        state = TrainerState.load_from_json(str(path))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if state.global_step != checkpoint.step_of(folder):
        raise CheckpointError(f"{path} is damaged: it is of step {state.global_step}")
    check_model(folder)
    each = state.train_batch_size
    processes = windows // each if isinstance(each, int) and 0 < each < windows else 1
    randoms = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    for name in ("optimizer.pt", "scheduler.pt", *randoms):
        _there(folder / name)
        _check_archive(folder / name)


def _there(path: Path) -> None:
    if not path.is_file():
        raise checkpoint.missing(path)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror}")


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless a file of torch.save, which is a zip archive, is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, *UNFIT) as error:
        said = str(error).partition("\n")[0]  # torch adds where in its own code
        raise CheckpointError(f"{path} is damaged: it is not what torch.save wrote ({said})") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {broken} is not the one it was saved with")


class Written:
    """Around what Trainer writes: where the system takes no more, says so and removes the torn part.

    folder: what is written; None is the checkpoint that Trainer writes by itself while it trains. Every other
    error passes as it is.

    Raises CheckpointError.
    """

    def __init__(self, trainer: Any, out: Path, folder: Path | None = None) -> None:
        self.trainer, self.out, self.folder = trainer, out, folder

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        folder = self.folder
        if folder is None and self.trainer.control.should_save:  # until the checkpoint is written
            folder = self.out / f"checkpoint-{self.trainer.state.global_step}"
        if error is None or folder is None:
            return
        why = _refusal(folder, error)
        if why is None:
            return
        if self.trainer.args.should_save:  # of several processes, the one that writes
            shutil.rmtree(folder, ignore_errors=True)  # gives the space back
        kept = [entry for entry in checkpoint.of_trainer(self.out) if entry != folder]
        what = f"checkpoint {folder}" if self.folder is None else f"the model in {self.out}"
        raise checkpoint.not_written(what, why, kept) from error


def save_model(trainer: Any, out: Path) -> None:
    """Write a model into a run's folder; one that is there stays until the new one is whole.

    Raises CheckpointError where it cannot be written.
    """
    partial = out / checkpoint.PARTIAL
    with Written(trainer, out, partial):
        trainer.save_model(str(partial))
        if not trainer.args.should_save:
            return
        for path in partial.iterdir():
            target = out / path.name
            if target.is_dir():  # a folder cannot replace a full one
                shutil.rmtree(target)
            path.replace(target)
        partial.rmdir()


def _refusal(folder: Path, error: BaseException) -> str | None:
    """What the system said when a folder could not be written; None where that is not what went wrong.

    Only Python's own errors hold its number. safetensors and tokenizers print it, the latter in a bare
    Exception, and torch drops it: the largest file is asked to grow, to hear it again.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(number[1]))
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not isinstance(error, RuntimeError) or not files or (folder / checkpoint.STATE).exists():
        return None
    try:
        with max(files, key=lambda path: path.stat().st_size).open("ab") as file:
            file.write(bytes(MORE))
    except OSError as again:
        return again.strerror
    return None
