"""Device paths, where no value may be looked at: the same tensors give the same results without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, State, slots
from linattn.backends.blockwise import causal, gradients, tiles
from linattn.testing import assert_same


def exact(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small integers: sums are exact, so the two paths must agree in every bit."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float64))


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any]:
    """The result with values read on the host, and as if they lay on a device."""
    host = run()
    with monkeypatch.context() as patch:
        for module in (tiles, causal, gradients):
            patch.setattr(module, "device_name", lambda x: "cuda:0")
        patch.setattr(slots, "readable", lambda x: False)
        return host, run()


@pytest.mark.parametrize("cu", [[0, 0], [0], [0, 7, 7, 40, 41, 150], [0, 64, 128], [0, 0, 1, 1]])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_tables_without_a_look(monkeypatch: pytest.MonkeyPatch, cu: list[int], causal: bool) -> None:
    n, rows = cu[-1], len(cu) - 1
    q, k, v = exact(1, n, 2, 3), exact(1, n, 2, 3, seed=1), exact(1, n, 2, 4, seed=2)
    start = State(exact(rows, 2, 3, 4), None, torch.zeros(rows, dtype=torch.int64))
    memory: dict[str, Any] = {"initial_state": start, "return_state": True} if causal else {}

    def run() -> list[np.ndarray]:
        out, vjp = linattn.attention_vjp(q, k, v, cu_seqlens=torch.tensor(cu), causal=causal, **memory)
        o, state = out if causal else (out, None)
        grads = vjp(torch.ones_like(o), None if state is None else State(state.kv, None, state.length))
        parts = [o, grads["q"], grads["k"], grads["v"]]
        if state is not None:
            parts += [state.kv, state.length, grads["initial_state"].kv]
        return [part.numpy() for part in parts]

    for want, got in zip(*both(monkeypatch, run), strict=True):
        assert_same("packed", "…", got, want)


def test_slots_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = exact(3, 9, 2, 3), exact(3, 9, 2, 3, seed=1), exact(3, 9, 2, 4, seed=2)
    place = torch.tensor([4, -1, 0])

    def run() -> list[np.ndarray]:
        pool = State(exact(5, 2, 3, 4), None, torch.arange(5))
        o = linattn.attention(q, k, v, initial_state=pool, slots=place)
        step = linattn.decode_step(q[:, 0], k[:, 0], v[:, 0], pool, slots=place)
        return [o.numpy(), step.numpy(), pool.kv.numpy(), pool.length.numpy()]

    for want, got in zip(*both(monkeypatch, run), strict=True):
        assert_same("slots", "…", got, want)


def test_nan_is_selected_away_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = exact(1, 50, 1, 3), exact(1, 50, 1, 3, seed=1), exact(1, 50, 1, 2, seed=2)
    v[0, :20] = torch.nan
    decay = torch.zeros(1, 50, 1, dtype=torch.float64)
    decay[0, 20] = -torch.inf

    def run() -> np.ndarray:
        return linattn.attention(q, k, v, log_decay=decay, reweight=LRPE(torch.zeros(1, 3))).numpy()

    host, device = both(monkeypatch, run)
    assert_same("o", "b n h e", device, host)
    assert np.isfinite(device[0, 20:]).all()
    assert np.isnan(device[0, :20]).all()


@pytest.mark.parametrize("causal", [False, True])
def test_a_default_device_moves_nothing(causal: bool) -> None:
    q = exact(1, 9, 1, 3).requires_grad_()
    cu = torch.tensor([0, 4, 4, 9])

    def run() -> list[Any]:
        out = linattn.attention(q, q, q, cu_seqlens=cu, causal=causal, return_state=causal)
        o, kv = (out[0], [out[1].kv]) if causal else (out, [])
        return [o, *kv, *torch.autograd.grad(o, q, torch.ones_like(o))]

    want = run()
    with torch.device("meta"):
        got = run()
    for mine, right in zip(got, want, strict=True):
        assert torch.equal(mine, right)
