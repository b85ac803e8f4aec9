"""What a figure of a GPU depends on besides the code: the device, its driver, and the peers' versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess

from linattn.bench.machine import machine

PEERS = ("flash-linear-attention", "fla-core")
FACTS = (
    "command",
    "interrupted",
    "date",
    "commit",
    "GPU",
    "multiprocessors",
    "memory of the GPU",
    "driver",
    "copy bandwidth",
    "python",
    "torch",
    "triton",
    *PEERS,
    "processor",
    "cores",
    "busy",
)


def missing() -> str | None:
    """Why no GPU can be measured here, or None."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install 'linattn[triton]'"
    import torch

    return None if torch.cuda.is_available() else "torch.cuda.is_available() is False"


def gpu_machine() -> dict[str, str]:
    """The machine's facts and the current CUDA device's."""
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        **machine(),
        "GPU": f"{device.name}, compute capability {device.major}.{device.minor}",
        "multiprocessors": str(device.multi_processor_count),
        "memory of the GPU": f"{device.total_memory / 1e9:.1f} GB",
        "driver": f"{driver()}, CUDA {torch.version.cuda}",
        **{name: version(name) for name in PEERS},
    }


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"
