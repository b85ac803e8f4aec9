"""Kernels on a GPU: compiled at first use and kept on disk by CuPy, started on the caller's stream."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

from linattn.arrays import Array, kind_of
from linattn.backends.cupy import exact, hopper, sources
from linattn.backends.cupy.launch import Room

PATIENCE = 0.5  # seconds: reading a compiled kernel from the disk takes less, compiling it more


class Gpu:
    """Starts kernels on the device of the arrays that it is shown."""

    def __call__(
        self, file: str, kernel: str, arguments: bytes, grid: int, threads: int, shared: int, like: Array
    ) -> None:
        """Start `grid` blocks of `threads` threads with `shared` bytes; kernel: a name expression."""
        import numpy as np

        with on(like) as device:
            block = np.frombuffer(arguments, dtype=f"V{len(arguments)}")
            function(file, kernel, device)((grid,), (threads,), (block,), shared_mem=shared)

    def room(self, like: Array) -> Room:
        return Room(limits(device_index(like))[0])

    def multiprocessors(self, like: Array) -> int:
        return limits(device_index(like))[1]

    def capability(self, like: Array) -> int:
        return limits(device_index(like))[2]

    def maps(self, *arrays: Array) -> bytes:
        import cupy

        with on(arrays[0]) as device:
            cupy.cuda.runtime.setDevice(device)  # a thread that has not called the runtime has no context yet
            return hopper.maps(arrays)


@functools.cache
def unavailable() -> str | None:
    """None if this machine has what CuPy needs, else the sentence that says what is missing."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed: pip install 'linattn[cupy13]' (CUDA 13) or 'linattn[cupy12]' (CUDA 12)"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except (cupy.cuda.runtime.CUDARuntimeError, RuntimeError, ImportError) as error:
        return f"no CUDA device: {error}"
    if not count:
        return "no CUDA device: CuPy finds none"
    try:
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        return f"NVRTC, which compiles the kernels, cannot be loaded: {error}"
    return None


def facts(device: str) -> tuple[int, Room]:
    """Of "cuda:0", …: the compute capability times ten, and what fits there."""
    if unavailable() is not None:  # which says so by itself
        return OLDEST_SEEN
    index = int(device.partition(":")[2] or 0)
    shared, _, capability = limits(index)
    return capability, Room(shared)


OLDEST_SEEN = 70, Room(96 * 1024)  # what is asked about where there is no device: explained calls


@contextlib.contextmanager
def on(like: Array) -> Iterator[int]:
    """Make an array's device the current one, and its library's stream there; yields the device's number."""
    import cupy

    index = device_index(like)
    with cupy.cuda.Device(index):
        if kind_of(like) != "torch":
            yield index
            return
        stream = sys.modules["torch"].cuda.current_stream(index).cuda_stream
        with cupy.cuda.ExternalStream(stream, device_id=index):
            yield index


def device_index(like: Array) -> int:
    """The number of the device that an array is on."""
    return int(like.device.index if kind_of(like) == "torch" else like.device.id)


@functools.cache
def limits(index: int) -> tuple[int, int, int]:
    """Of a device: shared memory of a block in bytes, multiprocessors, compute capability times ten."""
    import cupy

    device = cupy.cuda.Device(index)
    found = device.attributes
    shared, count = int(found["MaxSharedMemoryPerBlockOptin"]), int(found["MultiProcessorCount"])
    return shared, count, int(device.compute_capability)


@functools.cache
def function(file: str, kernel: str, index: int) -> Any:
    """A kernel, compiled for a device; the current one."""
    import cupy

    place = sources.EXACT.get(file, f"sm_{cupy.cuda.Device(index).compute_capability}")
    with announced(f"linattn: compiling {shortened(kernel)} for {place}; CuPy keeps it for the next time"):
        if file in sources.EXACT:
            return exact.load(file, kernel, place, limits(index)[0])
        module = cupy.RawModule(code=sources.text(file), options=sources.OPTIONS, name_expressions=[kernel])
        found = module.get_function(kernel)
    found.max_dynamic_shared_size_bytes = limits(index)[0] - found.shared_size_bytes
    return found


def shortened(kernel: str) -> str:
    """A name expression without its numbers, which say nothing to a reader."""
    return re.sub(r"(, \d+)+", "", kernel)


@contextlib.contextmanager
def announced(line: str) -> Iterator[None]:
    """Say on stderr what takes so long, if it does."""
    timer = threading.Timer(PATIENCE, print, (line,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
