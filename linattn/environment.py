"""What a bug report needs: versions, devices, backends."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

LIBRARIES = ("numpy", "torch", "triton", "cupy", "safetensors", "transformers")


def environment() -> dict[str, str]:
    """Return versions of linattn, Python, and the libraries it can use, the devices with their compute
    capability, the CUDA that torch was built for and the NVIDIA driver, and the usable backends.

    Reads package metadata; imports no framework that is not imported already.
    """
    from linattn import __version__
    from linattn.registry import available_backends

    facts = {
        "linattn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    installed = {
        d.metadata["Name"].lower(): d.version
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    for library in LIBRARIES:
        names = [
            name
            for name in installed
            if name == library or (library == "cupy" and name.startswith("cupy-cuda"))
        ]
        facts[library] = installed[names[0]] if names else "not installed"
    facts["devices"] = ", ".join(_devices())
    if cuda := _cuda():
        facts["cuda"] = cuda
    facts["backends"] = ", ".join(name for name, why in available_backends().items() if why is None)
    return facts


DRIVER = Path("/proc/driver/nvidia/version")  # written by the driver's kernel module


def _devices() -> list[str]:
    devices = [f"cpu ({platform.machine()})"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)}, capability {major}.{minor})"]
    return devices


def _cuda() -> str:
    """The CUDA version of torch and the version of the driver, as far as they are known here."""
    torch = sys.modules.get("torch")
    known = []
    if torch is not None and torch.version.cuda is not None:
        known += [f"{torch.version.cuda} (torch)"]
    if DRIVER.is_file() and (found := driver(DRIVER.read_text())):
        known += [f"driver {found}"]
    return ", ".join(known)


def driver(text: str) -> str | None:
    """The driver's version, from what it says of itself."""
    found = re.search(r"Kernel Module.*?\b(\d+(?:\.\d+)+)\b", text)
    return None if found is None else found[1]
