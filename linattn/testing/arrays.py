"""Arrays as a kernel gets them: of its kind, in a chosen memory layout, between NaN."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from linattn.arrays import Array

LAYOUTS = ("plain", "strided", "offset")
GUARD = 37
"""Elements of NaN before and after a guarded array: odd, so that what lies between them is not aligned."""

HALVES = {"numpy": ("float16",), "torch": ("float16", "bfloat16"), "cupy": ("float16",)}


@dataclass(frozen=True)
class Placed:
    """An array, and the buffer that it is a view of (itself if it is not)."""

    array: Any
    buffer: Any


def dtypes(kind: str) -> tuple[str, ...]:
    """Floating dtypes that arrays of this kind have, widest use first."""
    return ("float32", "float64", *HALVES[kind])


def namespace(kind: str) -> Any:
    """The module whose arrays these are: imported only when somebody asks for them."""
    return importlib.import_module(kind)


def place(x: Array, kind: str, dtype: str, device: str = "cpu", layout: str = "plain") -> Placed:
    """Copy a NumPy array into one of `kind`, `dtype` and memory layout; whatever lies between or around it
    is NaN.

    "plain" is contiguous, "offset" is contiguous between two guard bands, "strided" has every axis but the
    first two
    reversed in memory order and every second element unused. Integers and booleans get another value as
    their guard.
    """
    if layout == "plain":
        made = _make(np.array(x), kind, dtype, device)
        return Placed(made, made)
    if layout == "offset":
        flat = np.full(x.size + 2 * GUARD, _poison(x), x.dtype)
        flat[GUARD : GUARD + x.size] = x.ravel()
        buffer = _make(flat, kind, dtype, device)
        return Placed(buffer[GUARD : GUARD + x.size].reshape(x.shape), buffer)
    order = tuple(reversed(range(x.ndim)))
    wide = np.full([2 * size + 1 for size in reversed(x.shape)], _poison(x), x.dtype)
    cut = tuple(slice(1, None, 2) for _ in order)
    wide[cut] = x.transpose(order)
    buffer = _make(wide, kind, dtype, device)
    view = buffer[1::2] if x.ndim == 1 else buffer[cut]
    return Placed(view.permute(order) if kind == "torch" else view.transpose(order), buffer)


def _poison(x: Array) -> Any:
    return np.nan if x.dtype.kind == "f" else True if x.dtype.kind == "b" else 2**30


def _make(x: Array, kind: str, dtype: str, device: str) -> Any:
    wanted = dtype if x.dtype.kind == "f" else str(x.dtype)
    if kind == "torch":
        torch = namespace("torch")
        return torch.from_numpy(np.ascontiguousarray(x)).to(device=device, dtype=getattr(torch, wanted))
    return namespace(kind).asarray(x.astype(wanted))


def back(x: Any) -> Array:
    """Any array as NumPy: floats as float64, which holds every value exactly."""
    if type(x).__module__.split(".")[0] == "torch":
        x = x.detach().cpu()
        return np.asarray((x.double() if x.is_floating_point() else x).numpy())
    if type(x).__module__.split(".")[0] == "cupy":
        x = x.get()
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def facts(x: Any) -> tuple[str, str, str]:
    """Kind, dtype and device of an array, as words."""
    kind = type(x).__module__.split(".")[0]
    return kind, str(x.dtype).rpartition(".")[2], str(getattr(x, "device", "cpu"))


@contextlib.contextmanager
def fresh_buffers_are_nan(kind: str) -> Iterator[None]:
    """While active, memory that nobody has written reads as NaN, where the framework lets us see to that."""
    if kind == "torch":
        torch = namespace("torch")
        before, filled = (
            torch.get_deterministic_debug_mode(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )
        torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports a compiler first
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
            torch.utils.deterministic.fill_uninitialized_memory = filled
        return
    module = namespace(kind)
    plain = {name: getattr(module, name) for name in ("empty", "empty_like")}

    def filled_with_nan(make: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            made = make(*arguments, **keywords)
            if made.dtype.kind in "fc":
                made.fill(np.nan)
            return made

        return call

    for name, make in plain.items():
        setattr(module, name, filled_with_nan(make))
    try:
        yield
    finally:
        for name, make in plain.items():
            setattr(module, name, make)
