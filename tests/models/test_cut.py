"""Gradients through what is remembered: right, cut, or refused; never wrong without a word."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import linattn
from linattn.errors import GradientError, LinattnError, OptionError
from linattn.models import TransNormerLM, decoding
from linattn.models.cosformer import CosformerForCausalLM
from linattn.models.transnormer import TransNormerCache, TransNormerForCausalLM
from tests.models.stepping import Kernels
from tests.models.test_cosformer import build
from tests.models.test_transnormer import make, text

MODELS = {"transnormer": make, "cosformer": lambda: build(CosformerForCausalLM).eval()}
KINDS = pytest.mark.parametrize("kind", MODELS)


def gradient(model: Any, first: Any, steps: list[tuple[Any, bool]]) -> torch.Tensor | None:
    """Of the last call's logits by the embeddings of the first text; each call with gradients or without."""
    embeds = model.get_input_embeddings()(first).detach().requires_grad_()
    cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
    for ids, on in steps:
        with torch.set_grad_enabled(on):
            logits = model(ids, past_key_values=cache).logits
    total = logits.square().sum()
    found: torch.Tensor | None = None
    if total.requires_grad:
        (found,) = torch.autograd.grad(total, embeds, allow_unused=True)
    return found


@KINDS
@pytest.mark.parametrize("n", [1, 2])
def test_a_step_without_gradients_cuts_them(kind: str, n: int) -> None:
    """One token, in place, as several: what is behind it has none of what is before."""
    model, ids = MODELS[kind](), text(2, 8)  # type: ignore[operator]
    ids = ids % model.config.vocab_size
    first, middle, end = ids[:, :3], ids[:, 3 : 3 + n], ids[:, 3 + n :]
    assert gradient(model, first, [(middle, True), (end, True)]) is not None
    assert gradient(model, first, [(middle, False), (end, True)]) is None


@KINDS
def test_what_has_gradients_stays_as_it_was(kind: str) -> None:
    """A step has numbers of its own then: what autograd kept for the call before is not overwritten."""
    model, ids = MODELS[kind](), text(2, 6)  # type: ignore[operator]
    ids = ids % model.config.vocab_size
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = model(inputs_embeds=embeds, use_cache=True)
    states = [state.kv for state in found.past_key_values.states]
    before = [kv.detach().clone() for kv in states]
    (want,) = torch.autograd.grad(sum(kv.square().sum() for kv in states), embeds, retain_graph=True)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=found.past_key_values)
    assert all(torch.equal(kv, old) for kv, old in zip(states, before, strict=True))
    assert not any(
        torch.equal(s.kv, old) for s, old in zip(found.past_key_values.states, before, strict=True)
    )
    (again,) = torch.autograd.grad(sum(kv.square().sum() for kv in states), embeds)
    assert torch.equal(again, want)


def test_a_bare_step() -> None:
    q, k, v = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    kv = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    state = linattn.State(kv, None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(GradientError, match="changes the state in place"):
        linattn.decode_step(q, k, v, state)
    plain = linattn.State(kv.detach().clone(), None, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        found, want = linattn.decode_step(q, k, v, state), linattn.decode_step(q, k, v, plain)
    assert torch.equal(found, want) and torch.equal(state.kv, plain.kv) and not state.kv.requires_grad
    assert kv.requires_grad and state.kv.data_ptr() != kv.data_ptr()
    held = state.kv.data_ptr()
    with torch.no_grad():
        linattn.decode_step(q, k, v, state)
    assert state.kv.data_ptr() == held  # from then on in place


@KINDS
def test_reentrant_checkpoints_and_a_cache(kind: str) -> None:
    """torch's reentrant way passes no gradient through what is no tensor."""
    ids, found = text(1, 8), {}
    for how in (None, False, True):
        model = MODELS[kind]().train()  # type: ignore[operator]
        given = ids % model.config.vocab_size
        if how is not None:
            model.gradient_checkpointing_enable({"use_reentrant": how})
            model.enable_input_require_grads()
        cache = model.cache_class()
        model(given[:, :4], past_key_values=cache)
        if how:
            for mode in (True, False):
                with pytest.raises(OptionError, match="use_reentrant=True: no gradient would reach the call"):
                    model.train(mode)(given[:, 4:], past_key_values=cache)
            with torch.no_grad():
                model(given[:, 4:], past_key_values=cache)
            model.train()(given[:, 4:], past_key_values=copy.deepcopy(cache))  # who copies cuts
            cache.reset()
            model(given[:, :4], past_key_values=cache)
            model.gradient_checkpointing_disable()
            cache = model.eval()(given[:, :4], use_cache=True).past_key_values
            model.train().gradient_checkpointing_enable({"use_reentrant": True})
            with pytest.raises(OptionError, match="use_reentrant=True: no gradient"):
                model(given[:, 4:], past_key_values=cache)
            continue
        model(given[:, 4:], past_key_values=cache, labels=given[:, 4:]).loss.backward()
        found[how] = model.get_input_embeddings().weight.grad[given[0, :4]]
    assert found[None].abs().sum() > 0
    torch.testing.assert_close(found[False], found[None])


@KINDS
def test_reentrant_checkpoints_and_what_was_read_without_gradients(kind: str) -> None:
    """A prefix that learns nothing: gradients of what follows are right."""
    ids, found = text(1, 8), []
    for how in (None, True):
        model = MODELS[kind]().train()  # type: ignore[operator]
        given = ids % model.config.vocab_size
        with torch.no_grad():
            cache = model.eval()(given[:, :4], use_cache=True).past_key_values
        if how:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        if how:
            with pytest.raises(LinattnError, match=r"texts|rows"):
                model.train()(given.repeat(2, 1), past_key_values=cache)  # a refused call fills nothing
        model.train()(given[:, 4:], past_key_values=cache, labels=given[:, 4:]).loss.backward()
        found.append([x.grad for x in model.parameters()])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_a_refused_step_leaves_gradients_there() -> None:
    kv = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    state = linattn.State(kv, None, torch.zeros(2, dtype=torch.int64))
    q = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(LinattnError):
        linattn.decode_step(q, q, q, state)
    assert state.kv is kv


def test_a_step_in_inference_mode_leaves_a_state_as_any_other() -> None:
    q, k, v = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    kv = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    state = linattn.State(kv, None, torch.zeros(2, dtype=torch.int64))
    with torch.inference_mode():
        linattn.decode_step(q, k, v, state)
    with torch.no_grad():
        linattn.decode_step(q, k, v, state)
    o, _ = linattn.attention(
        q[:, None].requires_grad_(), k[:, None], v[:, None], initial_state=state, return_state=True
    )
    o.sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's
def test_a_pool_with_gradients_is_copied_too(compiled: bool) -> None:
    q, k, v = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(3))
    leaf = k.clone().requires_grad_()
    _, state = linattn.attention(q, leaf, v, return_state=True)
    kv = state.kv
    (want,) = torch.autograd.grad(kv.square().sum(), leaf, retain_graph=True)

    def call(q: Any, k: Any, v: Any, state: Any) -> Any:
        return linattn.attention(q, k, v, initial_state=state, slots=torch.tensor([1, 0]))

    with torch.no_grad():
        (torch.compile(call, backend="eager") if compiled else call)(q, k, v, state)
    (found,) = torch.autograd.grad(kv.square().sum(), leaf)
    assert torch.equal(found, want) and not torch.equal(state.kv, kv)


def test_states_of_other_arrays_are_refused(model: TransNormerLM) -> None:
    states = [linattn.State(s.kv.numpy(), None, s.length.numpy()) for s in model.initial_states(2)]
    with pytest.raises(LinattnError, match="torch arrays"):
        model.step(torch.tensor([1, 2]), states)


def test_kernels_of_a_step_write_no_gradients(model: TransNormerLM, kernels: Kernels) -> None:
    states = model.initial_states(2)
    before = [state.kv.requires_grad_() for state in states]
    wrong = [linattn.State(state.kv[..., :1], None, state.length) for state in states]
    x = torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(LinattnError):
            decoding.last(model._layers(), wrong, x)
        assert all(state.kv.requires_grad for state in wrong)
        decoding.last(model._layers(), states, x)
    assert kernels.said and not any(state.kv.requires_grad for state in states)
    assert not any(kv.any() for kv in before) and all(state.kv.any() for state in states)


def test_a_cache_says_how_many_texts_it_has_as_transformers_does() -> None:
    cache = TransNormerCache()
    assert cache.batch_size == cache.max_batch_size == 0
    with torch.no_grad():
        make()(text(2, 3), past_key_values=cache)
    assert cache.batch_size == cache.max_batch_size == copy.deepcopy(cache).rows == 2


def test_another_name_of_borders_is_refused() -> None:
    model: TransNormerForCausalLM = make()
    with pytest.raises(OptionError, match=r"cu_seqlens_q.* cu_seqlens"):
        model(text(1, 6), cu_seqlens_q=torch.tensor([0, 3, 6]))
