"""What a checkpoint's tensors may be: where its index says, each there once, of floating point."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from linattn.arrays import FLOATS
from linattn.errors import CheckpointError

__all__ = ["check_dtype", "once", "placed"]

Tensor = TypeVar("Tensor")


def placed(index: Path, data: bytes) -> dict[str, Path]:
    """Return the file of each tensor that an index of transformers, which holds these bytes, names.

    Raises CheckpointError for what is no such index, or names what are no files of its folder.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    places = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(places, dict) or not places or not isinstance(fields.get("metadata"), dict):
        raise CheckpointError(f"{index} is damaged: it must have a weight_map and metadata")
    names = places.values()
    if not all(isinstance(name, str) and name and Path(name).name == name != ".." for name in names):
        raise CheckpointError(f"{index} is damaged: it names no files of its folder")
    return {name: index.parent / place for name, place in places.items()}


def once(source: object, found: Iterable[tuple[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    """Return what was found by names without the prefix that some have.

    Raises CheckpointError where one is there twice.
    """
    names: dict[str, Tensor] = {}
    for name, tensor in found:
        here = name
        while prefix and here.startswith(prefix):  # as transformers takes it away again
            here = here.removeprefix(prefix)
        if here in names:
            raise CheckpointError(f"{source} is damaged: {here} is there twice, with {prefix!r} and without")
        names[here] = tensor
    return names


def check_dtype(source: object, name: str, dtype: str) -> None:
    """Raise CheckpointError for weights of integers, complex numbers, or too few bits."""
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{source} has weights that are no floating point numbers of 16 to 64 bits: {name} is {dtype}"
        )
