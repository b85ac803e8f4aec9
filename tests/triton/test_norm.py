"""The fused norm: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch

from linattn.backends.triton import norm
from linattn.nn import SimpleRMSNorm
from tests.triton.launches import compiled, recorded, spilled
from tests.triton.programs import interpret

# in groups of about equal time, each a process of its own
CHECKS = (
    ("formula",),
    ("mutants", "alone"),
    ("not_finite", "layouts", "layer"),
    ("autograd", "plain", "only_one", "twice"),
)


@pytest.mark.parametrize("checks", CHECKS, ids="-".join)
def test_interpreted(checks: tuple[str, ...]) -> None:
    interpret("interpreted_norm.py", *checks)


def launched(width: int, dtype: Any, gated: bool) -> list[Any]:
    """Both passes over rows that lie one after the other; the second once more, with all that it can do."""
    with recorded() as seen:
        x, u, dy = (torch.empty(64, width, dtype=dtype, device="meta") for _ in range(3))
        gate = u if gated else None
        norm.forward(x, gate, 1e-6)
        norm.backward(x, gate, dy, 1e-6)
        norm.backward(x, gate, dy, 1e-6, None if gated else u, dtype)
    return list(seen)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_compiles_with_wide_loads(capability: int, dtype: Any, gated: bool) -> None:
    for width in (64, 2560, 4096):
        found = launched(width, dtype, gated)
        assert [one.kernel.__name__ for one in found] == ["norm", "norm_backward", "norm_backward"]
        for one in found:
            binary = compiled(one, capability)
            assert "ld.global.v4" in binary.asm["ptx"], one
            assert "st.global.v4" in binary.asm["ptx"], one
            assert spilled(binary) == 0, one


@pytest.mark.parametrize("width", [1, 3, 100, 2049, 12288, norm.WIDEST, norm.WIDEST + 1, 40000])
def test_compiles_at_any_width(width: int) -> None:
    for gated in (True, False):
        for one in launched(width, torch.bfloat16, gated):
            assert spilled(compiled(one, 90)) == 0, one


def test_launches_cover_a_row() -> None:
    for width in (*range(1, 300), 1000, 2049, 4096, 12288, norm.WIDEST, norm.WIDEST + 1, 1 << 20):
        how = norm.shape(width)
        assert how.block >= width or width > norm.WIDEST
        assert how.warps in (1, 2, 4, 8, 16, 32)
        assert how.rows * how.block <= norm.WIDEST


def test_a_cpu_keeps_the_plain_norm() -> None:
    x, u = (torch.randn(5, 7, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for part, gate in ((x.to(dtype), u.to(dtype)), (x.to(dtype), u)):
            wide = part if dtype == torch.float64 else part.float()
            want = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
            for module in (SimpleRMSNorm(fused=False), SimpleRMSNorm()):
                assert torch.equal(module(part), want)
                assert torch.equal(module.gated(part, gate), gate * want)
    assert repr(SimpleRMSNorm(fused=False)) == "SimpleRMSNorm(eps=1e-06, fused=False)"
    assert repr(SimpleRMSNorm()) == "SimpleRMSNorm(eps=1e-06)"
    y = torch.compile(SimpleRMSNorm(), fullgraph=True, backend="eager")(x)
    assert torch.equal(y, SimpleRMSNorm(fused=False)(x))
