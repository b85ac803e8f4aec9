"""Measurements beside each other: ratios, what was required, and whether it is met; as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from linattn.bench.cases import Case, Comparison, Figure, Quantity, ndes
from linattn.bench.measure import Measurement


@dataclass(frozen=True)
class Row:
    """One comparison with its numbers; None where there is no figure, no requirement or no judgement."""

    case: str
    comparison: Comparison
    ours: float | None
    peer: float | None
    ratio: float | None
    met: bool | None


@dataclass(frozen=True)
class Results:
    """What one run of the benchmark found. full: the lengths are those that the requirements are about."""

    cases: tuple[Case, ...]
    measured: dict[Figure, Measurement]
    runs: int
    full: bool
    facts: dict[str, str]

    def rows(self) -> list[Row]:
        """Every comparison of every case; judged only at full length."""
        return [self._row(case.name, c) for case in self.cases for c in case.comparisons]

    def _row(self, case: str, comparison: Comparison) -> Row:
        ours, peer = self._value(comparison.quantity, comparison.ours), self._peer(comparison)
        over, under = (peer, ours) if comparison.speedup else (ours, peer)
        ratio = over / under if over is not None and under else None
        judged = self.full and comparison.limit is not None and ratio is not None
        met = comparison.limit.met_by(ratio) if judged and comparison.limit and ratio is not None else None
        return Row(case, comparison, ours, peer, ratio, met)

    def _peer(self, comparison: Comparison) -> float | None:
        if comparison.peer is None:
            return float(ndes(comparison.ours))
        return self._value(comparison.quantity, comparison.peer)

    def _value(self, quantity: Quantity, figure: Figure) -> float | None:
        found = self.measured[figure]
        value = found.best if quantity.startswith("time") else found.extra_bytes
        if value is None:
            return None
        return value / figure.n if quantity.endswith("per token") else float(value)

    def unmet(self) -> list[Row]:
        """Comparisons that miss what is required of them."""
        return [row for row in self.rows() if row.met is False]

    def as_json(self) -> dict[str, Any]:
        """One JSON object: seconds and bytes, as measured."""
        return {
            "facts": self.facts,
            "runs": self.runs,
            "full": self.full,
            "figures": [
                {**asdict(figure), **asdict(found), "best_seconds": found.best}
                for figure, found in self.measured.items()
            ],
            "comparisons": [
                {
                    "case": row.case,
                    "quantity": row.comparison.quantity,
                    "ours": {**asdict(row.comparison.ours), "value": row.ours},
                    "peer": {
                        **(asdict(row.comparison.peer) if row.comparison.peer else {"array": "N·H·D·E"}),
                        "value": row.peer,
                    },
                    "ratio": row.ratio,
                    "speedup": row.comparison.speedup,
                    "required": asdict(row.comparison.limit) if row.comparison.limit else None,
                    "met": row.met,
                }
                for row in self.rows()
            ],
        }
