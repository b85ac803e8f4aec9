"""What a patched MiniMax keeps: caches, decays, layers; and what asks its methods."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from linattn.integrations.transformers import patch_minimax
from tests.integrations.test_minimax import TOL, of_layers, tokens


@torch.no_grad()
@pytest.mark.parametrize("order", ["lf", "fl", "ll"])
def test_a_cache_goes_with_the_last_one_who_has_it(order: str) -> None:
    """Not when Python collects what holds itself in a circle: on a GPU that may be gigabytes later."""
    model = of_layers(order)
    gc.disable()
    try:
        with patch_minimax(model):
            cache = model(tokens(2, 7), use_cache=True).past_key_values
            gone = weakref.ref(cache)
            del cache
            assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("order", ["lf", "fl", "ll"])
def test_copies_of_a_cache_are_of_their_own(order: str) -> None:
    model, ids, more = of_layers(order), tokens(2, 7), tokens(2, 3)
    with patch_minimax(model):
        cache = model(ids, use_cache=True).past_key_values
        copies = [
            copy.deepcopy(cache),
            pickle.loads(pickle.dumps(cache)),
            copy.deepcopy(copy.deepcopy(cache)),
        ]
        want = model(more, past_key_values=copy.deepcopy(cache)).logits
        del cache
        for one in copies:
            assert one.get_seq_length() == 7
            assert torch.equal(model(more, past_key_values=one).logits, want)
            assert one.get_seq_length() == 10
        shared = copy.copy(copies[0])
        del copies, one
        model(more, past_key_values=shared)
        assert shared.get_seq_length() == 13


@torch.no_grad()
@pytest.mark.parametrize("order", ["lf", "ll"])
def test_states_that_somebody_moves_are_reordered_where_they_are(order: str) -> None:
    model, ids, more = of_layers(order), tokens(2, 7), tokens(2, 3)
    with patch_minimax(model):
        cache, moved = (model(ids, use_cache=True).past_key_values for _ in range(2))
        moved.linear_cache = [x.clone() if isinstance(x, torch.Tensor) else x for x in moved.linear_cache]
        for one in (cache, moved):
            one.reorder_cache(torch.tensor([1, 0]))
        want = model(more, past_key_values=cache).logits
        assert torch.equal(model(more, past_key_values=moved).logits, want)


def test_decays_that_nobody_counts_versions_of_are_read_again() -> None:
    with torch.inference_mode():
        model = of_layers("lf")
        other = copy.deepcopy(model)
        layer = other.model.layers[0].self_attn
        layer.slope_rate.mul_(3)
        buffers = layer.query_decay, layer.key_decay, layer.diagonal_decay
        for buffer, new in zip(buffers, layer.decay_factors(layer.slope_rate), strict=True):
            buffer.copy_(new)
        ids = tokens(1, 9)
        want = other(ids).logits
        with patch_minimax(model):
            assert not torch.allclose(model(ids).logits, want)
            model.load_state_dict(other.state_dict())
            torch.testing.assert_close(model(ids).logits, want, **TOL)


def test_parameters_may_be_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a layer's tensors is remembered by a weak reference to them."""
    model = of_layers("l")
    weights = copy.deepcopy(model.state_dict())
    with patch_minimax(model):
        model(tokens(1, 4))
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.load_state_dict(weights)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_layer_has_the_signature_of_the_original_and_is_exported() -> None:
    layer: Any = of_layers("fl").model.layers[1].self_attn
    want = inspect.signature(layer.forward)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with patch_minimax(layer):
        assert inspect.signature(layer.forward) == want
        exported = torch.export.export(layer, (x, None, None)).module()
        torch.testing.assert_close(exported(x, None, None)[0], layer(x, None, None)[0], **TOL)
    assert inspect.signature(MiniMaxLightningAttention.forward)


def test_shapes_alone() -> None:
    model = of_layers("lf")
    with patch_minimax(model), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        found, state = model.model.layers[0].self_attn(x, None, None, MiniMaxCache())
    assert found.shape == x.shape and state.shape[0] == 2
