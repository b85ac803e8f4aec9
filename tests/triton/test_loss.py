"""The fused cross entropy: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch

from linattn.backends.triton import loss
from tests.triton.launches import compiled, recorded, spilled
from tests.triton.programs import interpret

# in groups of about equal time, each a process of its own
CHECKS = (("formula", "alone"), ("mutants",), ("not_finite", "out_of_range", "whole"))


@pytest.mark.parametrize("checks", CHECKS, ids="-".join)
def test_interpreted(checks: tuple[str, ...]) -> None:
    interpret("interpreted_loss.py", *checks)


def launched(width: int, dtype: Any, gradient: bool, ignored: int = -100) -> Any:
    """The launch for rows of so many logits."""
    with recorded() as seen:
        logits = loss.room(64, width, torch.empty(0, dtype=dtype, device="meta"))
        labels = torch.empty(64, dtype=torch.int64, device="meta")
        losses = torch.empty(64, device="meta")
        loss.turned(logits, labels, labels == ignored, losses, ignored, gradient)
    (one,) = seen
    return one


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiles_with_wide_loads_at_any_width(capability: int, dtype: Any) -> None:
    for width in (64000, 50257, 128001):
        for gradient in (False, True):
            binary = compiled(launched(width, dtype, gradient), capability)
            assert "ld.global.v4" in binary.asm["ptx"], width
            assert ("st.global.v4" in binary.asm["ptx"]) == gradient, width
            assert spilled(binary) == 0, width


@pytest.mark.parametrize("width", [1, 7, 16, 33, 1000, 5000])
def test_compiles_small(width: int) -> None:
    assert spilled(compiled(launched(width, torch.bfloat16, True), 90)) == 0


def test_any_number_may_ask_nothing() -> None:
    for ignored in (0, 1, -100, 1 << 40):
        compiled(launched(1000, torch.bfloat16, True, ignored), 90)


def test_launches_have_a_thread_for_a_number() -> None:
    for width in (*range(1, 300), 1000, 64000, 1 << 20):
        how = loss.shape(width)
        assert how.block >= min(width, loss.WIDEST)
        assert how.warps * 32 <= how.block  # a thread reads what no other one writes
        assert how.warps in (1, 2, 4, 8)
