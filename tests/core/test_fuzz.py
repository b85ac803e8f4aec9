"""Ten thousand random argument sets: each ends in a right answer or in one of the library's own errors."""

# ruff: noqa: E501 (the tables have one row for each case)
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, Cosine, State, errors, tolerance
from linattn.testing import assert_within

ROUNDS = 10_000


def good(rng: np.random.Generator) -> dict[str, Any]:
    """A valid call, in NumPy float64."""
    packed = rng.random() < 0.25
    b, h, d, e = (
        1 if packed else rng.integers(1, 3),
        rng.integers(1, 3),
        rng.integers(1, 4),
        rng.integers(1, 4),
    )
    n = int(rng.choice([0, 1, 3, 17]))
    causal = bool(rng.random() < 0.7)
    m = n if causal or packed or rng.random() < 0.5 else int(rng.integers(0, 9))
    call: dict[str, Any] = {
        "q": rng.standard_normal((b, n, h, d)),
        "k": rng.standard_normal((b, m, h, d)),
        "v": rng.standard_normal((b, m, h, e)),
        "causal": causal,
        "feature_map": rng.choice(np.array([None, "relu", "silu", "elu+1"], dtype=object)),
        "normalize": bool(rng.random() < 0.3),
    }
    if rng.random() < 0.5:
        shape = (h,) if not causal or rng.random() < 0.5 else (b, n, h)
        call["log_decay"] = -rng.choice([0.0, 0.1, 3.0, np.inf], size=shape)
    match rng.integers(3):
        case 1:
            call["reweight"] = Cosine(int(rng.integers(40, 90)))
        case 2:
            call["reweight"] = LRPE(rng.standard_normal((h, d)))
    if packed:
        inner = np.sort(rng.integers(0, n + 1, rng.integers(0, 3)))
        call["cu_seqlens"] = np.concatenate(([0], inner, [n])).astype(np.int64)
    elif n == m and rng.random() < 0.3:
        call["lengths"] = rng.integers(0, n + 1, b)
    if rng.random() < 0.3:
        call["key_mask"] = rng.random((b, m)) < 0.7
    if causal and rng.random() < 0.4:
        rows = len(call["cu_seqlens"]) - 1 if packed else b
        f = 2 * d if "reweight" in call else d
        z = rng.standard_normal((rows, h, f)) if call["normalize"] else None
        call["initial_state"] = State(rng.standard_normal((rows, h, f, e)), z, np.full(rows, 3))
    if causal and rng.random() < 0.3:
        call["return_state"] = True
    return call


JUNK: list[Any] = [
    None, 0, -1, 1.5, math.nan, math.inf, "", "relu", "auto", True, [], [1, 2], (), {}, b"x", object(), np.float32(1),
    np.ones(3), np.ones((2, 2)), np.zeros((1, 3, 1, 2)), np.array(5), np.array([], dtype=np.int64), np.ones((1, 3, 1, 2), np.int64),
    np.array([0, 3]), np.array([True]), np.full((1, 2), np.nan), np.ones((1, 1, 1, 1), np.complex128), Cosine(), Cosine(2),
    LRPE(np.ones((1, 1))), State(np.ones((1, 1, 1, 1)), None, np.zeros(1, np.int64)), State(None, None, None), torch.ones(1, 3, 1, 2),
    torch.ones(1, 3, 1, 2, dtype=torch.complex64), np.array(["a"]), np.array([None]), torch.ones(2, dtype=torch.bool), range(3), 10**30,
]  # fmt: skip
NAMES = [
    "q", "k", "v", "log_decay", "reweight", "feature_map", "normalize", "eps", "causal", "scale", "key_mask", "lengths",
    "cu_seqlens", "initial_state", "return_state", "slots", "precision", "check", "batch_invariant", "backend", "mystery",
]  # fmt: skip


def spoil(rng: np.random.Generator, call: dict[str, Any]) -> None:
    """Replace an argument by something else, or change one array's shape, dtype or values."""
    name = NAMES[rng.integers(len(NAMES))]
    x = call.get(name)
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fib" or x.ndim == 0 or rng.random() < 0.4:
        call[name] = JUNK[rng.integers(len(JUNK))]
        return
    match rng.integers(6):
        case 0:
            with np.errstate(invalid="ignore"):
                call[name] = x.astype(
                    rng.choice(np.array(["float32", "int64", "bool", "float16"], dtype=object))
                )
        case 1:
            call[name] = x[..., None]
        case 2:
            call[name] = x[:0]
        case 3:
            call[name] = np.concatenate((x, x), axis=int(rng.integers(x.ndim)))
        case 4:
            call[name] = x + 1 if x.dtype != bool else x
        case 5:
            call[name] = torch.from_numpy(np.ascontiguousarray(x))


def as_torch(call: dict[str, Any]) -> dict[str, Any]:
    def convert(x: Any) -> Any:
        if isinstance(x, np.ndarray) and x.dtype.kind in "fib":
            return torch.from_numpy(np.array(x))
        if isinstance(x, LRPE):
            return LRPE(convert(x.theta))
        if isinstance(x, State) and x.kv is not None:
            return State(convert(x.kv), convert(x.z), convert(x.length))
        return x

    return {name: convert(x) for name, x in call.items()}


def host(x: Any) -> Any:
    return x.numpy() if isinstance(x, torch.Tensor) else x


def assert_right(call: dict[str, Any], got: Any) -> None:
    """The answer to any accepted call is the definition's, within the bound."""
    got = got[0] if isinstance(got, tuple) else got
    call = {name: host(x) for name, x in call.items()}
    q, k, v = (call[name].astype(np.float64) for name in "qkv")
    dtype = call["q"].dtype.name
    keywords = {
        name: call[name]
        for name in ("log_decay", "feature_map", "normalize", "eps", "causal", "scale", "key_mask", "lengths", "cu_seqlens")
        if call.get(name) is not None
    }  # fmt: skip
    reweight = call.get("reweight")
    if isinstance(reweight, Cosine):
        length = reweight.max_len or max(q.shape[1], k.shape[1], 1)
        keywords["theta"] = np.full((q.shape[2], q.shape[3]), math.pi / (2 * length))
    elif isinstance(reweight, LRPE):
        keywords["theta"] = host(reweight.theta)
    if isinstance(state := call.get("initial_state"), State):
        keywords["initial_state"] = (host(state.kv), host(state.z))
    if call.get("slots") is not None:
        return  # the pool has been written: tests/core/test_state.py compares those
    with np.errstate(all="ignore"):
        want, _ = linattn.reference.attention(q, k, v, **keywords)
        allowed = tolerance.bound(q, k, v, rounding=tolerance.Rounding(dtype), **keywords).o
    got = host(got).astype(np.float64)
    clean = np.isfinite(want)
    assert_within("o", "b n h e", np.where(clean, got, 0.0), np.where(clean, want, 0.0), allowed, dtype)


@pytest.mark.parametrize("part", range(4))
def test_a_right_answer_or_an_own_error(part: int) -> None:
    rng = np.random.default_rng(part)
    ended: dict[str, int] = {}
    for _ in range(ROUNDS // 4):
        call = good(rng)
        if rng.random() < 0.5:
            call = as_torch(call)
        for _ in range(rng.integers(0, 3)):
            spoil(rng, call)
        given = dict(call)
        try:
            got = linattn.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
        except errors.LinattnError as error:
            sentence = str(error)
            assert len(sentence) > 15, sentence
            ended[type(error).__name__] = ended.get(type(error).__name__, 0) + 1
        else:
            assert_right(call, got)
            ended["right"] = ended.get("right", 0) + 1
    assert ended["right"] > ROUNDS // 16  # the draw must reach the arithmetic,
    assert len(ended) >= 7, ended  # and the refusals in their variety
