"""torch.export takes the models, lengths left open; the exported program gives the numbers of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linattn.models.cosformer import (
    CosformerConfig,
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
)
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM

COSFORMER = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
COSFORMER |= {"num_hidden_layers": 1, "max_position_embeddings": 512}


def transnormer() -> Any:
    return TransNormerForCausalLM(
        TransNormerConfig(
            vocab_size=32, decoder_embed_dim=16, decoder_attention_heads=2, decoder_layers=2, hidden_dim=16,
            glu_dim=32,
        )
    )  # fmt: skip


MODELS = {
    "TransNormer": transnormer,
    "causal": lambda: CosformerForCausalLM(CosformerConfig(**COSFORMER)),
    "masked": lambda: CosformerForMaskedLM(CosformerConfig(**COSFORMER)),
    "encoder-decoder": lambda: CosformerForConditionalGeneration(
        CosformerConfig(**COSFORMER, num_decoder_layers=1)
    ),
}


def inputs(name: str, n: int) -> dict[str, Any]:
    """A text and one that ends two tokens earlier."""
    ids = torch.arange(2 * n).reshape(2, n) % 29 + 3
    mask = (torch.arange(n) < torch.tensor([[n], [n - 2]])).long()
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given |= {"decoder_input_ids": ids.flip(1)} if name == "encoder-decoder" else {}
    return given | ({} if name == "masked" else {"use_cache": False})


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in MODELS), ("TransNormer", True)])
@torch.no_grad()
def test_an_exported_model_takes_other_lengths(name: str, strict: bool) -> None:
    torch.manual_seed(0)
    model, example = MODELS[name]().eval(), inputs(name, 7)
    n = torch.export.Dim("n", min=3, max=512)
    dynamic = {key: {1: n} if isinstance(part, torch.Tensor) else None for key, part in example.items()}
    program = torch.export.export(model, (), example, dynamic_shapes=dynamic, strict=strict)
    for length in (7, 133):
        given = inputs(name, length)
        torch.testing.assert_close(program.module()(**given).logits, model(**given).logits)
