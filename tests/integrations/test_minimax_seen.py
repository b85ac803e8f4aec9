"""What others see of a patched MiniMax, and do to it: hooks, emptied caches, compilers, subclasses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import linattn
from linattn import errors
from linattn.decay import minimax

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from linattn.integrations.transformers import patch_minimax
from tests.integrations.test_minimax import TOL, of_layers, tokens


def test_attentions_of_every_generated_token_are_its_own() -> None:
    """States go on in place; those that generation records stay what they were."""
    model, ids = of_layers("fll"), tokens(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    theirs = model.generate(ids, **options).attentions
    with patch_minimax(model):
        mine = model.generate(ids, **options).attentions
    assert len(mine) == 4
    for step, wanted in zip(mine, theirs, strict=True):
        for x, y in zip(step, wanted, strict=True):
            torch.testing.assert_close(x, y, **TOL)
    assert len({step[-1].data_ptr() for step in mine}) == 4


@torch.no_grad()
def test_a_step_that_nobody_watches_copies_nothing() -> None:
    layer, cache = of_layers("fl").model.layers[1].self_attn, MiniMaxCache()
    patch_minimax(layer)
    seen: list[Any] = []
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    first, second = (layer(x, None, None, cache)[1] for _ in range(2))
    assert first.data_ptr() == second.data_ptr() == cache.linear_cache[1].data_ptr()
    for register in (layer.register_forward_hook, torch.nn.modules.module.register_module_forward_hook):
        with register(lambda module, given, out: seen.append(out[1]) if module is layer else None):
            layer(x, None, None, cache)
        assert seen[-1].data_ptr() != cache.linear_cache[1].data_ptr()


def test_a_cache_of_inference_mode_goes_on_there_only() -> None:
    model = of_layers("fl")
    with patch_minimax(model):
        with torch.inference_mode():
            cache = model(tokens(1, 5), use_cache=True).past_key_values
            model(tokens(1, 1), past_key_values=cache)
        with torch.no_grad(), pytest.raises(errors.StateError, match="made in inference mode"):
            model(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_an_emptied_cache_has_no_states() -> None:
    """Of lightning layers alone: the keys of others are zeros then, which still weigh in."""
    model, ids = of_layers("ll"), tokens(2, 9)
    with patch_minimax(model):
        want = model(ids).logits
        cache = model(tokens(2, 7, seed=1), use_cache=True).past_key_values
        cache.reset()
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(ids, past_key_values=cache, use_cache=True).logits
        cache.reset()
    torch.testing.assert_close(found, want, **TOL)
    torch.testing.assert_close(model(ids, past_key_values=cache, use_cache=True).logits, want, **TOL)


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["llf", "lfl", "lff", "ll"])
def test_rows_of_a_cache_are_repeated_and_selected(kinds: str) -> None:
    """Full attention last, as in MiniMax-01, where the original's cache finds no place."""
    model, ids, more = of_layers(kinds), tokens(2, 9), tokens(2, 1, seed=1)
    ways = {
        (0, 0, 1, 1): lambda cache: cache.batch_repeat_interleave(2),
        (1,): lambda cache: cache.batch_select_indices(torch.tensor([1])),
        (1, 0): lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    }
    with patch_minimax(model):
        want = model(torch.cat([ids, more], 1), use_cache=False).logits[:, -1]
        for rows, taken in ways.items():
            cache = model(ids, use_cache=True).past_key_values
            taken(cache)
            found = model(more[list(rows)], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(found, want[list(rows)], **TOL)


class Own(MiniMaxLightningAttention):
    """A layer with another output."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        o, state = super().forward(*arguments, **options)
        return 2 * o, state


class Named(MiniMaxLightningAttention):
    """A layer of another name, with MiniMax's output."""


@torch.no_grad()
def test_a_forward_of_ones_own_is_not_replaced() -> None:
    model, ids = of_layers("fll"), tokens(1, 9)
    layer = model.model.layers[2].self_attn
    layer.__class__ = Named
    with patch_minimax(model):
        assert "forward" in vars(layer)
    layer.__class__ = Own
    want = model(ids).logits
    with pytest.raises(
        errors.ArgumentTypeError, match=r"Own, has a forward of its own, .*; patch_minimax\(\)"
    ):
        patch_minimax(model)
    assert not any("forward" in vars(part) for part in model.modules())
    with patch_minimax():  # what such a forward calls is linattn's then
        torch.testing.assert_close(model(ids).logits, want, **TOL)
        with pytest.raises(errors.ArgumentTypeError, match="has a forward of its own"):
            patch_minimax(model)
        patch_minimax(model.model.layers[1]).undo()


@torch.no_grad()
def test_a_layer_has_the_decays_that_it_was_loaded_with(tmp_path: Any) -> None:
    """The formula knows only how many layers there are now."""
    of_layers("lflfll").save_pretrained(tmp_path)
    kinds, ids = ["linear_attention", "full_attention", "linear_attention"], tokens(2, 19)
    options: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": kinds, "dtype": torch.float64}
    model = MiniMaxForCausalLM.from_pretrained(tmp_path, **options).eval()
    model.set_experts_implementation("eager")
    want = model(ids).logits
    with patch_minimax(model):
        torch.testing.assert_close(model(ids).logits, want, **TOL)


@torch.no_grad()
def test_slopes_may_change_at_any_time() -> None:
    layer, x = of_layers("fll").model.layers[1].self_attn, torch.randn(2, 19, 32, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    other = layer.get_slope_rate().double() / 3
    for change in (lambda: layer.slope_rate.mul_(2), lambda: setattr(layer, "slope_rate", other)):
        change()
        layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
        want = layer(x, None, None)[0]
        with patch_minimax(layer):
            for run in (layer, compiled):
                torch.testing.assert_close(run(x, None, None)[0], want, **TOL)


HALVES = torch.bfloat16, torch.float16
CASTS = [(torch.float32,), *((half,) for half in HALVES), *((half, torch.float32) for half in HALVES)]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As `from_config` builds models of one dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@torch.no_grad()
@pytest.mark.parametrize("casts", [*CASTS, HALVES[::-1]], ids=str)
@pytest.mark.parametrize("built", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [4, 96])
def test_decays_are_the_formula_s_whatever_a_cast_made_of_them(
    monkeypatch: pytest.MonkeyPatch, casts: tuple[torch.dtype, ...], built: torch.dtype, heads: int
) -> None:
    seen: list[Any] = []
    dtype = casts[-1]
    real = linattn.attention
    monkeypatch.setattr(linattn, "attention", lambda *x, **y: seen.append(y["log_decay"]) or real(*x, **y))
    config = MiniMaxConfig(hidden_size=heads, head_dim=1, num_attention_heads=heads, num_hidden_layers=3)
    for index in range(3):
        with default_dtype(built):
            layer = MiniMaxLightningAttention(config, index)
        for cast in casts:
            layer = layer.to(cast)
        patch_minimax(layer)
        layer(torch.randn(1, 5, heads, dtype=dtype), None, None)
        assert torch.equal(seen[-1], torch.from_numpy(minimax(heads, index, 3)).float())
        layer(torch.randn(1, 5, heads, dtype=dtype), None, None)
        assert seen[-1] is seen[-2]  # a device would wait for whoever reads the buffer again
        layer.slope_rate = layer.slope_rate * 1.5
        layer(torch.randn(1, 5, heads, dtype=dtype), None, None)
        assert torch.equal(seen[-1], -layer.slope_rate.flatten().float())
    layer.to_empty(device="meta")
    assert layer(torch.randn(1, 5, heads, dtype=dtype, device="meta"), None, None)[0].is_meta


@torch.no_grad()
def test_compilers_have_nothing_to_say() -> None:
    """One graph, as of the original, and no warnings, which are errors here."""
    layer, x = of_layers("fll").model.layers[1].self_attn, torch.randn(2, 9, 32, dtype=torch.float64)

    def run(x: Any, step: Any) -> Any:
        cache = MiniMaxCache()
        return layer(x, None, None, cache)[0], layer(step, None, None, cache)[0]

    for patched in (False, True):
        if patched:
            patch_minimax(layer)
        torch.compiler.reset()
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        for got, want in zip(compiled(x, x[:, :1]), run(x, x[:, :1]), strict=True):
            assert torch.equal(got, want)


def test_transforms_of_buffers_too_are_refused_in_a_sentence() -> None:
    model = of_layers("fll")
    state = dict(model.named_parameters()) | dict(model.named_buffers())

    def loss(state: Any) -> Any:
        return torch.func.functional_call(model, state, (tokens(1, 6),), {"use_cache": False}).logits.sum()

    with patch_minimax(model), pytest.raises(errors.GradientError, match=r"torch\.func transforms"):
        torch.func.grad(loss)(state)
