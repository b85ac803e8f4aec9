"""cosFormer as Hugging Face models; importing this makes the Auto classes know "cosformer".

import linattn.models.cosformer
model = AutoModelForMaskedLM.from_pretrained(folder)     # no remote code
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from linattn.models.cosformer.base import CosformerPreTrainedModel
from linattn.models.cosformer.cache import CosformerCache
from linattn.models.cosformer.configuration import CosformerConfig
from linattn.models.cosformer.decoder import CosformerDecoder, CosformerForCausalLM
from linattn.models.cosformer.modeling import (
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
    CosformerModel,
)
from linattn.models.cosformer.seq2seq import CosformerForConditionalGeneration
from linattn.models.huggingface.names import tell

__all__ = [
    "CosformerCache",
    "CosformerConfig",
    "CosformerDecoder",
    "CosformerForCausalLM",
    "CosformerForConditionalGeneration",
    "CosformerForMaskedLM",
    "CosformerForSequenceClassification",
    "CosformerModel",
    "CosformerPreTrainedModel",
]

AutoConfig.register(CosformerConfig.model_type, CosformerConfig, exist_ok=True)
for auto, model in (
    (AutoModel, CosformerModel),
    (AutoModelForMaskedLM, CosformerForMaskedLM),
    (AutoModelForSequenceClassification, CosformerForSequenceClassification),
    (AutoModelForCausalLM, CosformerForCausalLM),
    (AutoModelForSeq2SeqLM, CosformerForConditionalGeneration),
):
    auto.register(CosformerConfig, model, exist_ok=True)
tell(
    CosformerConfig.model_type,
    CAUSAL_LM="CosformerForCausalLM",
    MASKED_LM="CosformerForMaskedLM",
    SEQ_TO_SEQ_CAUSAL_LM="CosformerForConditionalGeneration",
    SEQUENCE_CLASSIFICATION="CosformerForSequenceClassification",
)
