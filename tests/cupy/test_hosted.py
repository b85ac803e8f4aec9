"""The CUDA kernels' logic without a GPU: every property of the suite, on kernels compiled for the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import linattn
from linattn import LRPE, State, testing
from linattn.errors import UnsupportedError
from tests.core.test_long_text import drift
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


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_of_many_features(dtype: Any, normalize: bool) -> None:
    """Of more than 512, constants of rotations lie apart; of more than 1024 they do not fit."""
    rng = np.random.default_rng(0)
    for d in (600, 1025):
        q, k = (rng.random((2, 3, d)).astype(dtype) for _ in range(2))
        v, reweight = rng.standard_normal((2, 3, 4)).astype(dtype), LRPE(rng.random((3, d)) * 6)
        options: dict[str, Any] = {"reweight": reweight, "log_decay": -rng.random(3).astype(dtype)}
        options |= {"feature_map": "relu", "normalize": normalize}
        names = "feature_map", "reweight", "normalize"
        states = [State.zeros(q, 2, 3, d, 4, **{name: options[name] for name in names}) for _ in range(2)]
        for state in states:
            state.kv[...] = np.random.default_rng(1).random(state.kv.shape)
        want = linattn.decode_step(q, k, v, states[0], **options, backend="numpy")
        if d > 1024:
            with pytest.raises(UnsupportedError, match="D = 1025"):
                linattn.decode_step(q, k, v, states[1], **options, backend=hosted())
            continue
        got = linattn.decode_step(q, k, v, states[1], **options, backend=hosted())
        room = 1e4 * float(np.finfo(dtype).eps)
        assert abs(got - want).max() <= room * abs(want).max()
        assert abs(states[1].kv - states[0].kv).max() <= room


def turned_for_long(decay: float) -> float:
    """`drift` of a state by 128 angles, some around a quarter of a turn, some around a half."""
    around = np.linspace(-1, 1, 32)
    theta = np.concatenate([np.pi / 2 + around / 100, 0.6 + around / 2, 2 + around, np.pi + around / 10])
    return drift("numpy", theta.astype(np.float32)[None], np.full(1, decay, np.float32), hosted())


@pytest.mark.parametrize("decay", [0.0, -1e-5])
def test_a_long_text(decay: float) -> None:
    """Roundings know nothing of each other; what leans one way grows with n, not its root.

    Not at angles by which a state comes back to nearly the same numbers: there storage in float32 leans.
    """
    assert turned_for_long(decay) <= 2
