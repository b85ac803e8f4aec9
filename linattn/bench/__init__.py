"""Speed and memory, measured, beside the computations that linear attention replaces.

`cases` says what is compared on a processor and what is required of it, `runner` measures every figure in a
process of its own, `report` shows the result. The `gpu_` modules are the same for a CUDA device, in one
process and beside other libraries' kernels. `linattn bench` is the command; docs/benchmarks.md has the
figures of one machine.
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
