"""What --device may say, and whether there is one."""

from __future__ import annotations

import importlib
import importlib.util
import re

from linattn.errors import OptionError

DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


def check_name(device: str) -> None:
    """Raise OptionError for what cannot be a device, and for one more CUDA device than there are."""
    found = DEVICE.fullmatch(device)
    if found is None:
        raise OptionError(f"--device must be cpu, cuda, cuda:1 or the like, got {device!r}")
    if found[2] is None or not device.startswith("cuda") or importlib.util.find_spec("torch") is None:
        return
    count = importlib.import_module("torch").cuda.device_count()
    if 0 < count <= int(found[2][1:]):
        raise OptionError(f"--device {device}: there are {count} CUDA devices here, counted from 0")


def check_here(device: str) -> None:
    """Raise OptionError for a device that cannot hold an array here, with torch's reason; with torch only."""
    check_name(device)
    if cuda_is_missing(device):
        raise OptionError(f"--device {device}: torch.cuda.is_available() is False")
    if device.startswith("cpu") or importlib.util.find_spec("torch") is None:
        return
    try:
        importlib.import_module("torch").empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # as its backends have it
        raise OptionError(
            f"--device {device} cannot be used here: {first_line(error).partition('. ')[0]}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, in one line; its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def cuda_is_missing(device: str) -> bool:
    """Whether a CUDA device is named and torch sees none; False where torch is not installed to ask."""
    if not device.startswith("cuda") or importlib.util.find_spec("torch") is None:
        return False
    return not importlib.import_module("torch").cuda.is_available()
