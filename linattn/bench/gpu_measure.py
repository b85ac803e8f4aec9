"""Clocks of a GPU: medians of device time with a cold cache, host time, memory, copy bandwidth."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

from linattn.bench.gpu_work import Outputs, Work
from linattn.errors import LinattnError

GIB = 2**30
CALLS, ROUNDS = 200, 5  # of a tiny shape, for the time on the host
STEPS = 20  # of a CUDA graph, as starting one takes longer than a small step


class Meter(Protocol):
    """What the runner asks of a clock."""

    def gigabytes_per_second(self) -> float:
        """Of a large copy on the device, bytes read and bytes written both counted."""

    def first(self, work: Work) -> tuple[float, Outputs]:
        """Seconds of a call from the host's side, and what it returned."""

    def once(self, work: Work) -> tuple[float, int]:
        """Milliseconds of one call after one that is not timed, and the most bytes that it holds beyond those
        before.
        """

    def milliseconds(self, work: Work, medians: int = 1, about: float | None = None) -> float:
        """The smallest of so many medians, each over many calls, the L2 cache flushed before each.

        about: milliseconds that `once` gave; None asks it.
        """

    def replayed(self, work: Work, medians: int = 1) -> float | None:
        """The same of one of `STEPS` calls in a CUDA graph; None where they cannot be captured."""

    def host_microseconds(self, work: Work) -> float:
        """From Python to the launch, per call."""

    def peak_bytes(self, work: Work) -> int:
        """The most memory that a call holds beyond what was held before."""


def captured(run: Callable[[], Any], times: int = 1) -> tuple[Any, Any]:
    """Return a CUDA graph of so many calls, and what the last one returned; three come before, uncaptured."""
    torch: Any = importlib.import_module("torch")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(times):
            outputs = run()
    return graph, outputs


class Cuda:
    """The current CUDA device. rep: milliseconds over which a median is taken, at least."""

    def __init__(self, rep: float = 40.0) -> None:
        import torch

        self.torch: Any = torch
        self.rep = rep

    def gigabytes_per_second(self) -> float:
        free, _ = self.torch.cuda.mem_get_info()
        size = min(2 * GIB, free // 4)
        source = self.torch.empty(size, dtype=self.torch.uint8, device="cuda").random_()
        target = self.torch.empty_like(source)
        taken = self.milliseconds(lambda: (target.copy_(source),))
        return float(2 * size / taken / 1e6)

    def first(self, work: Work) -> tuple[float, Outputs]:
        self.torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = work()
        self.torch.cuda.synchronize()
        return time.perf_counter() - start, outputs

    def once(self, work: Work) -> tuple[float, int]:
        cuda = self.torch.cuda
        work()
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        start.record()
        work()
        end.record()
        cuda.synchronize()
        return float(start.elapsed_time(end)), max(0, int(cuda.max_memory_allocated() - before))

    def milliseconds(self, work: Work, medians: int = 1, about: float | None = None) -> float:
        from triton.testing import do_bench

        expected = self.once(work)[0] if about is None else about
        rep = min(max(self.rep, 12 * expected), 6 * self.rep)
        return min(
            float(do_bench(work, warmup=self.rep / 4, rep=rep, return_mode="median")) for _ in range(medians)
        )

    def replayed(self, work: Work, medians: int = 1) -> float | None:
        try:
            graph, outputs = captured(work, STEPS)
            taken = self.milliseconds(lambda: (graph.replay(),), medians) / STEPS
        except failures():  # what a capture forbids
            self.torch.cuda.synchronize()
            return None
        del outputs
        return taken

    def host_microseconds(self, work: Work) -> float:
        for _ in range(10):
            work()
        rounds = []
        gc.collect()
        gc.disable()  # as timeit does: what peers and compilers left behind is not a call's
        try:
            for _ in range(ROUNDS):
                self.torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(CALLS):
                    work()
                rounds.append(time.perf_counter() - start)
        finally:
            gc.enable()
        self.torch.cuda.synchronize()
        return statistics.median(rounds) / CALLS * 1e6

    def peak_bytes(self, work: Work) -> int:
        cuda = self.torch.cuda
        work()  # compilation and tuning leave buffers of their own
        cuda.synchronize()
        cuda.empty_cache()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        outputs = work()
        cuda.synchronize()
        del outputs
        return int(cuda.max_memory_allocated() - before)


def check_device() -> None:
    """Refuse, in one sentence, a machine on which nothing can be measured.

    Raises LinattnError.
    """
    from linattn import registry
    from linattn.bench.gpu_machine import missing

    reason = missing() or registry.get("triton").unavailable()
    if reason is not None:
        raise LinattnError(f"`linattn bench --gpu` needs a CUDA GPU: {reason}")


def failures() -> tuple[type[Exception], ...]:
    """What a computation may raise that must not end the run: what torch, Triton and packages raise."""
    expected = (ImportError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError)
    try:
        from triton.runtime.errors import TritonError
    except ImportError:
        return (*expected, LinattnError, OSError)
    return (*expected, LinattnError, OSError, TritonError)


def sentence(error: Exception) -> str:
    """The first line of an error, with its class."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:200]}"
