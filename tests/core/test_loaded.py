"""Compilers do not look at the modules of the process, which another thread may be importing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import linattn
from linattn import Cosine, arrays


class Alone:
    """`sys` for code that must not ask it for modules."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"sys.{name} was asked for while a compiler looked")


@pytest.mark.parametrize("options", [{}, {"normalize": True, "feature_map": "relu", "reweight": Cosine(9)}])
def test_compilers_see_no_list_of_modules(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    q = torch.randn(1, 9, 2, 4)
    want = linattn.attention(q, q, q, log_decay=-torch.ones(2), **options)
    monkeypatch.setattr(arrays, "sys", Alone())

    def run(q: torch.Tensor) -> Any:
        return linattn.attention(q, q, q, log_decay=-torch.ones(2), **options)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(q), want)


def test_torch_is_found_when_it_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_torch", None)
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "torch")
        assert arrays.torch_if_loaded() is None and arrays.kind_of(torch.ones(1)) is None
    assert arrays.kind_of(torch.ones(1)) == "torch" and arrays.torch_if_loaded() is torch
