"""Rows of docs/conventions.md that run on a processor: other libraries beside the calls that equal them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from linattn import decay
from tests.integrations.conventions import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    command = [sys.executable, "-m", "tests.integrations.conventions"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_flash_linear_attention(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]


def test_minimax() -> None:
    """Its own buffers, for heads that are a power of two and not."""
    for heads in (4, 6):
        config = MiniMaxConfig(
            hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=heads, head_dim=8,
            num_hidden_layers=3, layer_types=["linear_attention"] * 3,
        )  # fmt: skip
        for layer in range(3):
            slopes = MiniMaxLightningAttention(config, layer).slope_rate.flatten().double().numpy()
            want = -decay.minimax(heads, layer, 3)
            assert (abs(slopes - want) <= 4 * np.finfo(np.float32).eps * want).all()
