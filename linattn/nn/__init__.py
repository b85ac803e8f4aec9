"""Layers of the two published systems, for torch: cosFormer attention, and the parts of TransNormerLLM."""

from __future__ import annotations

from linattn.nn.cosformer import CosformerAttention
from linattn.nn.gla import GatedLinearAttention
from linattn.nn.loss import linear_cross_entropy
from linattn.nn.lrpe import Lrpe
from linattn.nn.norm import SimpleRMSNorm
from linattn.nn.sglu import SGLU

__all__ = [
    "SGLU",
    "CosformerAttention",
    "GatedLinearAttention",
    "Lrpe",
    "SimpleRMSNorm",
    "linear_cross_entropy",
]
