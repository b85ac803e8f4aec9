"""A state over thousands of decode steps: roundings know nothing of each other, so they grow with a root."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, State, tolerance
from linattn.backends.blockwise import step

KINDS = ["numpy", "torch"]
N = 5000
DECAYS = np.array([0.0, -1e-5, -1.37e-5, -3.7e-4, -5e-4], np.float32)
"""Smaller ones move a number by about its last bit a token: storage in float32 decides where it goes then."""


def drift(kind: str, theta: Any = None, decays: Any = DECAYS, backend: Any = None) -> float:
    """How far N tokens that add nothing take a state, in the rounding of float32 times sqrt(N).

    theta: angles [H D], float32. backend: if not the one of this kind of arrays.
    """
    heads, d, e = len(decays), 16 if theta is None else theta.shape[1], 4
    nothing: Any = np.zeros((1, heads, d), np.float32)
    given, reweight = decays, None if theta is None else LRPE(theta)
    if kind == "torch":
        nothing, given = torch.from_numpy(nothing), torch.from_numpy(decays)
        reweight = None if theta is None else LRPE(torch.from_numpy(theta))
    state = State.zeros(nothing, 1, heads, d, e, reweight=reweight)
    begun = np.random.default_rng(0).standard_normal(state.kv.shape).astype(np.float32)
    state.kv[...] = begun if kind == "numpy" else torch.from_numpy(begun)
    for _ in range(N):
        linattn.decode_step(
            nothing, nothing, nothing[..., :e], state, log_decay=given, reweight=reweight,
            backend=backend or kind,
        )  # fmt: skip
    parts = np.split(np.asarray(state.kv, np.float64)[0], 1 if theta is None else 2, 1)
    first = np.split(begun[0].astype(np.float64), len(parts), 1)
    turn = 0.0 if theta is None else 1j * theta.astype(np.float64)[..., None]
    want = (first[0] + 1j * first[-1] * len(parts[1:])) * np.exp(
        (decays.astype(np.float64)[:, None, None] + turn) * N
    )
    off = np.linalg.norm(parts[0] + 1j * parts[-1] * len(parts[1:]) - want, axis=-1)
    unit = math.sqrt(N) * tolerance.UNIT["float32"]
    return float((off / np.linalg.norm(want, axis=-1)).max() / unit)


@pytest.mark.parametrize("kind", KINDS)
def test_decays(kind: str) -> None:
    assert drift(kind) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_angles(kind: str) -> None:
    assert drift(kind, np.linspace(0.1, 3, 16 * len(DECAYS), dtype=np.float32).reshape(-1, 16)) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_in_float32_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(xp: Any, state: Any, log_decay: Any) -> Any:
        return state * xp.exp(log_decay)[..., None, None]

    monkeypatch.setattr(step, "decayed", rounded)
    assert drift(kind) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_or_is_forgotten(kind: str) -> None:
    q: Any = np.ones((1, 4, 1), np.float32)
    decays: Any = np.array([0.0, -0.3, -1.0, -np.inf], np.float32)
    if kind == "torch":
        q, decays = torch.from_numpy(q), torch.from_numpy(decays)
    for bad in (math.inf, -math.inf, math.nan):
        state = State.zeros(q, 1, 4, 1, 1)
        state.kv[...] = bad
        linattn.decode_step(q, q, q, state, log_decay=decays, backend=kind)
        found = np.asarray(state.kv).ravel()
        assert np.array_equal(found, np.array([bad, bad, bad, 1], np.float32), equal_nan=True), found
