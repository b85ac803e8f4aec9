"""What a text may come as, ids or embeddings, and which of its columns are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from linattn.errors import ArgumentTypeError, DtypeError, OptionError, ShapeError, ValueRangeError
from linattn.models.ids import check_tensor
from linattn.prepared import PLAIN
from linattn.surroundings import lowers


def check_inputs(ids: Any, embeds: Any, width: int, layers: nn.Module | None = None) -> None:
    """Refuse all but ids [b, n] or embeddings [b, n, width] of floating point, one of them.

    layers: what takes the embeddings, in one dtype with its first matrix, unless autocast brings them there.
    Raises OptionError, ArgumentTypeError, ShapeError or DtypeError.
    """
    if (ids is None) == (embeds is None):
        raise OptionError("pass either input_ids or inputs_embeds, one of them")
    name, x = ("inputs_embeds", embeds) if ids is None else ("input_ids", ids)
    check_tensor(name, x)
    if ids is not None:
        if x.ndim != 2:
            raise ShapeError(f"input_ids must have shape [b, n], got {tuple(x.shape)}")
        return
    if x.ndim != 3 or x.shape[2] != width:
        raise ShapeError(f"inputs_embeds must have shape [b, n, {width}], got {tuple(x.shape)}")
    check_dtype("inputs_embeds", x, layers)


def check_dtype(name: str, x: torch.Tensor, layers: nn.Module | None) -> None:
    """Refuse rows that are not of floating point, or not of the layers' dtype where that counts."""
    if not x.is_floating_point():
        raise DtypeError(f"{name} must be of floating point, got {_name(x.dtype)}")
    own = None if layers is None else _dtype_of(layers)
    cast = lowers(x.device.type) and torch.float64 not in (x.dtype, own)
    if own not in (None, x.dtype) and not cast:
        raise DtypeError(
            f"{name} must have the dtype of the model's weights, {_name(own)}, got {_name(x.dtype)}"
        )


def columns_of(keep: Any) -> slice | torch.Tensor:
    """Return the columns that logits_to_keep asks for: the last so many, all for 0 or None, or those in it.

    Raises ArgumentTypeError for what is neither an int, a slice nor a tensor, ValueRangeError for negative
    numbers and steps, DtypeError or ShapeError for tensors that are no row of integers.
    """
    if isinstance(keep, torch.Tensor):
        if keep.is_floating_point() or keep.is_complex():
            raise DtypeError(f"logits_to_keep must hold integers, got {_name(keep.dtype)}")
        if keep.ndim != 1:
            raise ShapeError(f"logits_to_keep must have shape [k], got {tuple(keep.shape)}")
        return keep
    if keep is None:
        return slice(None)
    if isinstance(keep, slice):
        if keep.step is not None and keep.step < 1:
            raise ValueRangeError(f"logits_to_keep must go forwards, got {keep}")
        return keep
    if isinstance(keep, np.integer):
        keep = int(keep)
    if isinstance(keep, bool) or not isinstance(keep, int | torch.SymInt):
        raise ArgumentTypeError(f"logits_to_keep must be an int or a tensor, got {keep!r}")
    if keep < 0:
        raise ValueRangeError(f"logits_to_keep must be at least 0, got {keep}")
    return slice(-keep, None)


def keeps_all(keep: Any, columns: int) -> bool:
    """Whether logits_to_keep asks for every one of so many columns."""
    if keep is None or (isinstance(keep, int) and (keep == 0 or keep >= columns)):
        return True
    asked = columns_of(keep)
    return isinstance(asked, slice) and asked.indices(columns) == (0, columns, 1)


def _dtype_of(layers: nn.Module) -> torch.dtype | None:
    """The dtype of the first matrix, where it is a tensor as any other: sharded, quantised ones are not."""
    first = next((weight for weight in layers.parameters() if weight.ndim == 2), None)
    if first is None or type(first) not in PLAIN or not first.is_floating_point():
        return None
    return first.dtype


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
