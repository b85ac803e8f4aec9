"""The one kernel where nobody asked for it: what users see who do not have it, compile, or watch modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linattn.backends.cupy import gpu
from linattn.backends.cupy import persistent as kernel
from linattn.models import persistent
from tests.models.stepping import Kernels
from tests.models.test_persistent import built, faked, released


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> list[Any]:
    return faked(monkeypatch)


@pytest.fixture
def one() -> Any:
    return built()


def test_a_compiler_follows_a_model_of_transformers(one: Any) -> None:
    """Its decode steps are one graph, as they are without the kernel."""
    model, token = released(one), torch.zeros(1, 1, dtype=torch.int64)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache = model(token, use_cache=True).past_key_values
        assert step(token, past_key_values=cache).logits.shape == (1, 1, 8)


@pytest.mark.parametrize("texts", [1, 2])
def test_where_it_does_not_run_norm_and_head_see_what_they_do_without(one: Any, texts: int) -> None:
    model, seen = released(one), []
    for module in (model.model.norm, model.lm_head):
        module.register_forward_hook(lambda module, given, out: seen.append((given[0].shape, out.shape)))
    token = torch.zeros(texts, 1, dtype=torch.int64)
    with torch.no_grad():
        cache = model(token, use_cache=True).past_key_values
        for on in (True, False):
            model.one_kernel = on
            model(token, past_key_values=cache)
    assert seen[2:4] == seen[4:] == [((texts, 1, 1024), (texts, 1, 1024)), ((texts, 1, 1024), (texts, 1, 8))]


def test_a_kernel_that_does_not_compile_is_not_taken(
    one: Any, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Any:
        raise RuntimeError("no such architecture\nand more")

    monkeypatch.setattr(gpu, "function", refuse)
    monkeypatch.setattr(persistent._kernel(), "compiles", kernel.compiles)
    kernel.compiles.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="five kernels a layer: no such architecture$"):
        for _ in range(2):
            one.step(torch.zeros(1, dtype=torch.int64), one.initial_states(1))
    kernel.compiles.cache_clear()
    assert not launched
