"""What a bug report needs: versions, devices, backends."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

LIBRARIES = ("numpy", "torch", "triton", "cupy", "safetensors", "transformers")


def environment() -> dict[str, str]:
    """Return versions of linattn, Python, and the libraries it can use, the devices, and the usable backends.

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
    facts["backends"] = ", ".join(name for name, why in available_backends().items() if why is None)
    return facts


def _devices() -> list[str]:
    devices = [f"cpu ({platform.machine()})"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return devices
