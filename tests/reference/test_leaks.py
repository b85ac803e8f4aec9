"""What is not seen is selected away: a NaN or an infinity there reaches nothing."""

from __future__ import annotations

import numpy as np
import pytest

from linattn import reference
from tests.reference.cases import ALGORITHMS, values

N, HEADS, D, E = 7, 2, 3, 2
SETTINGS = {
    "plain": {},
    "turned": {"theta": np.array([[0.1, 2.0, 0.0], [0.3, 0.2, 1.0]])},
    "normalised": {"normalize": True, "feature_map": "elu+1"},
    "decayed": {"log_decay": -np.ones(HEADS), "feature_map": "silu"},
}
pytestmark = [pytest.mark.filterwarnings("error")]


@pytest.fixture(params=[np.nan, np.inf, -np.inf])
def poison(request):
    return request.param


@pytest.fixture(params=SETTINGS)
def options(request):
    return dict(SETTINGS[request.param])


@pytest.fixture(params=ALGORITHMS)
def compute(request):
    return ALGORITHMS[request.param]


def arrays(batch: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [values(random, batch, N, HEADS, width) for width in (D, D, E)]


def spoiled(inputs: list[np.ndarray], where, poison: float) -> list[np.ndarray]:
    out = [x.copy() for x in inputs]
    for x in out:
        x[where] = poison
    return out


def equal(got, expected, where=...) -> None:
    """The same bits, and finite."""
    assert np.isfinite(expected[where]).all()
    np.testing.assert_array_equal(got[where], expected[where])


def test_the_future(compute, options, poison):
    clean = arrays()
    with np.errstate(invalid="ignore"):  # the spoiled tokens' own outputs are inf - inf
        o, _ = compute(*spoiled(clean, np.s_[:, 4:], poison), **options)
    equal(o, compute(*clean, **options)[0], np.s_[:, :4])


def test_before_a_reset(compute, options, poison):
    clean = arrays()
    options["log_decay"] = -np.ones((1, N, HEADS))
    options["log_decay"][:, 4] = -np.inf
    with np.errstate(invalid="ignore"):
        o, state = compute(*spoiled(clean, np.s_[:, :4], poison), **options)
    expected, expected_state = compute(*clean, **options)
    equal(o, expected, np.s_[:, 4:])
    equal(state[0], expected_state[0])


def test_a_forgotten_state(compute, options, poison):
    clean = arrays()
    options["log_decay"] = -np.ones((1, N, HEADS))
    options["log_decay"][:, 0] = -np.inf
    expected, expected_state = compute(*clean, **options)
    kv, z = (None if x is None else np.full_like(x, poison) for x in expected_state)
    o, state = compute(*clean, **options, initial_state=(kv, z))
    equal(o, expected)
    equal(state[0], expected_state[0])


def test_a_head_without_memory(compute, options, poison):
    clean = arrays()
    options["log_decay"] = np.full(HEADS, -np.inf)
    with np.errstate(invalid="ignore"):
        o, state = compute(*spoiled(clean, np.s_[:, 3], poison), **options)
    expected, expected_state = compute(*clean, **options)
    equal(o, expected, np.s_[:, [0, 1, 2, 4, 5, 6]])
    equal(state[0], expected_state[0])


def test_other_sequences_and_heads(compute, options, poison):
    clean, borders = arrays(), np.array([0, 2, 2, 5, N])
    with np.errstate(invalid="ignore"):
        o, state = compute(*spoiled(clean, np.s_[:, 2:5], poison), **options, cu_seqlens=borders)
    expected, expected_state = compute(*clean, **options, cu_seqlens=borders)
    equal(o, expected, np.s_[:, [0, 1, 5, 6]])
    equal(state[0], expected_state[0], np.s_[[0, 1, 3]])
    for where, others in ((np.s_[1], np.s_[[0, 2]]), (np.s_[:, :, 0], np.s_[:, :, 1])):
        clean = arrays(batch=3)
        with np.errstate(invalid="ignore"):
            o, _ = compute(*spoiled(clean, where, poison), **options)
        equal(o, compute(*clean, **options)[0], others)


def test_masked_keys_and_padding(compute, options, poison):
    clean, mask = arrays(), np.ones((1, N), bool)
    mask[:, [0, 3]] = False
    q, k, v = spoiled(clean, np.s_[:, [0, 3]], poison)
    o, state = compute(clean[0], k, v, **options, key_mask=mask)
    expected, expected_state = compute(*clean, **options, key_mask=mask)
    equal(o, expected)
    equal(state[0], expected_state[0])
    q, k, v = spoiled(clean, np.s_[:, 4:], poison)
    if "log_decay" in options:
        options["log_decay"] = -np.ones((1, N, HEADS))
        options["log_decay"][:, 4:] = np.nan
    o, state = compute(q, k, v, **options, lengths=np.array([4]))
    expected, expected_state = compute(*clean, **options, lengths=np.array([4]))
    equal(o, expected)
    equal(state[0], expected_state[0])


def test_not_causal(options, poison):
    clean, mask, borders = arrays(), np.ones((1, N), bool), np.array([0, 3, N])
    mask[:, [0, 3]] = False
    _, k, v = spoiled(clean, np.s_[:, [0, 3]], poison)
    options["causal"] = False
    o, _ = reference.attention(clean[0], k, v, **options, key_mask=mask)
    equal(o, reference.attention(*clean, **options, key_mask=mask)[0])
    with np.errstate(invalid="ignore"):
        o, _ = reference.attention(*spoiled(clean, np.s_[:, :3], poison), **options, cu_seqlens=borders)
    equal(o, reference.attention(*clean, **options, cu_seqlens=borders)[0], np.s_[:, 3:])
    options["log_decay"] = np.full(HEADS, -np.inf)
    with np.errstate(invalid="ignore"):
        o, _ = reference.attention(*spoiled(clean, np.s_[:, 3], poison), **options)
    equal(o, reference.attention(*clean, **options)[0], np.s_[:, [0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize("causal", [True, False])
def test_gradients(options, poison, causal):
    clean, mask, borders = arrays(), np.ones((1, N), bool), np.array([0, 3, N])
    mask[:, [1, 4]] = False
    options |= {"causal": causal, "cu_seqlens": borders, "key_mask": mask}
    do = np.cos(np.arange(N * HEADS * E)).reshape(1, N, HEADS, E)
    expected = reference.gradients(*clean, do, **options)
    q, k, v = spoiled(clean, np.s_[:, [1, 4]], poison)
    with np.errstate(invalid="ignore"):
        got = reference.gradients(clean[0], k, v, do, **options)
    for name in expected:
        equal(got[name], expected[name])
    q, k, v, spoiled_do = spoiled([*clean, do], np.s_[:, :3], poison)
    with np.errstate(invalid="ignore"):
        got = reference.gradients(q, k, v, spoiled_do, **options)
    for name in "qkv":
        equal(got[name], expected[name], np.s_[:, 3:])


def test_gradients_before_and_after_a_reset(options, poison):
    clean = arrays()
    options["log_decay"] = -np.ones((1, N, HEADS))
    options["log_decay"][:, 4] = -np.inf
    do = np.cos(np.arange(N * HEADS * E)).reshape(1, N, HEADS, E)
    expected = reference.gradients(*clean, do, **options)
    for spoil, kept in ((np.s_[:, :4], np.s_[:, 4:]), (np.s_[:, 4:], np.s_[:, :4])):
        with np.errstate(invalid="ignore"):
            got = reference.gradients(*spoiled([*clean, do], spoil, poison), **options)
        for name in ("q", "k", "v", "log_decay"):
            equal(got[name], expected[name], kept)
        assert not got["log_decay"][:, 4].any()
