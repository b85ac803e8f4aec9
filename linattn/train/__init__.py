"""Training of language models, on bytes or a tokenizer's tokens: text, the loop, checkpoints, generation."""

from __future__ import annotations

from linattn.train.data import Text, Windows, read_text
from linattn.train.evaluate import bits_per_byte, compressed_bits_per_byte
from linattn.train.generate import generate
from linattn.train.loading import load_model
from linattn.train.loop import SETTINGS, Progress, Settings, Trainer

__all__ = [
    "SETTINGS",
    "Progress",
    "Settings",
    "Text",
    "Trainer",
    "Windows",
    "bits_per_byte",
    "compressed_bits_per_byte",
    "generate",
    "load_model",
    "read_text",
]
