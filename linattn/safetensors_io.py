"""Reading and writing safetensors files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linattn.arrays import Array, kind_of
from linattn.errors import ArgumentTypeError, CheckpointError


def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise CheckpointError("saving and loading needs safetensors: pip install safetensors") from error
    return safetensors


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Array], facts: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (all of one kind) and string `facts`; `path` keeps its old content until the new one is
    whole.

    Raises CheckpointError if the folder is missing, unwritable or full.
    """
    _library()
    kinds = {kind_of(x) for x in tensors.values()}
    if kinds == {"torch"}:
        from safetensors.torch import save as serialise

        # copies: safetensors takes no two tensors that share their storage
        own = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
        data = serialise(own, dict(facts or {}))
    elif kinds <= {"numpy"}:
        import numpy as np
        from safetensors.numpy import save as serialise_numpy

        data = serialise_numpy(
            {name: np.ascontiguousarray(x) for name, x in tensors.items()}, dict(facts or {})
        )
    else:
        raise ArgumentTypeError(f"cannot save arrays of kinds {sorted(map(str, kinds))}")
    write_whole(path, data)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file beside `path`, flush it to the disk, then put it in place in one step."""
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        old = "; the old file is untouched" if target.exists() else ""
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}{old}") from error


def load(
    path: str | os.PathLike[str], kind: str = "numpy", device: str = "cpu"
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors and facts of a file. Raises CheckpointError if it is missing, truncated or not
    safetensors.
    """
    library = _library()
    if kind not in ("numpy", "torch"):
        raise ArgumentTypeError(f"kind must be 'numpy' or 'torch', got {kind!r}")
    framework, where = ("np", "cpu") if kind == "numpy" else ("pt", device)
    try:
        with library.safe_open(os.fspath(path), framework=framework, device=where) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (library.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
