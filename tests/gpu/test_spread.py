"""Models whose layers lie on several devices, as transformers' `device_map` spreads them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from linattn.models.cosformer import (  # noqa: E402
    CosformerConfig,
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
)
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM  # noqa: E402
from tests.gpu.calls import needs_two  # noqa: E402

pytestmark = pytest.mark.gpu
V = 96
COSFORMER = functools.partial(
    CosformerConfig, vocab_size=V, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
    intermediate_size=96, max_position_embeddings=80, dropout=0.0, initializer_range=0.2,
)  # fmt: skip
TRANSNORMER = functools.partial(
    TransNormerConfig, vocab_size=V, decoder_embed_dim=64, hidden_dim=64, decoder_layers=3,
    decoder_attention_heads=2, glu_dim=96, linear_use_lrpe_list=[1, 0, 1], init_std=0.2,
)  # fmt: skip
MODELS = {
    "TransNormerLLM": lambda: TransNormerForCausalLM(TRANSNORMER()),
    "cosFormer": lambda: CosformerForCausalLM(COSFORMER()),
    "cosFormer of two texts": lambda: CosformerForConditionalGeneration(COSFORMER(num_decoder_layers=3)),
    "cosFormer encoder": lambda: CosformerForMaskedLM(COSFORMER()),
}


def places(model: Any) -> Iterator[str]:
    """The names of all parts that are moved as one."""
    whole = [name for name, part in model.named_modules() if type(part).__name__ in model._no_split_modules]
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in whole)
        if name in whole or (not inside and name and not list(part.children())):
            yield name


@pytest.fixture(params=MODELS)
def models(request: pytest.FixtureRequest, devices: tuple[str, str]) -> tuple[Any, Any]:
    """A model on one device, and the same with its last blocks, and a head of its own, on another."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    first, second = devices
    late = ("layers.1", "layers.2", "norm")
    spread = {name: second if name.endswith(late) else first for name in places(model)}
    other = accelerate.dispatch_model(copy.deepcopy(model), spread, main_device=first, force_hooks=True)
    assert len({x.device for x in other.parameters()}) == 2
    return model.to(first), other


@pytest.fixture(params=["cpu, cuda:0", pytest.param("cuda:0, cuda:1", marks=needs_two)])
def devices(request: pytest.FixtureRequest) -> tuple[str, str]:
    first, second = request.param.split(", ")
    return first, second


def padded(device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and a mask of padding on either side."""
    ids = torch.randint(3, V, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, 15:] = 0, 0
    return ids.to(device), mask.to(device)


def given(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    return {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}


def close(mine: torch.Tensor, other: torch.Tensor) -> None:
    """A CPU's and a GPU's float32, or those of two alike."""
    assert mine.device == other.device
    assert (mine - other).norm() <= torch.finfo(torch.float16).eps * other.norm()


@torch.no_grad()
def test_outputs_of_padded_texts(models: tuple[Any, Any], devices: tuple[str, str]) -> None:
    ids, mask = padded(devices[0])
    plain, spread = (model(ids, mask, **given(model, ids)) for model in models)
    close(spread.logits, plain.logits)
    plain, spread = (model(ids, mask, output_hidden_states=True, **given(model, ids)) for model in models)
    close(spread.logits, plain.logits)


def test_gradients(models: tuple[Any, Any], devices: tuple[str, str]) -> None:
    ids, mask = padded(devices[0])
    for model in models:
        labels = ids.masked_fill(mask == 0, -100)
        model.train()(ids, mask, labels=labels, **given(model, ids)).loss.backward()
    for mine, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
        close(mine.grad.to(other.device), other.grad)


@torch.no_grad()
@pytest.mark.parametrize("models", [*MODELS][:3], indirect=True)
def test_generation_and_texts_in_pieces(models: tuple[Any, Any], devices: tuple[str, str]) -> None:
    ids, mask = padded(devices[0])
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        plain, spread = (
            model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, **options)
            for model in models
        )
        assert torch.equal(spread, plain)
    found = []
    for model in models:
        cache, pieces = None, []
        for piece in ids.split([7, 1, 12], 1):
            both = {"input_ids": ids, "decoder_input_ids": piece}
            call = both if given(model, ids) else {"input_ids": piece}
            out = model(**call, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        found.append(torch.cat(pieces, 1))
    close(found[1], found[0])
    if hasattr(models[0], "model"):  # texts back to back
        borders = torch.tensor([0, 5, 20], device=ids.device)
        plain, spread = (model(ids[:1], cu_seqlens=borders, use_cache=True) for model in models)
        close(spread.logits, plain.logits)
