"""Measure cases on a GPU, one after the other, all in this process."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from linattn.bench.gpu_cases import (
    HOST,
    HOST_REQUIRED,
    HOST_SHAPE,
    MEMORY,
    MEMORY_CASE,
    MEMORY_REQUIRED,
    GpuCase,
    shorter,
)
from linattn.bench.gpu_measure import Meter, failures, sentence
from linattn.bench.gpu_peers import FUSED, Peer, check_length, peers
from linattn.bench.gpu_results import BYTES, MICROSECONDS, Cost, Entry, GpuResults, GpuRow, Timing
from linattn.bench.gpu_work import Inputs, Outputs, Work, exact, make, part, relative_error, work
from linattn.errors import LinattnError

OURS = "linattn triton"
INTERRUPTED = "interrupted"  # among the facts: after how many cases
PEER_SECONDS = 150.0  # that the peers may take, compilation and tuning in it
Progress = Callable[[GpuRow | Cost], None]


@dataclass
class Bench:
    """One run. backend: ours, of every case if it is given. peer_seconds: after so long no further peer is
    begun; 0 measures none.
    """

    meter: Meter
    device: str = "cuda"
    backend: str | None = None
    peer_seconds: float = PEER_SECONDS
    full: bool = True
    spent: float = 0.0  # seconds, by the peers

    def run(
        self,
        cases: Sequence[GpuCase],
        extras: Sequence[str] = (),
        curves: Sequence[GpuCase] = (),
        *,
        facts: dict[str, str] | None = None,
        progress: Progress = lambda _: None,
    ) -> GpuResults:
        """Measure the cases, the lines of the picture, and "host" and "memory" where they are asked for.

        Interrupted, it returns what it has, and says so among the facts.
        """
        facts = dict(facts or {})
        bandwidth = self.meter.gigabytes_per_second()
        self._free()
        facts["copy bandwidth"] = f"{bandwidth:.0f} GB/s read and written"
        if self.peer_seconds > 0:
            from linattn.bench.gpu_tuning import compile_tuned

            self.spent += compile_tuned([*cases, *curves], self.peer_seconds / 2, device=self.device)
        rows: list[GpuRow] = []
        costs: list[Cost] = []
        lines: list[GpuRow] = []
        try:
            for case in cases:
                rows.append(self.row(case, bandwidth))
                progress(rows[-1])
            for name in extras:
                for cost in self.host() if name == HOST else self.memory() if name == MEMORY else ():
                    costs.append(cost)
                    progress(cost)
            for case in curves:
                known = [row for row in rows if row.case.name == case.name]
                lines.append(known[0] if known else self.row(case, bandwidth))
                if not known:
                    progress(lines[-1])
        except KeyboardInterrupt:  # what was measured is worth keeping
            facts[INTERRUPTED] = f"after {len(rows)} of {len(cases)} cases"
        return GpuResults(facts, bandwidth, self.full, tuple(rows), tuple(costs), tuple(lines))

    def row(self, case: GpuCase, bandwidth: float) -> GpuRow:
        """One case, ours and the peers'."""
        floor = case.bytes / bandwidth / 1e6
        name, backend = f"linattn {case.backend}", self.backend or case.backend
        entry = Entry(name)
        beside: list[Entry] = []
        try:
            given = make(case, device=self.device)
            right = self._exact(case, given)
            entry = self._entry(name, case, work(case, given, backend), right)
            for peer in peers(case) if self.peer_seconds > 0 else ():
                beside.append(self._peer(peer, case, given, right))
        except failures() as error:
            entry = Entry(name, why=sentence(error))
        self._free()
        return GpuRow(case, floor, entry, tuple(beside))

    def _exact(self, case: GpuCase, given: Inputs) -> Outputs:
        """The exact results, on the device, or on the host where the device does not give them."""
        try:
            return exact(case, given)
        except failures():
            return exact(case, given, device="cpu")

    def _entry(self, name: str, case: GpuCase, call: Work, right: Outputs | None) -> Entry:
        same = right is not None
        try:
            seconds, outputs = self.meter.first(call)
            error = None if right is None else relative_error(part(case, outputs), right)
            del outputs
            about, extra = self.meter.once(call)
            ms = self.meter.milliseconds(call, case.medians, about)
            replayed = self.meter.replayed(call, case.medians) if case.kind == "decode" else None
        except failures() as failure:
            return Entry(name, why=sentence(failure), same=same)
        return Entry(name, Timing(ms, error, seconds, replayed, extra), same=same)

    def _peer(self, peer: Peer, case: GpuCase, given: Inputs, right: Outputs) -> Entry:
        if not self._begins():
            why = f"not begun: the peers' {self.peer_seconds:g} s were spent ({self.spent:.0f} s)"
            return Entry(peer.name, why=why, same=peer.same)
        start = time.perf_counter()
        try:
            check_length(case, peer, self.meter, self.device)
            call = peer.prepare(case, given)
            if case.kind == "decode":  # the state has moved on
                right = self._exact(case, given)
            return self._entry(peer.name, case, call, right if peer.same else None)
        except LinattnError as refusal:
            return Entry(peer.name, why=str(refusal), same=peer.same)
        except failures() as error:
            return Entry(peer.name, why=sentence(error), same=peer.same)
        finally:
            self._free()
            self.spent += time.perf_counter() - start

    def _begins(self) -> bool:
        return self.peer_seconds > 0 and self.spent <= self.peer_seconds

    def host(self) -> list[Cost]:
        """From Python to the launch: calls so small that nothing else takes time."""
        b, h, n, d = HOST_SHAPE
        plain = GpuCase("forward", b, h, n, d, HOST_REQUIRED if self.full else None)
        ours = {
            "attention, decay per head": plain,
            "cosformer_attention, causal": replace(plain, kind="cosformer"),
            "attention, forward + backward": replace(plain, kind="forward-backward", required=None),
            "decode_step": replace(plain, kind="decode", n=1, required=None),
        }
        found = []
        for case in [
            *ours.values(),
            *(replace(case, backend="cupy", required=None) for case in ours.values()),
        ]:
            what = next(words for words, own in ours.items() if own.kind == case.kind)
            call = functools.partial(work, case, backend=self.backend or case.backend)
            cost = Cost(what, f"linattn {case.backend}", MICROSECONDS, None, case.required)
            found.append(self._cost(cost, case, call))
        for peer in peers(plain) if self._begins() else ():
            if peer is not FUSED:
                cost = Cost("attention, decay per head", peer.name, MICROSECONDS, None)
                found.append(self._cost(cost, plain, functools.partial(peer.prepare, plain)))
        return found

    def memory(self) -> list[Cost]:
        """The most bytes that a forward and backward pass holds beyond its inputs and gradients."""
        case = MEMORY_CASE if self.full else shorter(MEMORY_CASE)
        ours = Cost(case.name, OURS, BYTES, None, MEMORY_REQUIRED if self.full else None)
        found = [self._cost(ours, case, functools.partial(work, case, backend=self.backend or case.backend))]
        for peer in peers(case) if self._begins() else ():
            cost = Cost(case.name, peer.name, BYTES, None)
            found.append(self._cost(cost, case, functools.partial(peer.prepare, case)))
        return found

    def _cost(self, asked: Cost, case: GpuCase, prepare: Callable[[Inputs], Work]) -> Cost:
        try:
            call = prepare(make(case, device=self.device))
            if asked.unit == MICROSECONDS:
                return replace(asked, value=self.meter.host_microseconds(call))
            return replace(asked, value=max(0, self.meter.peak_bytes(call) - 3 * case.array))
        except failures() as error:
            return replace(asked, why=sentence(error))
        finally:
            self._free()

    def _free(self) -> None:
        """Give back what a case held, before the next one."""
        gc.collect()
        if self.device == "cuda":
            import torch

            with contextlib.suppress(*failures()):  # a device that failed is reported where it failed
                torch.cuda.empty_cache()
