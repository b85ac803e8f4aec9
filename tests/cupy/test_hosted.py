"""The CUDA kernels' logic without a GPU: every property of the suite, on kernels compiled for the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import linattn
from linattn import State, testing
from tests.cupy.hosted import COMPILER, hosted
from tests.triton.drawing import check, drawn, rows

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="g++ is not installed, by which the kernels run on a CPU"
)

EXAMPLES = 4
LENGTHS = (0, 1, 5, 31, 32, 33, 64, 70, 100)


class Hosted(testing.BackendSubject):
    """The backend on NumPy arrays, in the dtypes that a host compiler has."""

    def __init__(self) -> None:
        super().__init__(hosted(), "numpy", "cpu")
        self.reach = 1000

    def axes(self) -> dict[str, tuple[Any, ...]]:
        return {"dtype": ("float32", "float64")}

    def expression(self) -> tuple[str, str]:
        return "; from tests.cupy.test_hosted import Hosted", "Hosted()"


@pytest.mark.parametrize("name", sorted(testing.PROPERTIES))
def test_property(pytestconfig: pytest.Config, name: str) -> None:
    of = Hosted()
    chosen = rows(of, name, full=pytestconfig.getoption("all_rows", False))
    cases = (drawn(name, row, LENGTHS, i) for row in chosen for i in range(EXAMPLES))
    assert check(of, name, cases), f"{name} is never offered"


def forgotten() -> Any:
    """o of a call that begins with a state of NaN, and forgets it at its first token."""
    q = np.ones((1, 3, 2, 4))
    state = State.zeros(q, 1, 2, 4, 4)
    state.kv[...] = np.nan
    decay = np.full(2, -np.inf)
    return linattn.attention(q, q, q, log_decay=decay, initial_state=state, backend=hosted())


def test_a_decay_of_0_forgets_nan() -> None:
    assert np.isfinite(forgotten()).all()
