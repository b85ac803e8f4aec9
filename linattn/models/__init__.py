"""Language models built from `linattn.nn`."""

from __future__ import annotations

from linattn.models.transnormer_lm import PRESETS, TransNormerConfig, TransNormerLM

__all__ = ["PRESETS", "TransNormerConfig", "TransNormerLM"]
