"""What kind of array came: its library, dtype and device, without importing any framework."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np

# NumPy, torch and CuPy arrays have no common static type; `Array` marks them.
Array = Any

FLOATS = ("float64", "float32", "float16", "bfloat16")

_torch: Any = sys.modules.get("torch")


def torch_if_loaded() -> Any:
    """torch, where it has been imported.

    Compilers that see `sys.modules` look at all of it, and fail where another thread imports something then.
    They see it only where torch was imported after this, and no call came before those that they record.
    """
    global _torch
    if _torch is not None:
        return _torch
    found = sys.modules.get("torch")
    if found is not None and not found.compiler.is_compiling():
        _torch = found
    return found


def kind_of(x: object) -> str | None:
    """Return "numpy", "torch" or "cupy", or None for anything else (lists, scalars, other libraries).

    A masked array is something else: its mask would be ignored.
    """
    if isinstance(x, np.ndarray):
        return None if isinstance(x, np.ma.MaskedArray) else "numpy"
    torch = torch_if_loaded()
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    if torch is not None and torch.compiler.is_compiling():
        return None
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return "cupy"
    return None


def dtype_name(x: Array) -> str:
    """Return "float32", "int64", … for any kind of array."""
    return _spelt(x.dtype) if isinstance(x, np.ndarray) else str(x.dtype).removeprefix("torch.")


_spelt = functools.lru_cache(maxsize=64)(str)  # NumPy takes a microsecond or more for it, each time


def device_name(x: Array) -> str:
    """Return "cpu", "cuda:0", …"""
    if isinstance(x, np.ndarray):
        return "cpu"
    return str(x.device) if kind_of(x) == "torch" else f"cuda:{x.device.id}"


def traced() -> bool:
    """Whether a compiler, torch.export or torch.jit.trace records this call for values still to come."""
    torch = torch_if_loaded()
    return torch is not None and (torch.compiler.is_compiling() or torch._C._is_tracing())


def readable(x: Array) -> bool:
    """Whether values lie on the host, and are there already."""
    return device_name(x) == "cpu" and not traced() and getattr(x, "fake_mode", None) is None


def accumulate_dtype(dtype: str) -> str:
    """The dtype of sums and states: float64 for float64, float32 for everything narrower."""
    return "float64" if dtype == "float64" else "float32"


def namespace(kind: str) -> Any:
    """The module whose functions take this kind of array (NumPy 2, torch and CuPy share most names)."""
    if kind == "numpy":
        return np
    return torch_if_loaded() if kind == "torch" else sys.modules[kind]


def cast(x: Array, dtype: str) -> Array:
    """`x` in another dtype, or `x` itself when it has that dtype already."""
    torch = torch_if_loaded()
    if torch is not None and isinstance(x, torch.Tensor):
        wanted = getattr(torch, dtype)
        return x if x.dtype == wanted else x.to(wanted)
    return x if dtype_name(x) == dtype else x.astype(dtype)


def empty_like_kind(x: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialised array of the same kind and on the same device as `x`."""
    if kind_of(x) == "torch":
        return x.new_empty(shape, dtype=getattr(namespace("torch"), dtype))
    return namespace(kind_of(x) or "numpy").empty(shape, dtype=dtype)


def zeros_like_kind(x: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros of the same kind and on the same device as `x`."""
    if kind_of(x) == "torch":
        return x.new_zeros(shape, dtype=getattr(namespace("torch"), dtype))
    return namespace(kind_of(x) or "numpy").zeros(shape, dtype=dtype)


def written(*arrays: Any) -> None:
    """Tell autograd what kernels wrote: a graph that kept the old values must not go on with the new ones."""
    torch = torch_if_loaded()
    if torch is None:
        return
    parts = [x for x in arrays if isinstance(x, torch.Tensor) and not x.is_inference()]
    if parts:
        torch.autograd.graph.increment_version(parts)


def all_finite(x: Array) -> bool:
    """Whether a host array holds no NaN and no infinity; a sum that overflows counts as one."""
    return math.isfinite(float(x.sum()))


def to_numpy(x: Array) -> np.ndarray:
    """A host array of the same values; for arrays that are on the host already, and for `check=True`."""
    if isinstance(x, np.ndarray):
        return x
    if kind_of(x) == "torch":
        host = x.detach().cpu()
        if dtype_name(host) == "bfloat16":
            return np.asarray(host.float().numpy())
        # `numpy()` would fix the size of a storage that its owner may want to free, as FSDP does
        return np.asarray((host.clone() if host.data_ptr() == x.data_ptr() else host).numpy())
    return np.asarray(x.get())


def table(values: np.ndarray, like: Array, dtype: str) -> Array:
    """A small host table (a decay schedule, angles) as an array beside `like`.

    A device gets each table once: a copy from the host would synchronise, and break a graph's capture.
    """
    kind = kind_of(like)
    if kind != "torch":
        values = np.ascontiguousarray(values, dtype=dtype)
        if kind == "numpy":
            return values
        return _for_cupy(values.tobytes(), values.shape, dtype, int(like.device.id))
    torch = namespace("torch")
    if not torch.compiler.is_compiling():
        values = np.array(values, dtype=dtype)  # a copy: later changes of the table are not this call's
    watched = torch.compiler.is_compiling() or type(like) not in (torch.Tensor, torch.nn.Parameter)
    if watched or like.device.type == "cpu" or torch._C._len_torch_dispatch_stack():
        return torch.as_tensor(values, dtype=getattr(torch, dtype), device=like.device)
    values = np.ascontiguousarray(values, dtype=dtype)
    return _on_device(values.tobytes(), values.shape, dtype, str(like.device))


@functools.lru_cache(maxsize=256)
def _on_device(data: bytes, shape: tuple[int, ...], dtype: str, device: str) -> Array:
    torch = sys.modules["torch"]
    values = np.frombuffer(data, dtype=dtype).reshape(shape).copy()
    with torch.inference_mode(False):
        return torch.from_numpy(values).to(device)


@functools.lru_cache(maxsize=256)
def _for_cupy(data: bytes, shape: tuple[int, ...], dtype: str, device: int) -> Array:
    cupy = namespace("cupy")
    with cupy.cuda.Device(device):
        found = cupy.asarray(np.frombuffer(data, dtype=dtype).reshape(shape))
        cupy.cuda.get_current_stream().synchronize()  # whatever stream reads it next
    return found
