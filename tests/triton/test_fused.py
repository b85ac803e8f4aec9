"""Linear maps that form their operands again: in Triton's interpreter, and their kernel compiled for GPUs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch
from torch import nn

from linattn.backends.triton import glu
from linattn.nn import SGLU, SimpleRMSNorm
from linattn.nn.fused import gated, normed, product
from tests.triton.launches import compiled, recorded, spilled
from tests.triton.programs import interpret

CHECKS = (
    ("fused", "products", "formula", "unused", "lowered", "outside", "frozen", "memory", "twice"),
    ("layers", "memory", "layers", "fallbacks", "public"),
)


@pytest.mark.parametrize("checks", CHECKS, ids=lambda checks: checks[0])
def test_interpreted(checks: tuple[str, ...]) -> None:
    interpret(f"interpreted_{checks[0]}.py", *checks[1:])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_product_compiles_with_wide_loads(capability: int, dtype: torch.dtype) -> None:
    with recorded() as seen:
        a, b, dp = (torch.empty(64, 2816, dtype=dtype, device="meta") for _ in range(3))
        for again in (None, dtype):
            glu.backward(a, b, dp, again)
    assert [one.flags["AGAIN"] for one in seen] == [False, True]
    for one in seen:
        binary = compiled(one, capability)
        assert "ld.global.v4" in binary.asm["ptx"] and "st.global.v4" in binary.asm["ptx"]
        assert spilled(binary) == 0


def test_a_cpu_calls_the_modules() -> None:
    torch.manual_seed(0)
    norm, x, u = SimpleRMSNorm(), *torch.randn(2, 5, 7).requires_grad_()
    first, second = nn.Linear(7, 3), nn.Linear(7, 4)
    same, y, z = normed(norm, (first, second), x)
    assert same is x
    assert torch.equal(y, first(norm(x))) and torch.equal(z, second(norm(x)))
    assert torch.equal(gated(norm, first, x, u), first(u * norm(x)))
    assert torch.equal(product(first, x, u), first(x * u))
    unit = SGLU(7, 5)
    assert torch.equal(unit(x, prenorm=norm), x + unit(norm(x)))
