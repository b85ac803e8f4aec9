"""A module in CuPy's place, whose arrays lie on the host: the way of a call on CuPy arrays, without a GPU."""

from __future__ import annotations

import types
from typing import Any

import numpy as np


class Device:
    """A device that is the current one inside."""

    current = 0

    def __init__(self, id: int) -> None:
        self.id = id

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *_: object) -> None:
        Device.current = self.before


class Array:
    """What linattn asks of a CuPy array, and nothing else."""

    def __init__(self, values: np.ndarray, device: int | None = None) -> None:
        self.values = values
        self.shape, self.strides, self.dtype = values.shape, values.strides, values.dtype
        self.itemsize, self.ndim, self.flags, self.size = (
            values.itemsize, values.ndim, values.flags, values.size
        )  # fmt: skip
        self.device = Device(Device.current if device is None else device)
        self.data = types.SimpleNamespace(ptr=values.ctypes.data, device_id=self.device.id)

    def __getitem__(self, key: Any) -> Array:
        return Array(self.values[key], self.device.id)

    def __add__(self, other: Any) -> Array:
        return Array(self.values + getattr(other, "values", other), self.device.id)

    def astype(self, dtype: Any) -> Array:
        return Array(self.values.astype(dtype))

    def copy(self, order: str = "C") -> Array:
        return Array(self.values.copy(order=order))

    def get(self) -> np.ndarray:
        return self.values


def module() -> types.ModuleType:
    """To be put among `sys.modules`."""
    found: Any = types.ModuleType("cupy")
    found.ndarray = Array
    found.asarray = lambda values: Array(np.array(values))
    found.empty = lambda *args, **given: Array(np.empty(*args, **given))
    found.zeros = lambda *args, **given: Array(np.zeros(*args, **given))
    stream = types.SimpleNamespace(synchronize=lambda: None, ptr=5)
    found.cuda = types.SimpleNamespace(
        Device=Device, get_current_stream=lambda device=0: stream,
        runtime=types.SimpleNamespace(
            getDevice=lambda: Device.current, getDeviceCount=lambda: 2, setDevice=lambda device: None
        ),
        nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)), driver=types.SimpleNamespace(),
    )  # fmt: skip
    return found
