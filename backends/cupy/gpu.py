"""Kernels on a GPU: compiled at first use and kept on disk by CuPy, started on the caller's stream."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from linattn.arrays import Array, kind_of
from linattn.backends.cupy import exact, hopper, sources
from linattn.backends.cupy.launch import Room

PATIENCE = 0.5  # seconds: reading a compiled kernel from the disk takes less, compiling it more
NOTHING = contextlib.nullcontext()


class Gpu:
    """Starts kernels on the device of the arrays that it is shown, which `on` has made the current one."""

    def __call__(
        self, file: str, kernel: str, arguments: bytes, grid: int, threads: int, shared: int, like: Array
    ) -> None:
        """Start `grid` blocks of `threads` threads with `shared` bytes; kernel: a name expression."""
        held = ctypes.create_string_buffer(arguments, len(arguments))
        places = ctypes.c_void_p(ctypes.addressof(held))
        start = self.starter(file, kernel, len(arguments), grid, threads, shared, like)
        start(self.streams(like)(), ctypes.addressof(places), 0)

    def starter(
        self, file: str, kernel: str, size: int, grid: int, threads: int, shared: int, like: Array
    ) -> Callable[[int, int, int], None]:
        import cupy

        found = function(file, kernel, device_index(like)).ptr  # which stays, as `function` keeps it
        return functools.partial(cupy.cuda.driver.launchKernel, found, grid, 1, 1, threads, 1, 1, shared)

    def streams(self, like: Array) -> Callable[[], int]:
        index = device_index(like)
        if kind_of(like) == "torch":
            return functools.partial(sys.modules["torch"]._C._cuda_getCurrentRawStream, index)
        import cupy

        current = cupy.cuda.get_current_stream
        return lambda: int(current(index).ptr)

    def on(self, device: str) -> contextlib.AbstractContextManager[Any]:
        return current(index_of(device))

    def room(self, like: Array) -> Room:
        return Room(limits(device_index(like))[0])

    def multiprocessors(self, like: Array) -> int:
        return limits(device_index(like))[1]

    def capability(self, like: Array) -> int:
        return limits(device_index(like))[2]

    def maps(self, *arrays: Array) -> bytes:
        return hopper.maps(arrays)


def start_together(
    file: str, kernel: str, arguments: bytes, grid: int, threads: int, shared: int, like: Array
) -> None:
    """Start blocks that wait for each other: they begin once there is a place for each of them.

    On the current stream of the device of `like`.
    """
    import cupy

    index = device_index(like)
    with current(index):
        found = function(file, kernel, index).ptr
        held = ctypes.create_string_buffer(arguments, len(arguments))
        places = ctypes.c_void_p(ctypes.addressof(held))
        stream = Gpu().streams(like)()
        cupy.cuda.driver.launchCooperativeKernel(
            found, grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(places)
        )


@functools.cache
def unavailable() -> str | None:
    """None if this machine has what CuPy needs, else the sentence that says what is missing."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed: pip install 'linattn[cupy13]' (CUDA 13) or 'linattn[cupy12]' (CUDA 12)"
    try:
        import cupy
    except (ImportError, OSError, ValueError) as error:  # one built for another NumPy raises the last
        return f"cupy is installed, but cannot be imported: {first_line(error)}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except (RuntimeError, ImportError) as error:  # CuPy's own are a RuntimeError
        return f"no CUDA device: {first_line(error)}"
    if not count:
        return "no CUDA device: CuPy finds none"
    try:
        cupy.cuda.nvrtc.getVersion()
    except (RuntimeError, ImportError) as error:
        return f"NVRTC, which compiles the kernels, cannot be loaded: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def facts(device: str) -> tuple[int, Room]:
    """Of "cuda:0", …: the compute capability times ten, and what fits there."""
    if unavailable() is not None:  # which says so by itself
        return OLDEST_SEEN
    shared, _, capability = limits(index_of(device))
    return capability, Room(shared)


OLDEST_SEEN = 70, Room(96 * 1024)  # what is asked about where there is no device: explained calls

_here = threading.local()  # `ready`: the devices that this thread has asked for


def current(index: int) -> contextlib.AbstractContextManager[Any]:
    """Inside, a device is the current one: where kernels start, and where CuPy makes arrays."""
    import cupy

    if cupy.cuda.runtime.getDevice() != index:
        return cupy.cuda.Device(index)  # type: ignore[no-any-return]
    ready = _here.__dict__.setdefault("ready", set())
    if index not in ready:  # the driver has no context in a thread that has not called the runtime
        cupy.cuda.runtime.setDevice(index)
        ready.add(index)
    return NOTHING


@functools.cache
def index_of(device: str) -> int:
    """The number of "cuda:0", …"""
    return int(device.partition(":")[2] or 0)


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
    return found.kernel


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
