"""Checkpoints are loaded whole, from safetensors, or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from linattn.errors import CheckpointError

__all__ = ["ShapeMismatchError", "load_whole"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (pickle.UnpicklingError, EOFError, KeyError, RuntimeError)  # what torch.load raises for damage
READER = "PytorchStreamReader"


class ShapeMismatchError(CheckpointError, RuntimeError):
    """A tensor of another shape; a RuntimeError, too, as transformers raises one there."""


def load_whole(
    load: Callable[..., Any],
    path: Any,
    *arguments: Any,
    new: tuple[str, tuple[str, ...]] = ("", ()),
    **options: Any,
) -> Any:
    """Return what `load`, a `PreTrainedModel.from_pretrained`, makes of a checkpoint, if nothing is amiss.

    Keys may begin with the base model's name or not. Pickled weights are read only with
    use_safetensors=False. With output_loading_info=True the report is returned, and nothing that it says is
    an error. new: a class, and beginnings of names of its tensors that a checkpoint of another class may
    lack, as its own task's are new.

    Raises CheckpointError when tensors are missing, unknown or of another shape (unless
    ignore_mismatched_sizes=True), or a file is damaged or, of a folder with an index, missing.
    """
    options.setdefault("use_safetensors", True)
    wants_report = options.pop("output_loading_info", False)
    shapes_may_differ = options.pop("ignore_mismatched_sizes", wants_report)
    index = _index_of(path, options)
    try:
        if index is not None:
            _check_index(index)
        model, report = load(
            path, *arguments, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except PICKLED as error:
        if options["use_safetensors"] or (isinstance(error, RuntimeError) and READER not in str(error)):
            raise
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path}: its pickled weights are damaged, or hold more than tensors"
            ) from error
        name = type(error).__name__
        raise CheckpointError(f"{path}: its pickled weights are damaged ({name}: {error})") from error
    except OSError as error:
        if not options["use_safetensors"] and error.errno is not None:
            raise CheckpointError(f"{path}: its pickled weights cannot be read: {error}") from error
        if options["use_safetensors"] and f" named {_named(WEIGHTS, options)}" in str(error):
            raise CheckpointError(
                f"{path} has no safetensors; pickled weights can run code: where you trust them, pass "
                "use_safetensors=False"
            ) from error
        raise
    if wants_report:
        return model, report
    if report["mismatched_keys"] and not shapes_may_differ:
        name, found, own = min(report["mismatched_keys"])
        raise ShapeMismatchError(
            f"{path} is of another model: {name} has shape {tuple(found)}, this model's is {tuple(own)}"
        )
    saved = model.config.architectures or [new[0]]
    may_lack = () if new[0] in saved else new[1]
    wrong = {
        "lacks": [key for key in report["missing_keys"] if not key.startswith(may_lack or ("\0",))],
        "has unknown": report["unexpected_keys"],
    }
    for words, keys in wrong.items():
        if keys:
            names = ", ".join(sorted(keys)[:3])
            raise CheckpointError(f"{path} is of another model: it {words} {names} ({len(keys)} in all)")
    return model


def _named(name: str, options: Mapping[str, Any]) -> str:
    """A file's name with the variant, as transformers writes it: model.fp16.safetensors."""
    variant = options.get("variant")
    stem, _, end = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{end}"


def _index_of(path: Any, options: Mapping[str, Any]) -> Path | None:
    """The index of a folder in several files, where transformers will read it."""
    if not options["use_safetensors"] or options.get("state_dict") is not None or path is None:
        return None
    folder = Path(path, options.get("subfolder") or "")
    index = folder / _named(INDEX, options)
    return index if index.is_file() and not (folder / _named(WEIGHTS, options)).is_file() else None


def _check_index(index: Path) -> None:
    """Refuse an index that names files that are not there, or tensors that are in none of them."""
    try:
        fields = json.loads(index.read_text())
    except ValueError as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    places = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(places, dict) or not places or not isinstance(fields.get("metadata"), dict):
        raise CheckpointError(f"{index} is damaged: it must have a weight_map and metadata")
    found: set[str] = set()
    for name in sorted(set(map(str, places.values()))):
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: {index.name} names it")
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    if lost := sorted(places.keys() - found):
        names = ", ".join(lost[:3])
        raise CheckpointError(f"{index} is damaged: its files lack {names} ({len(lost)} in all)")
