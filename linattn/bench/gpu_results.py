"""What a run on a GPU found: every case beside its floor, its peers and what is required; as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from linattn.bench.gpu_cases import GpuCase

MOST_ERROR = 1e-2
"""‖o − exact‖ / ‖exact‖ beyond which a result is wrong: bfloat16 operands cost 1e-3 to 1e-2."""

MICROSECONDS, BYTES = "µs on the host", "bytes beyond inputs and gradients"


@dataclass(frozen=True)
class Timing:
    """A call that was measured.

    error: against float64, None where it is another function. first: seconds of the first call, compilation
    and tuning in it. replayed: milliseconds in a CUDA graph of them, of decode steps only. extra: the most
    bytes that a call holds beyond its inputs, results and gradients in it; None where it was not recorded.
    """

    ms: float
    error: float | None = None
    first: float | None = None
    replayed: float | None = None
    extra: int | None = None

    @property
    def right(self) -> bool:
        return self.error is None or self.error <= MOST_ERROR


@dataclass(frozen=True)
class Entry:
    """Whose measurement, or the sentence that says why there is none. same: ours is the same function."""

    name: str
    timing: Timing | None = None
    why: str | None = None
    same: bool = True


@dataclass(frozen=True)
class GpuRow:
    """One case: the floor in milliseconds, ours, the others."""

    case: GpuCase
    floor: float
    ours: Entry
    peers: tuple[Entry, ...] = ()

    @property
    def fraction(self) -> float | None:
        """The floor's share of our time."""
        return None if self.ours.timing is None else self.floor / self.ours.timing.ms

    @property
    def best(self) -> Entry | None:
        """The fastest peer that computes the same function."""
        timed = [
            (peer.timing.ms, index) for index, peer in enumerate(self.peers) if peer.timing and peer.same
        ]
        return self.peers[min(timed)[1]] if timed else None

    @property
    def other(self) -> Entry | None:
        """Attention of another kind, for the cost of a layer."""
        return next((peer for peer in self.peers if not peer.same), None)

    @property
    def required(self) -> float | None:
        """Milliseconds, or None where nothing is asked for."""
        return self.case.required if self.case.share is None else self.floor / self.case.share

    @property
    def met(self) -> bool | None:
        """Whether the requirement is met, by a right result; None where nothing is required."""
        if self.required is None:
            return None
        timing = self.ours.timing
        if timing is None or not timing.right:
            return False
        ms = timing.replayed if self.case.replayed else timing.ms
        return ms is not None and ms <= self.required


@dataclass(frozen=True)
class Cost:
    """One number that is no device time: microseconds on the host, or bytes of memory at the most."""

    what: str
    who: str
    unit: str
    value: float | None
    required: float | None = None
    why: str | None = None

    @property
    def met(self) -> bool | None:
        if self.required is None:
            return None
        return self.value is not None and self.value <= self.required


@dataclass(frozen=True)
class GpuResults:
    """What one run found. full: the shapes are those that the requirements are about."""

    facts: dict[str, str]
    bandwidth: float  # GB/s
    full: bool
    rows: tuple[GpuRow, ...]
    costs: tuple[Cost, ...] = ()
    curves: tuple[GpuRow, ...] = ()

    def judged(self) -> list[tuple[str, bool]]:
        """Every requirement by name, and whether it is met."""
        found = [(row.case.name, row.met) for row in self.rows]
        found += [(f"{cost.what}, {cost.unit}", cost.met) for cost in self.costs]
        return [(name, met) for name, met in found if met is not None]

    def as_json(self) -> dict[str, Any]:
        """One JSON object: milliseconds, microseconds, bytes, as measured."""
        return {
            "facts": self.facts,
            "copy_gigabytes_per_second": self.bandwidth,
            "full": self.full,
            "rows": [_row(row) for row in self.rows],
            "costs": [{**asdict(cost), "met": cost.met} for cost in self.costs],
            "curves": [_row(row) for row in self.curves],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> GpuResults:
        """What `as_json` was made of; None for what an older version did not record.

        Raises KeyError or TypeError for another object.
        """
        rows, curves = (tuple(map(_read_row, found[name])) for name in ("rows", "curves"))
        costs = tuple(_read(Cost, cost) for cost in found["costs"])
        return cls(found["facts"], found["copy_gigabytes_per_second"], found["full"], rows, costs, curves)


def _row(row: GpuRow) -> dict[str, Any]:
    return {
        "name": row.case.name,
        **asdict(row.case),
        "bytes": row.case.bytes,
        "floor_ms": row.floor,
        "ours": asdict(row.ours),
        "fraction_of_floor": row.fraction,
        "peers": [asdict(peer) for peer in row.peers],
        "best_peer": row.best.name if row.best else None,
        "met": row.met,
    }


Stored = TypeVar("Stored")


def _read(kind: type[Stored], found: Mapping[str, Any]) -> Stored:
    """A dataclass by its fields, without what `as_json` says besides."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in found.items() if name in known})


def _read_entry(found: Mapping[str, Any]) -> Entry:
    timing = found["timing"]
    return _read(Entry, {**found, "timing": None if timing is None else _read(Timing, timing)})


def _read_row(found: Mapping[str, Any]) -> GpuRow:
    ours, *others = map(_read_entry, (found["ours"], *found["peers"]))
    return GpuRow(_read(GpuCase, found), found["floor_ms"], ours, tuple(others))
