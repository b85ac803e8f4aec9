"""Runs of transformers' Trainer on a text, whole and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linattn.models.transnormer import TransNormerConfig
from linattn.train import corpus, published
from tests.train.stopping import killed_after
from tests.train.test_published import CPU, LINE, SIZES

PLAN = published.Plan(steps=6, batch=2, seq_len=16, lr=1e-2, save_every=2)


def train(
    home: Path, out: Path, plan: published.Plan = PLAN, preset: Path | None = None, **options: Any
) -> None:
    """Train into a folder on the text of `home`, by default with the sizes that lie there."""
    ids = corpus.read_corpus(home / "text.txt")
    published.train(str(preset or home / "sizes"), ids, plan, out, device=CPU, as_json=True, **options)


def begun(home: Path) -> Path:
    """Put sizes, a text, and two runs into a folder: "whole", and "cut", killed after steps 2 and 4 of 6."""
    TransNormerConfig(vocab_size=256, **SIZES).save_pretrained(home / "sizes")
    (home / "text.txt").write_text(LINE * 60)
    train(home, home / "whole")
    with killed_after(5):
        train(home, home / "cut")
    return home
