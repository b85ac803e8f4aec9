"""Denominators that a backend keeps from forward to backward, on every way between the two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import linattn
from linattn import registry
from linattn.backends import Saved
from linattn.backends.torch import TorchBackend

Tensor = torch.Tensor
COSFORMER = {"feature_map": "relu", "reweight": linattn.Cosine(64), "normalize": True}


class Keeper(TorchBackend):
    """The built-in backend for torch; its backward pass goes on with what its forward pass kept."""

    name = "keeper"
    arrays = {"torch": False}  # noqa: RUF012 (a constant)

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def forward_keeping(self, problem: Any, saved: Saved) -> Any:
        assert problem.normalize
        x = saved
        arrays = (x.log_decay, x.theta, x.key_mask, x.lengths, x.cu_seqlens, x.state)
        o, state = super().forward(problem, x.q, x.k, x.v, *arrays)
        plain = replace(problem, normalize=False, e=1, return_state=False)
        ones = torch.ones_like(x.v[..., :1])
        self.kept.append(super().forward(plain, x.q, x.k, ones, *arrays)[0][..., 0])
        return o, state, self.kept[-1]

    def backward(self, problem: Any, saved: Saved, do: Tensor, dstate: Any) -> Any:
        if self.kept:
            assert saved.kept is not None and torch.equal(saved.kept, self.kept[-1])
        else:
            assert saved.kept is None
        return super().backward(problem, saved, do, dstate)


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Keeper:
    found = Keeper()
    monkeypatch.setitem(registry.known(), found.name, found)
    return found


@pytest.fixture
def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 20, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def gradients(call: Any, x: list[Tensor]) -> list[Tensor]:
    o = call(*x)
    return [o.detach(), *torch.autograd.grad(o, x, torch.ones_like(o))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [COSFORMER, {}], ids=["normalized", "plain"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_they_arrive_under_autograd(
    keeper: Keeper, inputs: list[Tensor], options: dict[str, Any], causal: bool, compiled: bool
) -> None:
    def call(*x: Tensor) -> Tensor:
        out: Tensor = linattn.attention(*x, backend="keeper", causal=causal, **options)
        return out

    torch.compiler.reset()
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    want = gradients(lambda *x: linattn.attention(*x, backend="torch", causal=causal, **options), inputs)
    for mine, right in zip(gradients(run, inputs), want, strict=True):
        assert torch.equal(mine, right)
    assert len(keeper.kept) == bool(options and not compiled)


def test_they_arrive_in_a_vjp(keeper: Keeper, inputs: list[Tensor]) -> None:
    x = [part.detach() for part in inputs]
    o, vjp = linattn.attention_vjp(*x, backend="keeper", **COSFORMER)
    assert vjp(torch.ones_like(o))["q"].shape == x[0].shape
    assert len(keeper.kept) == 1


def test_nothing_is_kept_where_nothing_is_recorded(keeper: Keeper, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        linattn.attention(*inputs, backend="keeper", **COSFORMER)
    assert keeper.kept == []
