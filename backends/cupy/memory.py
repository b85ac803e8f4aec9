"""Arrays of any library as kernels see them: an address, and strides in elements."""

from __future__ import annotations

from typing import Any

from linattn.arrays import Array, cast, dtype_name, kind_of, namespace


def address(x: Array | None) -> int:
    """Where an array's first element lies; 0 for none."""
    if x is None:
        return 0
    kind = kind_of(x)
    if kind == "torch":
        return int(x.data_ptr())
    return int(x.data.ptr if kind == "cupy" else x.ctypes.data)


def strides(x: Array) -> tuple[int, ...]:
    """In elements."""
    if kind_of(x) == "torch":
        return tuple(x.stride())
    return tuple(step // x.itemsize for step in x.strides)


def dense(x: Array, dtype: str) -> Array:
    """The same values in a dtype, without gaps; the array itself where it is so already."""
    x = cast(x, dtype)
    if kind_of(x) == "torch":
        return x.contiguous()
    return x if x.flags.c_contiguous else x.copy(order="C")


def room(like: Array, shape: tuple[int, ...], dtype: str, *, zero: bool = False) -> Array:
    """A new array beside another one: zeros, or whatever lies there."""
    kind = kind_of(like)
    if kind == "torch":
        torch = namespace("torch")
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=getattr(torch, dtype), device=like.device)
    xp: Any = namespace(kind or "numpy")
    wanted = like.dtype if dtype == dtype_name(like) else dtype  # NumPy may not know bfloat16 by its name
    return (xp.zeros if zero else xp.empty)(shape, dtype=wanted)
