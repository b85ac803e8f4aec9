"""A small model, and its steps as the kernels would do them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import linattn
from linattn.models import TransNormerLM, decoding, parts, persistent
from tests.models.stepping import CONFIG, Kernels


@pytest.fixture
def model() -> TransNormerLM:
    torch.manual_seed(0)
    made = TransNormerLM(CONFIG).double().eval()
    nn.init.normal_(made.lm_head.weight)
    return made


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels()
    for module in (decoding, parts):
        monkeypatch.setattr(module, "kernels", lambda name: found)
    monkeypatch.setattr(persistent, "capability", lambda device: (9, 0))
    monkeypatch.setattr(decoding, "fuses", lambda *parts: not torch.compiler.is_compiling())
    step = linattn.decode_step

    def decode_step(*arguments: Any, backend: Any, **options: Any) -> Any:
        found.said.append(found.early)
        return step(*arguments, **options)

    monkeypatch.setattr(decoding, "linattn", SimpleNamespace(decode_step=decode_step))
    return found
