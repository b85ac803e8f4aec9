"""What is not seen is selected away, forwards and backwards: 0 · NaN and inf · 0 must not appear."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import State
from linattn.testing import assert_finite, assert_same

KINDS = ["numpy", "torch"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def as_kind(kind: str, x: Any) -> Any:
    return torch.from_numpy(x) if kind == "torch" else x


def host(x: Any) -> np.ndarray:
    return x.numpy() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("kind", KINDS)
def test_a_finite_future_whose_products_overflow(kind: str) -> None:
    q = np.ones((1, 4, 1, 2), np.float32)
    k = q.copy()
    q[0, 0] = k[0, 3] = 1e20
    o = host(linattn.attention(as_kind(kind, q), as_kind(kind, k), as_kind(kind, np.ones_like(q))))
    assert_same("o", "e", o[0, 0, 0], np.full(2, 2e20, np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "feature_map": "elu+1"}, {"causal": False}])
def test_nan_in_padding_reaches_no_gradient(kind: str, options: dict[str, Any]) -> None:
    q, k, v = (draw(1, 20, 1, 3, seed=s) for s in range(3))
    clean = [x.copy() for x in (q, k, v)]
    for x in (q, k, v):
        x[0, 7:] = np.nan
    lengths = as_kind(kind, np.array([7]))
    grads = []
    for inputs in ((q, k, v), clean):
        o, vjp = linattn.attention_vjp(*(as_kind(kind, x) for x in inputs), lengths=lengths, **options)
        assert_finite("o", "b n h e", host(o))
        grads.append(vjp(as_kind(kind, np.ones((1, 20, 1, 3)))))
    for name in "qkv":
        assert_same(name, "b n h d", host(grads[0][name]), host(grads[1][name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_nan_in_one_packed_sequence_reaches_no_gradient_of_another(kind: str, causal: bool) -> None:
    x = [as_kind(kind, draw(1, 40, 1, 3, seed=s)) for s in range(3)]
    _, vjp = linattn.attention_vjp(*x, cu_seqlens=as_kind(kind, np.array([0, 20, 40])), causal=causal)
    do = np.ones((1, 40, 1, 3))
    do[0, 30] = np.nan
    grads = vjp(as_kind(kind, do))
    for name in "qkv":
        assert_finite(name, "n h d", host(grads[name])[0, :20])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_before_a_reset_reaches_no_gradient_after_it(kind: str, where: str) -> None:
    x = {name: draw(1, 20, 1, 3, seed=s) for s, name in enumerate("qkv")}
    x[where][0, 2] = np.nan
    decay = np.full((1, 20, 1), -0.1)
    decay[0, 5] = -np.inf
    o, vjp = linattn.attention_vjp(
        *(as_kind(kind, x[name]) for name in "qkv"), log_decay=as_kind(kind, decay)
    )
    assert_finite("o", "n h e", host(o)[0, 5:])
    do = np.zeros((1, 20, 1, 3))
    do[0, 5:] = 1.0
    grads = vjp(as_kind(kind, do))
    for name in ("q", "k", "v", "log_decay"):
        assert_finite(name, "n h …", host(grads[name])[0, 5:])
    assert host(grads["log_decay"])[0, 5, 0] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_state_reaches_no_gradient(kind: str) -> None:
    x = [as_kind(kind, draw(1, 20, 1, 3, seed=s)) for s in range(3)]
    start = State(as_kind(kind, np.full((1, 1, 3, 3), np.nan)), None, as_kind(kind, np.zeros(1, np.int64)))
    o, vjp = linattn.attention_vjp(*x, initial_state=start, log_decay=as_kind(kind, np.full(1, -np.inf)))
    grads = vjp(as_kind(kind, np.ones((1, 20, 1, 3))))
    for name, value in {"o": o, **{name: grads[name] for name in "qkv"}}.items():
        assert_finite(name, "b n h d", host(value))
    assert_same("log_decay", "h", host(grads["log_decay"]), np.zeros(1))
    assert_same("state", "s h f e", host(grads["initial_state"].kv), np.zeros((1, 1, 3, 3)))
