"""Models that FSDP2 keeps in shards, in a group of one process: the same bits as without."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from linattn.models.cosformer import CosformerForCausalLM, CosformerForConditionalGeneration
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM
from linattn.nn import Lrpe
from tests.models.test_cosformer import build, text

GREEDY = {"max_new_tokens": 5, "do_sample": False}
MIXED = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
kinds = pytest.mark.parametrize(
    "kind", [TransNormerForCausalLM, CosformerForCausalLM, CosformerForConditionalGeneration]
)


@pytest.fixture(autouse=True)
def alone():
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def made(kind: Any, dtype: torch.dtype) -> Any:
    if kind is not TransNormerForCausalLM:
        return build(kind).to(dtype)
    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=11, decoder_embed_dim=16, hidden_dim=16, decoder_layers=2, decoder_attention_heads=2,
        glu_dim=24, linear_use_lrpe_list=[1, 1], init_std=0.3, eos_token_id=None,
    )  # fmt: skip
    return kind(config).eval().to(dtype)


def sharded(model: Any, **options: Any) -> Any:
    """As docs/transnormer.md says: angles by themselves, and in float32."""
    for part in model.modules():
        if isinstance(part, Lrpe):
            fully_shard(part)
    return with_angles_inside(model, **options)


def with_angles_inside(model: Any, **options: Any) -> Any:
    policy = MixedPrecisionPolicy(**options)
    for part in model.modules():
        if type(part).__name__ in model._no_split_modules:
            fully_shard(part, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    if model.can_generate():
        register_fsdp_forward_method(model, "generate")
    return model


def rounded(model: Any) -> Any:
    """What a model in float32 computes with whose weights, but not the angles, are rounded for each call."""
    return copy.deepcopy(model).bfloat16()


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@kinds
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float64, {}), (torch.float32, MIXED), (torch.bfloat16, {})],
    ids=["as they are", "mixed precision", "bfloat16 weights"],
)
def test_the_same_bits(kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Outside of a block's forward weights are shards: what it remembers of a source is formed in there."""
    ids, model = text(2, 6), made(kind, dtype)
    plain = rounded(model) if options else copy.deepcopy(model)
    model = sharded(model, **options)
    with torch.no_grad():
        for use_cache in (True, False):
            got, want = (each(ids, labels=ids, use_cache=use_cache).logits for each in (model, plain))
            assert torch.equal(got, want)
        assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))
    for each in (model, plain):
        each.train()(ids, labels=ids).loss.backward()
    want = {name: x.grad for name, x in plain.named_parameters()}
    got = {name: whole(x.grad).to(want[name].dtype) for name, x in model.named_parameters()}
    assert all(x.any() for x in want.values()) and got.keys() == want.keys()
    off = torch.stack([(got[name] - want[name]).norm() for name in want]).norm()
    if kind is CosformerForConditionalGeneration:  # what blocks use of a source is added up in another order
        assert off <= torch.finfo(off.dtype).eps * torch.stack([x.norm() for x in want.values()]).norm()
    else:
        assert not off


def test_angles_that_are_sharded_with_the_rest_are_rounded_and_it_is_said() -> None:
    ids, model = text(2, 6), made(TransNormerForCausalLM, torch.float32)
    plain = rounded(model)
    for layer in plain.model.layers:
        theta = layer.token_mixer.lrpe.theta
        theta.data = theta.bfloat16().float()
    model = with_angles_inside(model, **MIXED)
    with torch.no_grad(), pytest.warns(UserWarning, match="angles are rounded to bfloat16.*by itself"):
        got = model(ids).logits
    assert torch.equal(got, plain(ids).logits)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_angles_in_half_precision_are_said(half: torch.dtype) -> None:
    lrpe = Lrpe(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lrpe.bfloat16()().theta.dtype == torch.float32
    lrpe.theta = nn.Parameter(lrpe.theta.detach().to(half))
    with pytest.warns(UserWarning, match=f"rounded to {half}".replace("torch.", "")):
        assert lrpe().theta.dtype == torch.float32
