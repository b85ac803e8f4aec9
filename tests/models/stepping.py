"""What tests of decoding steps share: a small model, and the kernels' contract in torch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from linattn.models import TransNormerConfig, TransNormerLM
from linattn.nn import SimpleRMSNorm

CONFIG = TransNormerConfig(
    vocab_size=40, embed_dim=32, hidden_dim=48, num_heads=3, num_layers=3, glu_dim=64,
    linear_use_lrpe_list=(1, 0, 1),
)  # fmt: skip


def assert_close(got: Any, want: Any) -> None:
    """As near as sums in float64 of another order are."""
    allowed = 1000 * torch.finfo(torch.float64).eps * max(1.0, float(abs(want).max()))
    assert got.shape == want.shape and float(abs(got - want).max()) <= allowed


class Kernels:
    """The kernels' contract in torch, and what was asked of them."""

    FEW = 4

    def __init__(self) -> None:
        self.early, self.said, self.made = False, [], 0

    def counters(self, x: Any) -> Any:
        self.made += 1
        self.done = torch.zeros(1)
        return self.done

    def products(
        self,
        x: Any,
        weights: Any,
        *,
        eps: Any = None,
        gate: Any = None,
        residual: Any = None,
        done: Any = None,
    ) -> Any:
        assert done is (self.done if len(x) > self.FEW else None)  # one memory for all products of a step
        self.said.append(self.early)
        y = x if eps is None else SimpleRMSNorm(eps)(x)
        y = y if gate is None else y * gate
        made = [nn.functional.linear(y, w) for w in weights]
        z = made[0] if len(made) == 1 else made[0] * made[1]
        return z if residual is None else z + residual

    def fits(self, x: Any, *weights: Any) -> bool:
        return True

    @contextlib.contextmanager
    def chain(self, on: bool) -> Any:
        before, self.early = self.early, on
        yield
        self.early = before

    def on(self, device: Any) -> Any:
        return contextlib.nullcontext()


def walked(model: TransNormerLM, ids: Any) -> Any:
    states = model.initial_states(len(ids))
    return torch.stack([model.step(column, states) for column in ids.T], 1), states
