"""What token ids may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from linattn.arrays import readable
from linattn.errors import ArgumentTypeError, DtypeError, ShapeError, ValueRangeError

__all__ = ["check_ids", "check_tensor"]


def check_tensor(name: str, x: Any, axes: str | None = None) -> None:
    """Refuse what is no tensor, with ArgumentTypeError, or not of such axes, "b n", with ShapeError."""
    if not isinstance(x, torch.Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if axes is not None and x.ndim != len(axes.split()):
        raise ShapeError(f"{name} must have shape [{', '.join(axes.split())}], got {tuple(x.shape)}")


def check_ids(ids: torch.Tensor, embedding: nn.Module, vocab_size: int) -> None:
    """Raise DtypeError or ValueRangeError for what are no ids (values only where they lie on the host).

    An embedding that was put in place of the model's own has its own number of rows.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"ids must be int64 or int32, got {str(ids.dtype).removeprefix('torch.')}")
    if ids.numel() == 0 or not readable(ids):
        return  # on a device, reading the values would synchronise
    low, high, rows = int(ids.min()), int(ids.max()), getattr(embedding, "num_embeddings", vocab_size)
    if low < 0 or high >= rows:
        bad = low if low < 0 else high
        raise ValueRangeError(f"ids must lie in 0 … {rows - 1}, got {bad}")
