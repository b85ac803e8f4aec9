"""Calls drawn by Hypothesis, and how far apart two correct float64 results may be."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from linattn import reference
from linattn.reference.features import feature

ROUNDOFF = np.finfo(np.float64).eps / 2
ALGORITHMS = {
    "attention": reference.attention,
    "recurrent": reference.recurrent,
    **{
        f"blocks of {size}": lambda q, k, v, size=size, **options: reference.blockwise(
            q, k, v, block=size, **options
        )
        for size in (1, 2, 3, 64)
    },
}
DECAYS = (0.0, 1e-3, 0.1, 1.0, 20.0, 60.0, np.inf)
ROWS = ("whole", "packed", "lengths")


@st.composite
def calls(draw, *, causal: bool = True, longest: int = 9, rates: tuple = DECAYS, rows: tuple = ROWS) -> tuple:
    """(q, k, v, options). Values are at least 1/8 from 0, where relu has its corner."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    kind = draw(st.sampled_from(rows), label="rows")
    packed = kind == "packed"
    batch = 1 if packed else draw(st.integers(0, 2), label="batch")
    heads, d, e = (draw(st.integers(1, 3), label=name) for name in ("heads", "d", "e"))
    n = draw(st.integers(0, longest), label="n")
    m = n if causal or packed else draw(st.integers(0, longest), label="m")
    normalize = draw(st.booleans(), label="normalize")
    options: dict[str, Any] = {"causal": causal, "normalize": normalize}
    options["scale"] = draw(st.sampled_from([1.0, 0.3] if normalize else [1.0, -0.3]), label="scale")
    options["eps"] = draw(st.sampled_from([1e-6, 0.7, 1e3]), label="eps")
    maps = ["relu", "elu+1"] if normalize else [None, "relu", "silu", "elu+1"]
    options["feature_map"] = draw(st.sampled_from(maps), label="feature map")
    if draw(st.booleans(), label="theta"):
        largest = np.pi / 2 / (2 * longest) if normalize else draw(st.sampled_from([0.1, 3.0]))
        options["theta"] = values(random, heads, d) * largest / 2
    decay = draw(st.sampled_from([None, "head", "token"] if causal else [None, "head"]), label="decay")
    if decay is not None:
        options["log_decay"] = -random.choice(rates, (heads,) if decay == "head" else (batch, n, heads))
    if draw(st.booleans(), label="key_mask"):
        options["key_mask"] = random.random((batch, m)) < 0.7
    sequences = batch
    if packed:
        borders = np.sort(random.integers(0, n + 1, draw(st.integers(0, 3), label="borders")))
        options["cu_seqlens"] = np.array([0, *borders, n])
        sequences = len(borders) + 1
    elif kind == "lengths":
        options["lengths"] = random.integers(0, n + 1, batch)
    if causal and draw(st.booleans(), label="initial state"):
        f = d if options.get("theta") is None else 2 * d
        z = abs(values(random, sequences, heads, f)) if normalize else None
        if z is not None and options.get("theta") is not None:
            z[..., d:] /= 16  # as in a real state, where all cosines are positive: S is small beside C
        options["initial_state"] = (values(random, sequences, heads, f, e), z)
    return (
        values(random, batch, n, heads, d),
        values(random, batch, m, heads, d),
        values(random, batch, m, heads, e),
        options,
    )


def values(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of either sign, between 1/8 and 2."""
    return random.choice([-1.0, 1.0], shape) * random.uniform(0.125, 2.0, shape)


def allowed(q, k, v, **options) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray | None]]:
    r"""How far two computed outputs and states may be apart, elementwise.

    An output is a sum of terms, so its error is at most (roundings of one term) * roundoff * (sum of absolute
    terms), where the cosine is replaced by 1. A term is rounded at most

    - 10 times at every advance of a state (exp, cos, sin, three products, a sum), so 10 (n + 1) times,
    - d + n + 4 times in the products and sums of the read-out,
    - n + 1 times for each unit of |log decay| and |angle| that an exponential or a cosine is taken of.

    Both results are rounded, hence the 2. Normalised, with z = max(den, eps):
    $|o' - o| = |num' - num - o (z' - z)| / z'$, and $|z' - z| \le |den' - den|$.
    """
    options = dict(options)
    name, theta = options.pop("feature_map", None), options.pop("theta", None)
    normalize, state = options.pop("normalize", False), options.pop("initial_state", None)
    eps, n, d = options.pop("eps", 1e-6), max(q.shape[1], k.shape[1]), q.shape[3]
    log_decay = options.get("log_decay")
    finite = 0.0 if log_decay is None else np.abs(log_decay[np.isfinite(log_decay)])
    rates = np.sum(finite) if np.ndim(log_decay) == 3 else n * np.max(finite, initial=0.0)
    angles = 0.0 if theta is None else n * np.max(np.abs(theta), initial=0.0)
    roundings = 10 * (n + 1) + d + n + 4 + (n + 1) * (rates + angles)

    with_ones = np.concatenate([abs(v), np.ones((*v.shape[:3], 1))], axis=3)
    if state is not None:
        kv, z = state
        z = np.ones(kv.shape[:3]) if z is None else z
        both = abs(np.concatenate([kv, z[..., None]], axis=3))
        options["initial_state"] = (both if theta is None else both[:, :, :d] + both[:, :, d:], None)
    options["scale"] = abs(options.get("scale", 1.0))
    o, last = reference.attention(abs(feature(q, name)), abs(feature(k, name)), with_ones, **options)
    factor, floor = 2 * ROUNDOFF * roundings, roundings * np.finfo(np.float64).tiny
    o = factor * o + floor
    num, den = o[..., :-1], o[..., -1:]
    if normalize:
        plain = {**options, "feature_map": name, "theta": theta, "initial_state": state, "eps": eps}
        plain["scale"] = options["scale"]
        exact, _ = reference.attention(q, k, v, **plain, normalize=True)
        weights = den_of(q, k, v, **plain)
        num = (num + abs(exact) * den) / np.maximum(weights - den, eps)
    if last is None:
        return num, (np.zeros(0), None)
    joined = factor * last[0] + floor
    if theta is not None:
        joined = np.concatenate([joined, joined], axis=2)
    return num, (joined[..., :-1], joined[..., -1] if normalize else None)


def den_of(q, k, v, **options) -> np.ndarray:
    """The sums of the weights, before any clamp: unnormalised attention to ones."""
    state = options.pop("initial_state")
    state = None if state is None else (state[1][..., None], None)
    return reference.attention(q, k, np.ones((*v.shape[:3], 1)), initial_state=state, **options)[0]


def assert_close(got, expected, bounds) -> None:
    """Every element of (o, (kv, z)) is as near as its own bound says."""
    (o, state), (o2, state2), (o_bound, state_bound) = got, expected, bounds
    assert_within(o, o2, o_bound)
    if state2 is None:
        assert state is None
        return
    for a, b, limit in zip(state, state2, state_bound, strict=True):
        if b is None:
            assert a is None
        else:
            assert_within(a, b, limit)


def assert_within(got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    assert got.shape == expected.shape == np.shape(bound)
    assert got.dtype == expected.dtype == np.float64
    wrong = ~(abs(got - expected) <= bound)
    assert not wrong.any(), (
        f"at {np.argwhere(wrong)[0]}: {got[wrong][0]} != {expected[wrong][0]}, allowed {bound[wrong][0]}"
    )
