"""Where a model runs."""

from __future__ import annotations

import torch

from linattn.errors import DeviceError


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is cuda where there is one, else cpu.

    Raises DeviceError for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device must be cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise DeviceError(f"device must be cpu, cuda, cuda:N or auto, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"there is no {name} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
