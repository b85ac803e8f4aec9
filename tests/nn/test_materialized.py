"""Decays are no parameters and in no file, and survive whatever makes, moves and empties a module."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from linattn import decay
from linattn.models.transnormer_lm import TransNormerConfig, TransNormerLM
from linattn.nn import GatedLinearAttention

TABLE = decay.transnormer(4, 1, 3)


def made(device: str = "cpu") -> GatedLinearAttention:
    with torch.device(device):
        return GatedLinearAttention(6, 8, 4, log_decay=TABLE)


@pytest.fixture(autouse=True)
def emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory has other numbers, as an allocator hands it out."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(-1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_emptied_module_has_its_decays(device: str) -> None:
    module = made(device).to_empty(device="cpu")
    assert module.log_decay.tolist() == TABLE.tolist()
    assert module.log_decay.dtype == torch.float64
    for parameter in module.parameters():
        assert not parameter.is_meta


def test_new_modules_are_where_new_tensors_are() -> None:
    with torch.device("meta"):
        module = GatedLinearAttention(6, 8, 4, log_decay=TABLE, use_lrpe=True)
    assert all(part.is_meta for part in module.parameters())
    assert module.log_decay.tolist() == TABLE.tolist()  # in no file
    whole = GatedLinearAttention(6, 8, 4, log_decay=TABLE, use_lrpe=True)
    module.load_state_dict(whole.state_dict(), assign=True)
    x = torch.ones(1, 3, 6)
    assert torch.equal(module(x), whole(x))


def test_angles_from_the_meta_device_are_reset() -> None:
    with torch.device("meta"):
        module = GatedLinearAttention(6, 8, 4, log_decay=TABLE, use_lrpe=True)
    module.to_empty(device="cpu")
    for part in module.modules():  # as FSDP does
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert torch.equal(module.lrpe.theta, GatedLinearAttention(6, 8, 4, use_lrpe=True).lrpe.theta)
    assert module.log_decay.tolist() == TABLE.tolist()


def test_there_and_back() -> None:
    module = made().to("meta")
    assert module.log_decay_bits.is_meta
    assert module.to_empty(device="cpu").log_decay.tolist() == TABLE.tolist()


@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_casts_leave_the_bits(move: str) -> None:
    module = made()
    before = module.log_decay_bits
    assert getattr(module, move)().log_decay_bits is before
    assert copy.deepcopy(module).log_decay.tolist() == TABLE.tolist()


@pytest.mark.parametrize("move", [lambda m: m.to_empty(device="cpu"), lambda m: m._apply(torch.clone)])
def test_decays_of_ones_own_move_with_the_module(move: Any) -> None:
    module = made()
    module.log_decay.mul_(3)
    assert move(module).log_decay.tolist() == (3 * TABLE).tolist()
    before = module.log_decay_bits
    assert move(module).log_decay_bits is not before
    module.reset_parameters()
    assert module.log_decay.tolist() == TABLE.tolist()


def test_reset_parameters_writes_decays_and_nothing_else() -> None:
    module = made()
    weights = copy.deepcopy(module.state_dict())
    module.log_decay_bits.fill_(-1)
    module.reset_parameters()
    assert module.log_decay.tolist() == TABLE.tolist()
    assert all(torch.equal(part, weights[name]) for name, part in module.state_dict().items())
    without = GatedLinearAttention(6, 8, 4)
    without.reset_parameters()
    assert without.to_empty(device="cpu").log_decay is None


def test_a_model_from_the_meta_device_computes_what_it_would() -> None:
    config = TransNormerConfig(
        vocab_size=11, embed_dim=8, hidden_dim=8, num_heads=2, num_layers=2, glu_dim=12
    )
    want = TransNormerLM(config)
    torch.nn.init.normal_(want.lm_head.weight)
    with torch.device("meta"):
        got = TransNormerLM(config)
    got.to_empty(device="cpu").load_state_dict(want.state_dict())
    ids = torch.from_numpy(np.arange(10).reshape(2, 5) % 11)
    assert torch.equal(got(ids), want(ids))
