"""Arrays of any library as kernels see them: an address, and strides in elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from linattn.arrays import Array, cast, dtype_name, kind_of, namespace


class Unrepeatable(Exception):
    """A pass computes with an array itself: what it does cannot be planned from descriptions."""


class Shelf(Protocol):
    """What keeps account of described arrays."""

    def array(self, shape: tuple[int, ...], dtype: str, zero: bool) -> Described: ...


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """All that the plan of a pass reads of an array: it stands for every array that is like it."""

    shelf: Shelf
    shape: tuple[int, ...]
    steps: tuple[int, ...]  # strides in elements
    dtype: str
    address: int  # a mark in its place

    def _refuse(self, *_: object) -> NoReturn:
        raise Unrepeatable

    astype = __add__ = __sub__ = _refuse


def address(x: Array | None) -> int:
    """Where an array's first element lies; 0 for none."""
    if x is None:
        return 0
    kind = kind_of(x)
    if kind == "torch":
        return int(x.data_ptr())
    if kind == "numpy":
        return int(x.ctypes.data)
    return int(x.data.ptr if kind == "cupy" else x.address)


def strides(x: Array) -> tuple[int, ...]:
    """In elements."""
    if type(x) is Described:
        return x.steps
    if kind_of(x) == "torch":
        return tuple(x.stride())
    return tuple(step // x.itemsize for step in x.strides)


def without_gaps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array in C order."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


def dense(x: Array, dtype: str) -> Array:
    """The same values in a dtype, without gaps; the array itself where it is so already."""
    x = cast(x, dtype)
    kind = kind_of(x)
    if kind == "torch":
        return x.contiguous()
    if kind is None:
        return x if x.steps == without_gaps(x.shape) else x.astype(dtype)
    return x if x.flags.c_contiguous else x.copy(order="C")


def dtype_beside(like: Array, dtype: str) -> Any:
    """A dtype as the library of an array has it."""
    if kind_of(like) == "torch":
        return getattr(namespace("torch"), dtype)
    # NumPy may not know bfloat16 by its name
    return like.dtype if dtype == dtype_name(like) else namespace("numpy").dtype(dtype)


def room(like: Array, shape: tuple[int, ...], dtype: str, *, zero: bool = False) -> Array:
    """A new array beside another one: zeros, or whatever lies there."""
    if type(like) is Described:
        return like.shelf.array(shape, dtype, zero)
    kind, wanted = kind_of(like) or "numpy", dtype_beside(like, dtype)
    xp: Any = namespace(kind)
    make = xp.zeros if zero else xp.empty
    return make(shape, dtype=wanted, device=like.device) if kind == "torch" else make(shape, dtype=wanted)
