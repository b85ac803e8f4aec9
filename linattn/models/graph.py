"""A CUDA graph by the driver's own calls, where torch's would disturb others.

`torch.cuda.CUDAGraph` is made for few recordings, which the user plans. While one is made, torch below 2.13
lets no thread draw random numbers; its stream comes from a pool out of which others may get the same one,
and then their kernels are recorded, too; one that fails leaves the allocator in the middle of it. What
records by itself has to stay unseen: here the stream is nobody else's, memory is a `torch.cuda.MemPool`,
which goes back to the device with the graph, and random numbers are left alone: work must draw none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

Tensor = torch.Tensor

NON_BLOCKING, THREAD_LOCAL, NO_FLAGS = 1, 1, ctypes.c_ulonglong(0)  # of cuda.h


class Graph:
    """Work that was recorded once; `result` is what it returned, memory that every replay writes."""

    def __init__(self, work: Callable[[], Tensor], device: torch.device) -> None:
        """Record work, which does not run. Raises RuntimeError where it cannot be, and what work raises."""
        handle = ctypes.c_void_p()
        with _recording, _no_collection(), torch.cuda.device(device):
            pool, stream = torch.cuda.MemPool(), _own_stream(device)
            raw = ctypes.c_void_p(stream.cuda_stream)
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
                _call("cuStreamBeginCapture_v2", raw, THREAD_LOCAL)
                with contextlib.ExitStack() as failing:
                    failing.callback(_abandon, raw)
                    self.result = work()
                    failing.pop_all()
                graph = _ended(raw)
                try:
                    if not pool.snapshot():  # type: ignore[no-untyped-call]
                        raise RuntimeError("memory came from another pool, which this thread uses already")
                    _call("cuGraphInstantiateWithFlags", ctypes.byref(handle), graph, NO_FLAGS)
                finally:
                    _call("cuGraphDestroy", graph)
        self.handle, self.pool, self.device = handle, pool, device
        weakref.finalize(self, _destroy, handle, device).atexit = False  # the driver may be gone by then

    def replay(self) -> None:
        """Start it on the current stream of its device, which need not be the current device."""
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        with torch.cuda.device(self.device):  # 0, the default stream, is that of the current device
            _call("cuGraphLaunch", self.handle, ctypes.c_void_p(stream))


def capture_of(stream: int) -> int:
    """The number of what is being recorded on a stream of the current device, 0 if nothing is."""
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    rest = (ctypes.c_void_p(),) * 3
    _call(
        "cuStreamGetCaptureInfo_v2",
        ctypes.c_void_p(stream),
        ctypes.byref(status),
        ctypes.byref(number),
        *rest,
    )
    return number.value if status.value else 0


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} returned the CUDA error {status}")


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _ended(stream: ctypes.c_void_p) -> ctypes.c_void_p:
    """What was recorded on a stream, which executes again what it is given."""
    graph = ctypes.c_void_p()
    _call("cuStreamEndCapture", stream, ctypes.byref(graph))
    return graph


def _abandon(stream: ctypes.c_void_p) -> None:
    with contextlib.suppress(RuntimeError):  # it may be invalid already
        _call("cuGraphDestroy", _ended(stream))


def _destroy(handle: ctypes.c_void_p, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        _call("cuGraphExecDestroy", handle)


_recording = threading.Lock()  # on one stream, one at a time


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    handle = ctypes.c_void_p()
    _call("cuStreamCreate", ctypes.byref(handle), NON_BLOCKING)
    return torch.cuda.ExternalStream(handle.value, device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """What a collection destroys may be what nobody may destroy during a recording: another graph, say."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
