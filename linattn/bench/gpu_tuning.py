"""Peers whose kernels try hundreds of configurations at their first call: compiled on every core first.

Nothing here changes which configuration a kernel chooses among: each is still timed, by itself, by the
kernel's own tuner when the peer is first called; what is not repeated is the compilation, and the time spent
on one configuration is shorter than the tuner's default.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from linattn.bench.gpu_cases import GpuCase
from linattn.bench.gpu_measure import failures
from linattn.bench.gpu_peers import peers
from linattn.bench.gpu_work import make

TOKENS = 256  # no tuner asks for the length
WARM_UP, REPEAT = 5, 25  # milliseconds of one configuration


def compile_tuned(cases: Sequence[GpuCase], limit: float, *, device: str = "cuda") -> float:
    """Compile every configuration that the peers of these cases will try; return the seconds it took.

    limit: seconds after which no further peer is begun. A peer that fails here fails again where its case is
    measured, and is reported there.
    """
    start = time.perf_counter()
    expected = failures()
    with _compiling(device) as pool:
        for case, peer in _distinct(cases):
            if time.perf_counter() - start > limit:
                break
            try:
                small = case if case.kind == "decode" else replace(case, n=TOKENS)
                prepared = peer.prepare(small, make(small, device=device))
                with pool.collecting():
                    prepared()
            except expected:
                continue
    return time.perf_counter() - start


def _distinct(cases: Sequence[GpuCase]) -> list[tuple[GpuCase, Any]]:
    """One case for each set of kernels: lengths do not matter to a tuner."""
    found: dict[tuple[Any, ...], tuple[GpuCase, Any]] = {}
    for case in cases:
        for peer in peers(case):
            if peer.tuned:
                found.setdefault((peer.name, case.kind, case.b, case.h, case.d), (case, peer))
    return list(found.values())


class _Pool:
    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self.executor = executor
        self.pending: list[Future[Any]] = []

    def _submit(self, call: Any, quantiles: Sequence[float]) -> list[float]:
        """In place of a tuner's clock: compile in another thread, and say something."""
        self.pending.append(self.executor.submit(call))
        return [1.0] * len(quantiles)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Tuners compile, time nothing, write nothing down and forget what they chose."""
        tuners = autotuners()
        kept = [(tuner, tuner.cache_results) for tuner in tuners]
        for tuner in tuners:
            tuner.do_bench, tuner.cache_results = self._submit, False
        try:
            yield
        finally:
            for future in self.pending:
                future.exception()  # waits; a configuration that does not compile is the tuner's business
            self.pending.clear()
            for tuner, cache_results in kept:
                tuner.do_bench, tuner.cache_results = _briefly(), cache_results
                tuner.cache.clear()


@contextmanager
def _compiling(device: str) -> Iterator[_Pool]:
    import torch

    def begin() -> None:
        if device == "cuda":
            torch.cuda.set_device(torch.cuda.current_device())

    with ThreadPoolExecutor(os.cpu_count() or 1, initializer=begin) as executor:
        yield _Pool(executor)


def _briefly() -> Any:
    from triton.testing import do_bench

    return functools.partial(do_bench, warmup=WARM_UP, rep=REPEAT)


def autotuners() -> list[Any]:
    """Every tuner among the modules of fla that are loaded."""
    from triton.runtime.autotuner import Autotuner

    found: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "fla" or module is None:
            continue
        for value in list(vars(module).values()):
            while value is not None and not isinstance(value, Autotuner):
                value = vars(value).get("fn") if hasattr(value, "__dict__") else None
            if value is not None:
                found[id(value)] = value
    return list(found.values())
