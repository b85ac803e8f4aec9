"""What a checkpoint's files hold, which is looked at before transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import PreTrainedConfig

from linattn.arrays import dtype_name
from linattn.errors import CheckpointError
from linattn.models.tensors import once, placed

__all__ = ["classes_of", "dtypes", "kept", "look", "missing"]

CONFIG, WEIGHTS, PICKLES = "config.json", "model.safetensors", "pytorch_model.bin"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors


def look(folder: Path, prefix: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the dtypes of the tensors in a folder that transformers will read, if it is one.

    prefix: with which names of tensors begin or not; those that are returned do not. options: those of
    `from_pretrained`. Raises CheckpointError for tensors that are there twice, and for an index that names
    files that are not there, or tensors that are in none of them.
    """
    file, index = _files(folder, WEIGHTS if options["use_safetensors"] else PICKLES, options.get("variant"))
    found: Iterable[tuple[str, str]] = ()
    if file.is_file():
        found = _held(file).items()
    elif index.is_file():
        found = _indexed(index)
    return once(folder, found, prefix)


def classes_of(folder: Path) -> list[str]:
    """Return the classes that a folder's own configuration says it was saved from; none where it does not."""
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    found = fields.get("architectures") if isinstance(fields, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else []


def dtypes(tensors: Any) -> dict[str, str]:
    """Return the dtypes of tensors by their names."""
    pairs = tensors.items() if isinstance(tensors, Mapping) else ()
    return {name: dtype_name(x) for name, x in pairs if isinstance(x, torch.Tensor)}


def kept(path: Any, options: Mapping[str, Any], config: PreTrainedConfig) -> Path | None:
    """Where the files of a repository are, once they were loaded; None for a folder, which it is not."""
    if Path(path).exists():
        return None
    name = Path(options.get("subfolder") or "", CONFIG).as_posix()
    # of a config that was read beside
    read = getattr(config, "_commit_hash", None) or options.get("revision")
    place = try_to_load_from_cache(str(path), name, options.get("cache_dir"), read)
    return Path(place).parent if isinstance(place, str) else None


def missing(path: Any, options: Mapping[str, Any], said: str) -> str | None:
    """Say which file of weights is missing, and what there is instead.

    said: what transformers has to say; None where that is something else.
    """
    variant, safe = options.get("variant"), options["use_safetensors"]
    wanted = WEIGHTS if safe else PICKLES
    if not any(f" named {_named(name, variant)}" in said for name in (WEIGHTS, PICKLES)):
        return None
    folder = Path(path, options.get("subfolder") or "")
    lacks = f"{folder} has no {_named(wanted, variant)}"
    for name, of, advice in (
        (WEIGHTS, variant, "leave use_safetensors=False out"),
        (wanted, None, "leave variant out"),
        (PICKLES, variant, "pickled weights can run code: where you trust them, pass use_safetensors=False"),
    ):
        for file in _files(folder, name, of):
            if file.is_file():
                return f"{lacks}, it has {file.name}: {advice}"
    return lacks


def _named(name: str, variant: str | None) -> str:
    """A file's name with the variant, as transformers writes it: model.fp16.safetensors."""
    stem, _, end = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{end}"


def _files(folder: Path, name: str, variant: str | None) -> tuple[Path, Path]:
    """Where the tensors may be: in one file, or in those of an index."""
    return folder / _named(name, variant), folder / _named(f"{name}.index.json", variant)


def _held(file: Path) -> dict[str, str]:
    """The dtypes of a file's tensors by their names; no tensor is read."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            codes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        return {name: DTYPES.get(code, code) for name, code in codes.items()}
    return dtypes(torch.load(file, map_location="meta", weights_only=True))


def _indexed(index: Path) -> list[tuple[str, str]]:
    """What is in the files that an index names; refuse one that names what is not there."""
    places = placed(index, index.read_bytes())
    found: list[tuple[str, str]] = []
    for file in sorted({*places.values()}):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: {index.name} names it")
        found += _held(file).items()
    if lost := sorted(places.keys() - {name for name, _ in found}):
        names = ", ".join(lost[:3])
        raise CheckpointError(f"{index} is damaged: its files lack {names} ({len(lost)} in all)")
    return found
