"""transformers' Trainer and its checkpoints: what is missing, damaged, diverged, or could not be written."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import shutil
import struct
import textwrap
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, TrainerState
from transformers.trainer_pt_utils import safe_globals

from linattn.errors import CheckpointError
from linattn.train import checkpoint
from linattn.train.loop import diverging, finite, refuse_weights

UNFIT = (EOFError, RuntimeError, ValueError)  # what zipfile and torch say to garbage, too
SAID = 200  # characters of what transformers says
MORE = 1 << 20  # bytes that a disk is asked to take once more


def check_model(folder: Path) -> None:
    """Raise CheckpointError that names the first file of a saved model that is missing or damaged."""
    checkpoint.read_json(folder / checkpoint.CONFIG)
    for path in checkpoint.weight_files(folder):
        _there(path)
        try:
            with safe_open(path, framework="pt"):
                checkpoint.check_sum(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    _check_generation(folder / "generation_config.json")


def _check_generation(path: Path) -> None:
    """Raise CheckpointError for what would be refused when the model is saved, after a run's first part."""
    if not path.is_file():
        return
    try:
        GenerationConfig.from_pretrained(path.parent).validate(strict=True)
    except OSError:  # is no JSON: transformers leaves it out
        return
    except (ValueError, TypeError, AttributeError) as error:
        said = textwrap.shorten(str(error), SAID, placeholder=" …")
        raise CheckpointError(
            f"{path} is none that transformers would save with a model ({said}): mend it, or remove it"
        ) from error


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

    folder: what is written. what: its name in a sentence. Every other error passes as it is.

    Raises CheckpointError.
    """

    def __init__(self, trainer: Any, folder: Path, what: str) -> None:
        self.trainer, self.folder, self.what = trainer, folder, what

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = None if error is None else _refusal(self.folder, error)
        if why is None:
            return
        if self.trainer.args.should_save:  # of several processes, the one that writes
            shutil.rmtree(self.folder, ignore_errors=True)  # gives the space back
        kept = [entry for entry in checkpoint.of_trainer(self.folder.parent) if entry != self.folder]
        raise checkpoint.not_written(self.what, why, kept) from error


def rate(step: int, warmup: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, as a part of the peak; that of no step is 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def rotate(out: Path) -> None:
    """Remove all checkpoints of a run but the newest whole ones, by their steps.

    What a kill left of one that was being removed is the newest by its time, so time does not count.
    """
    kept = checkpoint.of_trainer(out)[-checkpoint.KEPT :]
    for entry in checkpoint.of_trainer(out, whole=False):
        if entry not in kept and kept and checkpoint.step_of(entry) < checkpoint.step_of(kept[-1]):
            with contextlib.suppress(OSError):
                (entry / checkpoint.STATE).unlink(missing_ok=True)  # no longer whole, whatever is left of it
            shutil.rmtree(entry, ignore_errors=True)


class Trainer(transformers.Trainer):
    """transformers' Trainer, which ends when training diverges; its checkpoints have checksums.

    Raises ValueRangeError for a loss or weights that are not finite, before they are saved; CheckpointError
    for a checkpoint that could not be written.
    """

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """What transformers' Trainer computes."""
        with diverging(self.model, self.state.global_step):
            return super().compute_loss(*arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Tell the callbacks, unless training diverged."""
        for name, loss in (("loss", "loss"), ("eval_loss", "held-out loss")):
            finite(logs.get(name, 0.0), f"the {loss} at step {self.state.global_step}")
        super().log(logs, *arguments, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rates of a run, `rate`."""
        warmup = int(self.args.warmup_steps)
        optimizer = self.optimizer if optimizer is None else optimizer
        made = LambdaLR(optimizer, lambda step: rate(step, warmup, num_training_steps))
        self.lr_scheduler = made
        return made

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, and the checksums of a checkpoint."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        for path in checkpoint.weight_files(folder):
            checkpoint.readable(path, folder / checkpoint.CONFIG)
        if _internal_call:
            checkpoint.write_sums(folder)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        step = self.state.global_step
        refuse_weights(self.model, step)
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        with Written(self, folder, f"checkpoint {folder}"):
            super()._save_checkpoint(*arguments, **options)
        if self.args.should_save:
            rotate(folder.parent)


def save_model(trainer: Any, out: Path) -> None:
    """Write a model into a run's folder; one that is there stays until the new one is whole.

    Raises ValueRangeError where its weights are not finite, CheckpointError where it cannot be written.
    """
    refuse_weights(trainer.model, trainer.args.max_steps)
    partial = out / checkpoint.PARTIAL
    with Written(trainer, partial, f"the model in {out}"):
        trainer.save_model(str(partial))
        if not trainer.args.should_save:
            return
        # the weights last, the file last that says they are there: without them a folder is no model
        weights = {checkpoint.MODEL, checkpoint.SHARDS}
        files = {path.name for path in checkpoint.weight_files(partial)}
        for path in sorted(partial.iterdir(), key=lambda path: (path.name in weights, path.name in files)):
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
