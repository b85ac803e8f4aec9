"""The CUDA kernels' logic without a GPU: every property of the suite, on kernels compiled for the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import linattn
from linattn import LRPE, State, testing, tolerance
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


def drift(decay: float) -> float:
    """How far 5000 tokens that add nothing take a state, in the rounding of float32 times sqrt(5000)."""
    n, few = 5000, 32
    around = np.linspace(-1, 1, few)
    theta = np.concatenate(
        [np.pi / 2 + around / 100, 0.6 + around / 2, 2 + around, np.pi + around / 10]
    ).astype(np.float32)
    nothing = np.zeros((1, 1, len(theta)), np.float32)
    reweight, g = LRPE(theta[None]), np.full(1, decay, np.float32)
    state = State.zeros(nothing, 1, 1, len(theta), 4, reweight=reweight)
    state.kv[...] = np.random.default_rng(0).standard_normal(state.kv.shape)
    cosine, sine = np.split(state.kv[0, 0].astype(np.float64), 2)
    for _ in range(n):
        linattn.decode_step(
            nothing, nothing, nothing[..., :4], state, log_decay=g, reweight=reweight, backend=hosted()
        )
    factor = np.exp((float(g[0]) + 1j * theta.astype(np.float64)) * n)
    want = (cosine + 1j * sine) * factor[:, None]
    got = state.kv[0, 0, : len(theta)] + 1j * state.kv[0, 0, len(theta) :]
    off = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    return float(off.max() / (math.sqrt(n) * tolerance.UNIT["float32"]))


@pytest.mark.parametrize("decay", [0.0, -1e-5])
def test_a_long_text(decay: float) -> None:
    """Roundings know nothing of each other, at any angle; what leans one way grows with n, not its root."""
    assert drift(decay) <= 2
