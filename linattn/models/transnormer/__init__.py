"""TransNormerLLM as a Hugging Face model; importing this makes the Auto classes know "transnormer".

import linattn.models.transnormer
model = AutoModelForCausalLM.from_pretrained(folder)     # the released layout, no remote code
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from linattn.models.huggingface.names import tell
from linattn.models.transnormer.cache import TransNormerCache
from linattn.models.transnormer.configuration import PRESETS, TransNormerConfig, preset
from linattn.models.transnormer.modeling import (
    TransNormerForCausalLM,
    TransNormerModel,
    TransNormerPreTrainedModel,
)

__all__ = [
    "PRESETS",
    "TransNormerCache",
    "TransNormerConfig",
    "TransNormerForCausalLM",
    "TransNormerModel",
    "TransNormerPreTrainedModel",
    "preset",
]

AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig, exist_ok=True)
AutoModel.register(TransNormerConfig, TransNormerModel, exist_ok=True)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerForCausalLM, exist_ok=True)
tell(TransNormerConfig.model_type, CAUSAL_LM="TransNormerForCausalLM")
