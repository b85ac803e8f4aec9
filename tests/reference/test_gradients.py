"""The closed forms equal central differences of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from linattn import reference
from tests.reference.cases import allowed, calls, values

STEP = (
    np.finfo(np.float64).eps ** 0.25
)  # a central difference is off by O(step^2), its rounding by O(eps / step)
RATES = (1e-3, 0.1, 1.0, 20.0, np.inf)  # a step up from 0 would leave the domain


def loss(do, dstate, call: dict[str, Any]) -> tuple[float, float]:
    """The number whose gradients are asked for, and how far off it may be."""
    (o, state), (o_bound, state_bound) = reference.attention(**call), allowed(**call)
    value, error = (do * o).sum(), (abs(do) * o_bound).sum()
    for weight, x, bound in zip(dstate or (), state or (), state_bound, strict=False):
        if x is not None:
            value, error = value + (weight * x).sum(), error + (abs(weight) * bound).sum()
    return value, error


def assert_is_the_gradient(got: np.ndarray, direction: np.ndarray, at) -> None:
    r"""Compare the slope along a direction with two central differences.

    Halving the step divides a central difference's error by 4, so the difference of the two is thrice the
    error of the finer one. A wrong gradient does not widen this bound.
    """
    slopes, errors = [], []
    for step in (STEP, STEP / 2):
        (above, error), (below, error2) = at(step * direction), at(-step * direction)
        slopes.append((above - below) / (2 * step))
        errors.append((error + error2) / (2 * step))
    along = (got * direction).sum()
    bound = abs(slopes[0] - slopes[1]) + sum(errors)
    assert abs(along - slopes[1]) <= bound, f"{along} along this direction, differences say {slopes}"


def check(random: np.random.Generator, call: dict[str, Any]) -> dict[str, Any]:
    """Compare every gradient of a call."""
    o, state = reference.attention(**call)
    do, dstate = random.normal(size=o.shape), None
    if state is not None:
        dstate = tuple(None if x is None else random.normal(size=x.shape) for x in state)
    got = reference.gradients(**call, do=do, dstate=dstate)
    state_in = call.get("initial_state")
    optional = {name for name in ("log_decay", "theta", "initial_state") if call.get(name) is not None}
    assert got.keys() == {"q", "k", "v"} | optional
    for name in got.keys() - {"initial_state"}:
        direction = random.uniform(-1, 1, call[name].shape)
        if name == "log_decay":
            direction[call[name] == -np.inf] = 0
            assert not got[name][call[name] == -np.inf].any()

        def moved(by, name=name):
            return loss(do, dstate, {**call, name: call[name] + by})

        assert got[name].shape == call[name].shape
        assert_is_the_gradient(got[name], direction, moved)
    for part, x in enumerate(state_in or ()):
        if x is None:
            assert got["initial_state"][part] is None
            continue

        def moved(by, part=part):
            changed = tuple(x + by if i == part else x for i, x in enumerate(state_in))
            return loss(do, dstate, {**call, "initial_state": changed})

        assert_is_the_gradient(got["initial_state"][part], random.uniform(-1, 1, x.shape), moved)
    return got


@settings(deadline=None, max_examples=200)
@given(st.data(), st.booleans(), st.integers(0, 2**32 - 1))
def test_gradients_are_the_slopes_of_the_definition(data, causal, seed):
    q, k, v, options = data.draw(calls(causal=causal, longest=6, rates=RATES), label="call")
    check(np.random.default_rng(seed), {"q": q, "k": k, "v": v, **options})


def test_padding_and_masked_keys_have_no_gradient():
    random = np.random.default_rng(0)
    x, state = values(random, 1, 6, 2, 3), values(random, 1, 2, 3, 3)
    options = {"lengths": np.array([4]), "key_mask": np.array([[True, False, True, True, True, True]])}
    call = {"q": x, "k": x[:, ::-1], "v": 1 / x, "log_decay": -abs(x[..., 0]), "initial_state": (state, None)}
    got = check(random, {**call, **options})
    assert all(not got[name][:, 4:].any() for name in ("q", "k", "v", "log_decay"))
    assert not got["k"][:, 1].any()
    assert not got["v"][:, 1].any()
    assert got["log_decay"][:, :4].all()


def test_corners():
    x = np.array([-1.0, 0.0, 2.0]).reshape(1, 3, 1, 1)
    got = reference.gradients(x, x, np.ones_like(x), np.ones_like(x), feature_map="relu")
    assert got["q"].ravel().tolist() == [0, 0, 2]  # relu'(0) = 0
    assert got["k"].ravel().tolist() == [0, 0, 2]
    one = np.ones((1, 1, 1, 1))
    got = reference.gradients(one, one, one, one, normalize=True, eps=2.0)
    assert [got[name].item() for name in "qkv"] == [0.5, 0.5, 0.5]  # the clamp acts: o = q k v / 2
    got = reference.gradients(one, one, one, one, normalize=True, eps=0.5)
    assert [got[name].item() for name in "qkv"] == [0, 0, 1]  # o = v
    empty = np.zeros((1, 0, 1, 1))
    state = (np.full((1, 1, 1, 1), 3.0), None)
    got = reference.gradients(empty, empty, empty, empty, state, initial_state=state)
    assert got["initial_state"][0].item() == 3  # no tokens: the state passes through
