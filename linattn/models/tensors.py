"""What a checkpoint's tensors may be: each there once, of floating point."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from linattn.arrays import FLOATS
from linattn.errors import CheckpointError

__all__ = ["check_dtype", "once"]

Tensor = TypeVar("Tensor")


def once(source: object, found: Iterable[tuple[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    """Return what was found by names without the prefix that some have.

    Raises CheckpointError where one is there twice.
    """
    names: dict[str, Tensor] = {}
    for name, tensor in found:
        here = name.removeprefix(prefix)
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
