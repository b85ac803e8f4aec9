"""`batch_invariant=True`: a row gives the same bits alone and in any batch, and the usual values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, State
from linattn.testing import assert_same

OPTIONS: dict[str, dict[str, Any]] = {
    "decay": {"log_decay": linattn.decay.alibi(2)},
    "normalized": {"normalize": True, "feature_map": "elu+1"},
    "lrpe": {"reweight": LRPE(LRPE.default_theta(2, 4)), "feature_map": "silu"},
    "two-sided": {"log_decay": linattn.decay.alibi(2), "causal": False},
}


def host(x: Any) -> np.ndarray:
    return x.numpy() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_keeps_its_bits_in_any_batch(kind: str, name: str) -> None:
    rng = np.random.default_rng(0)
    x: list[Any] = [rng.standard_normal((7, 150, 2, 4)).astype(np.float32) for _ in range(4)]
    if kind == "torch":
        x = [torch.from_numpy(part) for part in x]
    *inputs, do = x
    out, vjp = linattn.attention_vjp(*inputs, batch_invariant=True, **OPTIONS[name])
    grads = vjp(do)
    for row in range(7):
        mine = slice(row, row + 1)
        alone, vjp_alone = linattn.attention_vjp(
            *(a[mine] for a in inputs), batch_invariant=True, **OPTIONS[name]
        )
        assert_same("o", "b n h e", host(alone), host(out[mine]))
        for key in "qkv":
            assert_same(key, "b n h d", host(vjp_alone(do[mine])[key]), host(grads[key][mine]))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("how", ["padded", "packed"])
def test_the_values_are_those_of_the_usual_plan(kind: str, decay: str, how: str) -> None:
    """Small integers and resets: both plans are exact, so they agree in every bit."""
    rng = np.random.default_rng(1)
    batch, n, rows = (3, 40, 3) if how == "padded" else (1, 40, 4)

    def exact(*shape: int) -> Any:
        x = rng.integers(-2, 3, shape).astype(np.float64)
        return torch.from_numpy(x) if kind == "torch" else x

    q, k, v, do = (exact(batch, n, 2, 3) for _ in range(4))
    resets = np.where(rng.random((2,) if decay == "head" else (batch, n, 2)) < 0.2, -np.inf, 0.0)
    place: Any = np.array([40, 0, 17]) if how == "padded" else np.array([0, 9, 9, 30, 40])
    table: Any = resets
    if kind == "torch":
        place, table = torch.from_numpy(place), torch.from_numpy(resets)
    start = State(exact(rows, 2, 3, 3), None, State.zeros(q, rows, 2, 3, 3).length)
    options: dict[str, Any] = {"lengths" if how == "padded" else "cu_seqlens": place, "log_decay": table}
    results = []
    for invariant in (False, True):
        (o, state), vjp = linattn.attention_vjp(
            q, k, v, return_state=True, initial_state=start, batch_invariant=invariant, **options
        )
        grads = vjp(do, State(state.kv, None, state.length))
        results.append([o, state.kv, state.length, grads["initial_state"].kv])
        results[-1] += [grads[name] for name in ("q", "k", "v", "log_decay")]
    for usual, invariant in zip(*results, strict=True):
        assert_same("result", "…", host(invariant), host(usual))
