"""Decays of a layer: where they lie, and what is kept of them in float32 for kernels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from linattn.nn import GatedLinearAttention, gla


def test_decays_follow_their_module() -> None:
    mixer = GatedLinearAttention(16, 16, 2, log_decay=[-0.3, -1e-3])
    before = set(mixer.state_dict())
    for moved in (mixer, copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer)), mixer.to(torch.float16)):
        for dtype in (torch.float64, torch.float32):
            decays = moved.options(dtype)["log_decay"]
            assert torch.equal(decays.double().float(), torch.tensor([-0.3, -1e-3]))
        assert set(moved.state_dict()) == before


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, stream: int = 0, capturing: bool = False) -> None:
    monkeypatch.setattr(gla, "_on_gpu", lambda x: True)
    monkeypatch.setattr(gla, "_stream", lambda x: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_meets_the_same_decays_twice(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    on_a_gpu(monkeypatch)
    mixer = GatedLinearAttention(16, 16, 2, log_decay=[-0.3, -1e-3])
    x = torch.randn(1, 5, 16, requires_grad=True)
    checkpoint(mixer, x, use_reentrant=reentrant).sum().backward()  # the first call of all
    (first,) = torch.autograd.grad(mixer(x).sum(), x)
    assert torch.equal(first, x.grad)


def test_rounded_decays_are_kept_while_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    table = torch.tensor([-0.3, -1e-3], dtype=torch.float64)

    def check(mixer: Any, want: Any = table) -> Any:
        with torch.no_grad():
            first = mixer.options(torch.float16)["log_decay"]
        assert torch.equal(first, want if first.dtype == torch.float64 else want.float())
        kept = mixer.options(torch.float16)["log_decay"]
        assert kept.dtype == torch.float32 and torch.equal(kept, want.float()) and not kept.is_inference()
        assert mixer.options(torch.bfloat16)["log_decay"] is kept  # no kernel of its own
        assert torch.equal(mixer.options(torch.float64)["log_decay"], want)
        return first

    with torch.inference_mode():
        mixer = GatedLinearAttention(16, 16, 2, log_decay=table.numpy())
        assert check(mixer).dtype == torch.float64
    mixer = GatedLinearAttention(16, 16, 2, log_decay=table.numpy())
    before = set(mixer.state_dict())
    assert check(mixer).dtype == torch.float64  # the call that rounds
    mixer.load_state_dict(mixer.state_dict())
    for moved in (mixer, copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer)), mixer.to(torch.float16)):
        check(moved)
        assert set(moved.state_dict()) == before
    check(mixer.to("meta").to_empty(device="cpu"))
    mixer.log_decay.mul_(2)
    check(mixer, 2 * table)
    for factor in (1, 3):
        mixer.log_decay_bits = (factor * table).view(torch.int64)
        check(mixer, factor * table)
    mixer.log_decay_bits.data = (5 * table).view(torch.int64)  # of which torch keeps no count
    check(mixer, 5 * table)
    assert GatedLinearAttention(16, 16, 2).options(torch.float16)["log_decay"] is None


@torch.no_grad()
def test_no_stream_reads_decays_that_another_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = GatedLinearAttention(16, 16, 2, log_decay=[-0.3, -1e-3])

    def got() -> torch.Tensor:
        return mixer.options(torch.float16)["log_decay"]

    on_a_gpu(monkeypatch, 1, capturing=True)
    assert got().dtype == torch.float64 and got().dtype == torch.float64  # nothing is kept by a graph
    on_a_gpu(monkeypatch, 1)
    assert got().dtype == torch.float64
    first = got()
    on_a_gpu(monkeypatch, 2)
    assert got().dtype == torch.float64
    assert got() is not first and torch.equal(got(), first)
    on_a_gpu(monkeypatch, 3, capturing=True)
    assert got() is first
    mixer.log_decay.mul_(2)
    assert got().dtype == torch.float64
    on_a_gpu(monkeypatch, 1)
    assert torch.equal(got().float(), 2 * first) and torch.equal(got(), 2 * first)
