"""Checkpoints: folders of safetensors and JSON that appear whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise

from linattn.errors import CheckpointError, OptionError
from linattn.models import TransNormerLM
from linattn.models.tensors import placed

MODEL_TYPE = "transnormer"
CONFIG, MODEL, TRAINING, RUN = "config.json", "model.safetensors", "training.safetensors", "training.json"
SHARDS = "model.safetensors.index.json"  # of checkpoints in several files
PICKLES = "pytorch_model*.bin"  # weights as other libraries keep them
STATE = "trainer_state.json"  # what transformers' Trainer writes last
PARTIAL = ".model.partial"  # where Trainer's model lies until it is whole
LOCK = ".lock"  # held by the process that trains into a folder
KEPT = 2  # the newest checkpoint and the one before it
_NAME = re.compile(r"step-(\d{8})")
_TRAINERS = re.compile(r"checkpoint-(\d+)")
_PIECE = 1 << 24  # bytes that are read at once for a checksum


@dataclass(frozen=True)
class Run:
    """What continues a run besides the weights: steps done, the optimizer's tensors, and what the run was.

    optimizer: tensors by "<what>.<parameter>". facts: the settings and the text's fingerprint, as JSON holds
    them. The step is also the position in the data: batches are a function of it
    (`linattn.train.data.Windows`).
    """

    step: int
    optimizer: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


def folder_of(out: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run's folder."""
    return out / f"step-{step:08d}"


def checkpoints(out: Path) -> list[Path]:
    """Return a run's whole checkpoints, oldest first; unfinished ones are not among them."""
    if not out.is_dir():
        return []
    return sorted(entry for entry in out.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())


def of_trainer(out: Path, *, whole: bool = True) -> list[Path]:
    """Return the checkpoints of transformers' Trainer in a run's folder, oldest first.

    whole: without those that it did not write to the end.
    """
    found = [entry for entry in out.glob("checkpoint-*") if _TRAINERS.fullmatch(entry.name)]
    return sorted((entry for entry in found if (entry / STATE).is_file() or not whole), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint."""
    return int(folder.name.rpartition("-")[2])


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep every other process from training into a folder, which is made where there is none.

    The system lets go of it when the process ends, in whatever way; where a system or
    file system knows no locks, nothing is held.

    Raises OptionError where another run holds it, CheckpointError where it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # no child's after exec
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        with contextlib.suppress(OSError, ModuleNotFoundError):  # no locks here
            fcntl: Any = importlib.import_module("fcntl")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise OptionError(
                    f"another run is training into {out}: wait until it ends, or choose another --out"
                ) from error
        yield
    finally:
        os.close(handle)


def _unwritable(out: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{out} cannot be written to: {error.strerror}; choose another --out")


def prepare(out: Path) -> None:
    """Make a run's folder and remove what a killed run left unfinished.

    Raises CheckpointError when it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for entry in (*out.glob(".step-*.partial"), *out.glob(PARTIAL)):
            shutil.rmtree(entry)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(out, error) from error


def refuse_model(out: Path) -> None:
    """Raise OptionError where a run's folder holds a model, which the run would replace or be taken for."""
    if found := sorted([*out.glob("*.safetensors"), *out.glob(PICKLES)]):
        raise OptionError(f"{out} holds a model already ({found[0].name}): choose another --out")


def save(out: Path, model: TransNormerLM, run: Run) -> Path:
    """Write the checkpoint of a step and return its folder; all but the newest two are then removed.

    Every file is written beside the others in a hidden folder and flushed to the disk; only then does the
    folder get its name, in one step. Whatever happens before leaves the earlier checkpoints as they were.

    Raises CheckpointError when the disk is full or cannot be written to.
    """
    final = folder_of(out, run.step)
    partial = out / f".{final.name}.partial"
    files = {
        CONFIG: _json({"model_type": MODEL_TYPE, **model.config.to_dict()}),
        MODEL: _tensors(model.state_dict()),
        TRAINING: _tensors(run.optimizer),
    }
    sums = {name: zlib.crc32(data) for name, data in files.items()}
    files[RUN] = _json({"step": run.step, "facts": dict(run.facts), "crc32": sums})
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        for name, data in files.items():
            _write(partial / name, data)
        _flush_folder(partial)
        if final.exists():  # a folder cannot replace a full one; the same step has the same content
            shutil.rmtree(final)
        partial.replace(final)
        _flush_folder(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # gives the space back
        kept = [entry for entry in checkpoints(out) if entry != final]
        raise not_written(f"checkpoint {final}", error.strerror or str(error), kept) from error
    for entry in checkpoints(out)[:-KEPT]:
        shutil.rmtree(entry, ignore_errors=True)
    return final


def not_written(what: str, why: str, kept: list[Path]) -> CheckpointError:
    """The error of what could not be written: why, and which checkpoint is left."""
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
    return CheckpointError(f"{what} could not be written: {why}; {last}")


def find(path: Path) -> Path:
    """Return the checkpoint folder that a path means: itself, or the newest one of a run's folder.

    Raises CheckpointError when there is none.
    """
    if (path / MODEL).is_file() or (path / SHARDS).is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    if found := of_trainer(path):  # a run that has not ended
        return found[-1]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give the folder of the checkpoint, {path.parent}")
    raise CheckpointError(
        f"{path} holds no checkpoint: neither {MODEL} nor a folder step-… or checkpoint-… of a run"
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the one file with a checkpoint's tensors, or else those that transformers' index names.

    transformers leaves an index there when it saves a model once more, in one file: that counts.
    Raises CheckpointError for an index that is damaged.
    """
    if (folder / MODEL).is_file() or not (folder / SHARDS).is_file():
        return [folder / MODEL]
    return sorted({*placed(folder / SHARDS, _read(folder / SHARDS)).values()})


def write_sums(folder: Path) -> None:
    """Write down, beside the weights of a checkpoint that another library wrote, what `check_sum` compares.

    Raises OSError.
    """
    sums = {path.name: _crc(path) for path in weight_files(folder)}
    _write(folder / RUN, _json({"step": step_of(folder), "crc32": sums}))


def check_sum(path: Path) -> None:
    """Raise CheckpointError unless a file has the checksum that its checkpoint has for it, if any.

    Raises OSError where it cannot be read.
    """
    sums = _sums(path.parent)
    if path.name in sums and _crc(path) != sums[path.name]:
        raise _altered(path)


def readable(path: Path, other: Path) -> None:
    """Give a file that only its owner may read the permissions of another, where the system has some."""
    with contextlib.suppress(OSError):
        shutil.copymode(other, path)


def _crc(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total = zlib.crc32(piece, total)
    return total


def _altered(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: its checksum is not the one it was saved with")


def load_run(folder: Path) -> Run:
    """Return what continues the run of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    facts = load_facts(folder)
    return Run(step_of(folder), read_tensors(folder / TRAINING), facts)


def load_facts(folder: Path) -> dict[str, Any]:
    """Return what the run of a checkpoint was. Raises CheckpointError when that is missing or damaged."""
    fields = read_json(folder / RUN)
    step, facts = fields.get("step"), fields.get("facts")
    if type(step) is not int or not isinstance(facts, dict):
        raise CheckpointError(f"{folder / RUN} is damaged: it has no step or no facts")
    if step != step_of(folder):
        raise CheckpointError(f"{folder / RUN} is damaged: its step is {step}{instead(folder)}")
    return facts


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()


def _tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    data: bytes = serialise({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return data


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    # a renamed entry is safe from a power cut only after its folder is flushed
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises CheckpointError where there is none."""
    data = _read(path)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return fields


def _sums(folder: Path) -> dict[str, int]:
    # weights that come without a run (converted, downloaded) have no checksums to compare with
    sums = read_json(folder / RUN).get("crc32", {}) if (folder / RUN).exists() else {}
    return sums if isinstance(sums, dict) else {}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file. Raises CheckpointError where it is damaged, or not as it was saved."""
    data, sums = _read(path), _sums(path.parent)
    if path.name in sums and zlib.crc32(data) != sums[path.name]:
        raise CheckpointError(f"{_altered(path)}{instead(path.parent)}")
    try:
        tensors: dict[str, torch.Tensor] = deserialise(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {error}{instead(path.parent)}"
        ) from error
    return tensors


def missing(path: Path) -> CheckpointError:
    """The error of a checkpoint that lacks a file."""
    return CheckpointError(f"{path.parent} is no whole checkpoint: it has no {path.name}")


def instead(folder: Path) -> str:
    """What a message about a run's checkpoint ends with: how to go on from the one before."""
    for found in (checkpoints(folder.parent), of_trainer(folder.parent)):
        names = [entry.name for entry in found]
        if folder.name in names[1:]:
            return f"; remove {folder} to go on from {names[names.index(folder.name) - 1]}"
    return ""
