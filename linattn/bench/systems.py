"""Whole models: what a row of figures is, how rows are measured, and what is required of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from linattn.bench.gpu_measure import failures, sentence

TOKENS = 32768  # of a training step
OURS, LLAMA = "TransNormerLLM-385M", "Llama-374M, SDPA"
PATCHED = "MiniMax, patched"
CONTEXTS = 1024, 131072
OF_TOKENS = "decoding", "generating"  # rows whose time is that of a token of each text
OVERHEAD = 1.3  # how much longer a token may take than moving bytes


@dataclass(frozen=True)
class Row:
    """seconds: of a training step, of a decoded or generated token (of all rows of a batch), or of a call.

    n: tokens of a text, or in front of a decoded token. seconds are None, and failed says why, where nothing
    could be measured. peak: bytes held at most, on CUDA. weights: bytes of those that a decoded token reads;
    bytes: all that it has to move, the weights once and the states read and written. note: what was special
    about the measurement. claim: which of a paper's claims the row is for.
    """

    what: str
    who: str
    batch: int
    n: int
    seconds: float | None = None
    peak: int | None = None
    weights: int = 0
    bytes: int = 0
    note: str = ""
    claim: str = ""
    failed: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens per second."""
        if not self.seconds:  # a difference may be 0
            return None
        return self.batch * (1 if self.what in OF_TOKENS else self.n) / self.seconds

    @property
    def remark(self) -> str:
        """What a table says beside the figures."""
        return "; ".join(part for part in (self.failed, self.note, self.claim) if part)


@dataclass(frozen=True)
class Task:
    """A row before it is measured, and what measures it: its result is the row's other fields."""

    row: Row
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """A requirement and what was measured, as words. met: None where there is nothing to compare with."""

    required: str
    found: str
    met: bool | None


def measure(
    tasks: Iterable[Task], device: torch.device, started: Callable[[Row], object] = lambda row: None
) -> Iterator[Row]:
    """Yield rows as they are measured; one that fails says so, and the others go on.

    started: told of every row before it is measured.
    """
    for task in tasks:
        started(task.row)
        clear(device)
        try:
            found = task.run()
        except failures() as error:
            short = isinstance(error, torch.OutOfMemoryError)
            found = {"failed": "out of memory" if short else sentence(error)}
        yield replace(task.row, **found)


def clear(device: torch.device) -> None:
    """Give back what nobody holds any more, and begin to watch the most that is held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> int | None:
    """The most bytes that were held since `clear`; None where that is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def timed(run: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The median of several runs, in seconds, after two that are not timed."""
    found = []
    for turn in range(times + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if turn >= 2:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Judge:
    """Compares rows that were measured with what is required, where they are there."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.at = {(row.what, row.who, row.batch, row.n): row for row in rows}
        self.found: list[Verdict] = []

    def __call__(
        self,
        required: str,
        ours: list[Row | None],
        value: Callable[..., float | None],
        unit: str,
        *,
        peers: tuple[Row | None, ...] = (),
        least: float = 0,
        most: float = math.inf,
    ) -> None:
        """Judge value(*ours, *peers); None, or a row that is not there: nothing is said.

        A row of ours that failed misses what is required; with a peer's there is nothing to compare.
        """
        rows = [row for row in (*ours, *peers) if row is not None]
        if len(rows) < len(ours) + len(peers):
            return
        for row in rows:
            if row.failed:
                met = None if row in peers else False
                self.found.append(Verdict(required, f"{row.who}: {row.failed}", met))
                return
        number = value(*rows)
        if number is None:
            return
        notes = "".join(f" ({row.who}: {row.note})" for row in rows if row.note)
        self.found.append(Verdict(required, f"{number:.3g}{unit}{notes}", least <= number <= most))


def faster(ours: Row, other: Row) -> float:
    """How many times as many tokens per second."""
    assert ours.rate is not None and other.rate is not None
    return ours.rate / other.rate


def memory(ours: Row, other: Row) -> float | None:
    """Which part of the other's memory; None where it was not counted."""
    return ours.peak / other.peak if ours.peak and other.peak else None


def verdicts(rows: list[Row], bandwidth: float = 0.0) -> list[Verdict]:
    """What is required of models on an H200, where their rows are there.

    bandwidth: bytes per second that a copy reads and writes, 0 where it is not known.
    """
    judge = Judge(rows)
    base, long, longest = (
        judge.at.get(("training", OURS, TOKENS // n or 1, n)) for n in (8192, 32768, 131072)
    )
    for n, ours, times in ((8192, base, 1.5), (32768, long, 3.0)):
        peer = (judge.at.get(("training", LLAMA, TOKENS // n, n)),)
        required = f"N = {n}: {times:g} times Llama's tokens per second"
        judge(required, [ours], faster, " times", peers=peer, least=times)
        if n == 8192:
            judge(f"N = {n}: less memory than Llama", [ours], memory, " of it", peers=peer, most=1)
    judge("N = 131072: 95 % of the rate at 8192", [longest, base], _percent, " %", least=95)

    near, far = (judge.at.get(("decoding", OURS, 1, n)) for n in CONTEXTS)
    required = "a token after 131072 takes as long as after 1024, within 2 %"
    judge(required, [near, far], _percent, " %", most=102)
    for row in (near, judge.at.get(("decoding", OURS, 64, CONTEXTS[0]))) if bandwidth else ():
        batch = row.batch if row else 0
        for size, words in (
            ("weights", "reading the weights"),
            ("bytes", "moving what has to move: the weights, the states in and out"),
        ):
            judge(
                f"batch {batch}: a token in {OVERHEAD} times {words}",
                [row],
                lambda one, size=size: _over(one, getattr(one, size), bandwidth),
                " times",
                most=OVERHEAD,
            )
    layer = judge.at.get(("layer", PATCHED, 1, 65536))
    judge("MiniMax's layer, N = 65536: 22 ms", [layer], lambda one: 1e3 * one.seconds, " ms", most=22)
    return judge.found


def _percent(ours: Row, other: Row) -> float:
    return 100 * faster(ours, other)


def _over(row: Row, size: int, bandwidth: float) -> float | None:
    """How many times longer a row takes than moving so many bytes."""
    assert row.seconds is not None
    return row.seconds * bandwidth / size if size else None


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as JSON can hold them, with their rates."""
    return [asdict(row) | {"tokens_per_second": row.rate} for row in rows]
