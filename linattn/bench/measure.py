"""Time and memory of one call, in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import importlib
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from linattn.bench.cases import Figure
from linattn.bench.work import prepare

WARM_UP = 256  # tokens of the call that loads libraries and starts thread pools before anything is measured
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measurement:
    """What a process found out about one figure.

    seconds: of each timed call. extra_bytes: how far the first call raised the high-water mark of resident
    memory, its result included; None where the system does not say. threads: torch's, where torch works.
    """

    seconds: tuple[float, ...]
    extra_bytes: int | None
    threads: int | None

    @property
    def best(self) -> float:
        return min(self.seconds)


def measure(figure: Figure, runs: int) -> Measurement:
    """Call once for the memory, then `runs` times for the time.

    Libraries and thread pools have been woken by a short call before, and the inputs exist: what the
    high-water mark rises by is the call's own scratch, states and result.
    """
    prepare(replace(figure, n=min(figure.n, WARM_UP)))()
    call = prepare(figure)
    before = _resident_before()
    result = call()
    after = _high_water()
    del result
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        del result
    extra = None if before is None or after is None else max(0, after - before)
    threads = int(importlib.import_module("torch").get_num_threads()) if figure.needs_torch else None
    return Measurement(tuple(seconds), extra, threads)


def _resident_before() -> int | None:
    """Bytes from which a rise of the high-water mark counts.

    On Linux the mark is set back to what is resident now, after free memory was given back: memory that
    making the inputs needed, and freed, would otherwise hide the first bytes of the call.
    """
    gc.collect()
    if not STATUS.exists():
        return _high_water()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return _high_water()  # not allowed here: the rise is then a lower bound
    return _status("VmRSS")


def _high_water() -> int | None:
    """The most bytes that were ever resident at once, or None.

    `getrusage` is second choice: on Linux its mark survives exec, so a process starts with its parent's.
    """
    if STATUS.exists():
        return _status("VmHWM")
    try:
        resource = importlib.import_module("resource")
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.M)
    return int(found[1]) * 1024 if found else None
