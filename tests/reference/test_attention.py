"""The definition, the recurrence and the blocks agree, with each other and with the formulas spelled out."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linattn import reference
from linattn.reference.features import feature
from tests.reference.cases import ALGORITHMS, ROUNDOFF, allowed, assert_close, assert_within, calls, values

CAUSAL = [name for name in ALGORITHMS if name != "attention"]
MANY = settings(deadline=None, max_examples=150)


@MANY
@given(call=calls())
def test_recurrence_and_blocks_equal_the_definition(call):
    q, k, v, options = call
    expected, bounds = reference.attention(q, k, v, **options), allowed(q, k, v, **options)
    for name in CAUSAL:
        assert_close(ALGORITHMS[name](q, k, v, **options), expected, bounds)


def spelled_out(q, k, v, *, log_decay, theta, causal, eps=None) -> np.ndarray:
    """One head of the formulas in Python's own floats: q [n d], k [m d], v [m e], log_decay [n]."""
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        weights = []
        for j in range(i + 1 if causal else len(k)):
            between = range(min(i, j) + 1, max(i, j) + 1)
            decay = math.prod(math.exp(log_decay[t]) for t in between)
            score = math.fsum(
                a * b * math.cos(w * (i - j)) for a, b, w in zip(q[i], k[j], theta, strict=True)
            )
            weights.append(score * decay)
        for c in range(v.shape[1]):
            total = math.fsum(w * v[j, c] for j, w in enumerate(weights))
            out[i, c] = total if eps is None else total / max(math.fsum(weights), eps)
    return out


@MANY
@given(st.integers(0, 2**32 - 1), st.integers(0, 7), st.integers(0, 7), st.booleans(), st.booleans())
def test_the_definition_is_the_formula(seed, n, m, causal, normalize):
    random = np.random.default_rng(seed)
    m = n if causal else m
    q, k, v = values(random, 1, n, 1, 2), values(random, 1, m, 1, 2), values(random, 1, m, 1, 3)
    log_decay = -random.random((1, n, 1) if causal else (1,))
    options = {
        "log_decay": log_decay,
        "theta": values(random, 1, 2),
        "causal": causal,
        "normalize": normalize,
    }
    o, _ = reference.attention(q, k, v, **options)
    each = log_decay[0, :, 0] if causal else np.full(max(n, m), log_decay[0])
    eps = 1e-6 if normalize else None
    expected = spelled_out(
        q[0, :, 0], k[0, :, 0], v[0, :, 0], log_decay=each, theta=options["theta"][0], causal=causal, eps=eps
    )
    assert_within(o[0, :, 0], expected, allowed(q, k, v, **options)[0][0, :, 0])


@MANY
@given(
    call=calls(rows=("whole",)),
    cut=st.floats(0, 1),
    first=st.sampled_from(CAUSAL),
    second=st.sampled_from(CAUSAL),
)
def test_a_sequence_may_be_split_anywhere(call, cut, first, second):
    q, k, v, options = call
    whole, n = reference.attention(q, k, v, **options), round(cut * q.shape[1])

    def part(rows, state):
        own = {name: options[name][:, rows] for name in ("key_mask",) if name in options}
        if np.ndim(options.get("log_decay")) == 3:
            own["log_decay"] = options["log_decay"][:, rows]
        return (q[:, rows], k[:, rows], v[:, rows]), {**options, **own, "initial_state": state}

    arrays, own = part(slice(0, n), options.get("initial_state"))
    left, state = ALGORITHMS[first](*arrays, **own)
    arrays, own = part(slice(n, None), state)
    right, state = ALGORITHMS[second](*arrays, **own)
    assert_close((np.concatenate([left, right], axis=1), state), whole, allowed(q, k, v, **options))


def sequences(options, batch: int) -> list[tuple[int, int, int]]:
    """(batch row, start, stop) of every sequence of a packed or padded call."""
    if "cu_seqlens" in options:
        return [(0, start, stop) for start, stop in pairwise(options["cu_seqlens"])]
    return [(b, 0, options["lengths"][b]) for b in range(batch)]


@MANY
@given(call=calls(rows=("packed", "lengths")), name=st.sampled_from(sorted(ALGORITHMS)))
def test_packed_and_padded_sequences_are_as_if_alone(call, name):
    q, k, v, options = call
    compute, states = ALGORITHMS[name], options.get("initial_state")
    o, (kv, z) = compute(q, k, v, **options)
    outside = np.ones(o.shape, bool)
    per_token = {"key_mask", "log_decay"} if np.ndim(options.get("log_decay")) == 3 else {"key_mask"}
    common = {key: x for key, x in options.items() if key not in ("cu_seqlens", "lengths")}
    for s, (b, start, stop) in enumerate(sequences(options, len(q))):
        at = (slice(b, b + 1), slice(start, stop))
        own = {key: x[at] for key, x in common.items() if key in per_token}
        own["initial_state"] = states and tuple(None if x is None else x[s : s + 1] for x in states)
        alone = compute(q[at], k[at], v[at], **{**common, **own})
        np.testing.assert_array_equal(o[at], alone[0])
        np.testing.assert_array_equal(kv[s], alone[1][0][0])
        if z is not None:
            np.testing.assert_array_equal(z[s], alone[1][1][0])
        outside[at] = False
    assert not o[outside].any()


@MANY
@given(call=st.booleans().flatmap(lambda causal: calls(causal=causal)))
def test_a_masked_key_and_value_count_as_zero_after_the_feature_map(call):
    q, k, v, options = call
    name, mask = options.pop("feature_map"), options.pop("key_mask", np.zeros(k.shape[:2], bool))
    o, state = reference.attention(q, k, v, **options, feature_map=name, key_mask=mask)
    shown = mask[..., None, None]
    arrays = feature(q, name), np.where(shown, feature(k, name), 0.0), np.where(shown, v, 0.0)
    expected, expected_state = reference.attention(*arrays, **options)
    np.testing.assert_array_equal(o, expected)
    for x, y in zip(state or (), expected_state or (), strict=True):
        np.testing.assert_array_equal(x, y)


@MANY
@given(call=calls(rows=("whole",)))
def test_not_causal_is_both_directions_less_the_diagonal(call):
    q, k, v, options = call
    options |= {"causal": False, "normalize": False, "initial_state": None}
    if np.ndim(options.get("log_decay")) == 3:
        del options["log_decay"]
    o, state = reference.attention(q, k, v, **options)
    assert state is None
    forward, _ = reference.attention(q, k, v, **{**options, "causal": True})
    mask = options.get("key_mask")
    mirrored = {**options, "causal": True, "key_mask": None if mask is None else mask[:, ::-1]}
    backward, _ = reference.attention(q[:, ::-1], k[:, ::-1], v[:, ::-1], **mirrored)
    alone, _ = reference.attention(q, k, v, **{**options, "log_decay": np.full(q.shape[2], -np.inf)})
    bound, _ = allowed(q, k, v, **options)
    assert_within(o, forward + backward[:, ::-1] - alone, 3 * bound)


@MANY
@given(call=calls(causal=False))
def test_outputs_are_weights_times_values(call):
    q, k, v, options = call
    options["normalize"] = False
    w = reference.weights(q, k, **options)
    shown = options.get("key_mask", np.ones(k.shape[:2], bool))[..., None, None]
    expected, _ = reference.attention(q, k, v, **options)
    got = np.einsum("bhij,bjhe->bihe", w, np.where(shown, v, 0.0))
    assert_within(got, expected, allowed(q, k, v, **options)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_cosformer_is_plain_attention_over_turned_features(causal):
    random = np.random.default_rng(0)
    n, heads, d, e = 12, 2, 3, 5
    q, k, v = values(random, 2, n, heads, d), values(random, 2, n, heads, d), values(random, 2, n, heads, e)
    theta = np.full((heads, d), np.pi / (2 * n))
    options = {"feature_map": "relu", "theta": theta, "normalize": True, "causal": causal}
    o, state = reference.attention(q, k, v, **options)
    angle = (np.pi / (2 * n) * np.arange(n))[:, None, None]

    def turned(x):
        return np.concatenate(
            [feature(x, "relu") * np.cos(angle), feature(x, "relu") * np.sin(angle)], axis=3
        )

    expected, _ = reference.attention(turned(q), turned(k), v, normalize=True, causal=causal)
    assert_within(o, expected, allowed(q, k, v, **options)[0])
    assert (reference.weights(q, k, **options) >= 0).all()
    assert (o <= v.max(axis=1, keepdims=True) * (1 + n * ROUNDOFF)).all()  # an average of values
    assert (state is None) == (not causal)


def test_extremes():
    random = np.random.default_rng(0)
    q, k, v = values(random, 1, 4, 2, 3), values(random, 1, 4, 2, 3), values(random, 1, 4, 2, 2)
    own = np.einsum("bnhd,bnhd,bnhe->bnhe", q, k, v)
    for compute in ALGORITHMS.values():
        o, (kv, _) = compute(q, k, v, log_decay=np.full(2, -np.inf))
        assert_within(o, own, allowed(q, k, v, log_decay=np.full(2, -np.inf))[0])
        np.testing.assert_array_equal(kv, np.einsum("bhd,bhe->bhde", k[:, -1], v[:, -1]))
        np.testing.assert_array_equal(compute(q, k, v, log_decay=np.zeros(2))[0], compute(q, k, v)[0])
        o, (_, z) = compute(-abs(q), k, v, feature_map="relu", normalize=True)
        assert not o.any()
        assert z.shape == (1, 2, 3)
        o, (kv, z) = compute(q[:, :0], k[:, :0], v[:, :0], initial_state=(np.ones((1, 2, 3, 2)), None))
        assert o.shape == (1, 0, 2, 2)
        assert (kv == 1).all()
        assert z is None


def test_what_has_no_meaning_is_refused():
    x, state = np.ones((1, 3, 2, 2)), np.ones((1, 2, 2, 2))
    refused = {
        "same length": {"k": x[:, :2], "v": x[:, :2]},
        "feature_map": {"feature_map": "gelu"},
        "log_decay must be <= 0": {"log_decay": np.array([0.0, np.nan])},
        "without causal=True": {"causal": False, "initial_state": (state, None)},
        "must hold z": {"initial_state": (state, None), "normalize": True},
        "a state must be": {"initial_state": (state[:, :1], None)},
        "a batch of 1": {"cu_seqlens": np.array([0, 3]), "lengths": np.array([3])},
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=message):
            reference.attention(**{"q": x, "k": x, "v": x, **change})
    for compute in (reference.recurrent, reference.blockwise):
        with pytest.raises(ValueError, match="causal"):
            compute(x, x, x, causal=False)
    with pytest.raises(ValueError, match="at least 1"):
        reference.blockwise(x, x, x, block=0)
    with pytest.raises(TypeError, match="slopes"):
        reference.attention(x, x, x, slopes=np.ones(2))
