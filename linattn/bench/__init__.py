"""Speed and memory, measured: every figure in a process of its own, beside the computation it replaces.

`cases` says what is compared and what is required of it, `runner` measures, `report` shows the result;
`linattn bench` is the command. docs/benchmarks.md has the figures of one machine.
"""

from linattn.bench.cases import CASES, Case, Comparison, Figure, Limit, cases
from linattn.bench.measure import Measurement
from linattn.bench.results import Results, Row
from linattn.bench.runner import run

__all__ = [
    "CASES",
    "Case",
    "Comparison",
    "Figure",
    "Limit",
    "Measurement",
    "Results",
    "Row",
    "cases",
    "run",
]
