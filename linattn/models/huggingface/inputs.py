"""What a text may come as: ids or embeddings."""

from __future__ import annotations

from typing import Any

import torch

from linattn.errors import ArgumentTypeError, DtypeError, OptionError, ShapeError


def check_inputs(ids: Any, embeds: Any, width: int) -> None:
    """Refuse all but ids [b, n] or embeddings [b, n, width] of floating point, one of them.

    Raises OptionError, ArgumentTypeError, ShapeError or DtypeError.
    """
    if (ids is None) == (embeds is None):
        raise OptionError("pass either input_ids or inputs_embeds, one of them")
    name, x = ("inputs_embeds", embeds) if ids is None else ("input_ids", ids)
    if not isinstance(x, torch.Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if ids is not None:
        if x.ndim != 2:
            raise ShapeError(f"input_ids must have shape [b, n], got {tuple(x.shape)}")
        return
    if x.ndim != 3 or x.shape[2] != width:
        raise ShapeError(f"inputs_embeds must have shape [b, n, {width}], got {tuple(x.shape)}")
    if not x.is_floating_point():
        name = str(x.dtype).removeprefix("torch.")
        raise DtypeError(f"inputs_embeds must be of floating point, got {name}")
