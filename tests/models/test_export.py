"""torch.export takes the models, batch and length left open; the program gives the numbers of the model."""

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


def inputs(name: str, b: int, n: int) -> dict[str, Any]:
    """Texts, the last of which ends two tokens earlier."""
    ids = torch.arange(b * n).reshape(b, n) % 29 + 3
    mask = torch.ones_like(ids)
    mask[-1, n - 2 :] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given |= {"decoder_input_ids": ids.flip(1)} if name == "encoder-decoder" else {}
    return given | ({} if name == "masked" else {"use_cache": False})


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in MODELS), ("TransNormer", True)])
@torch.no_grad()
def test_an_exported_model_takes_other_sizes(name: str, strict: bool, masked: bool) -> None:
    torch.manual_seed(0)
    model, example = MODELS[name]().eval(), inputs(name, 2, 7)
    if not masked:
        del example["attention_mask"]
    sizes = {0: torch.export.Dim("b", max=16), 1: torch.export.Dim("n", min=3, max=512)}
    dynamic = {key: sizes if isinstance(part, torch.Tensor) else None for key, part in example.items()}
    program = torch.export.export(model, (), example, dynamic_shapes=dynamic, strict=strict)
    for b, n in ((2, 7), (3, 133)):
        given = {key: part for key, part in inputs(name, b, n).items() if key in example}
        torch.testing.assert_close(program.module()(**given).logits, model(**given).logits)
