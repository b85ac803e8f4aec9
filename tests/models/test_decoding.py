"""Steps in few kernels: what they compute, when they run, and in what order kernels may start early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from linattn.models import TransNormerConfig, TransNormerLM, decoding, parts, persistent
from linattn.models.transnormer import TransNormerConfig as Released
from linattn.models.transnormer import TransNormerForCausalLM
from linattn.models.transnormer_lm import TransNormerLayer
from linattn.nn import SGLU, Lrpe, SimpleRMSNorm
from tests.models.stepping import CONFIG, Kernels, assert_close, walked


@pytest.mark.parametrize("batch", [1, 5])
def test_steps_are_those_of_the_layers(model: TransNormerLM, kernels: Kernels, batch: int) -> None:
    ids = torch.randint(0, 40, (batch, 9), generator=torch.Generator().manual_seed(1))
    got, states = walked(model, ids)
    asked = len(kernels.said)
    for part in model.modules():
        if isinstance(part, SimpleRMSNorm):
            part.fused = False
    want, others = walked(model, ids)
    head = ids.shape[1] if batch <= kernels.FEW else 0
    assert (asked, len(kernels.said) - asked) == (9 * 3 * 5 + head, head)  # the head has no norm of its own
    assert_close(got, want)
    for mine, other in zip(states, others, strict=True):
        assert_close(mine.kv, other.kv)
        assert torch.equal(mine.length, other.length)


def test_the_first_kernel_waits_for_everything(model: TransNormerLM, kernels: Kernels) -> None:
    """Else a step of attention could read a state that the step before still writes."""
    with torch.no_grad():
        states, x = model.initial_states(1), torch.randn(1, 32, dtype=torch.float64)
        list(decoding.steps(model._layers(), states, x))
        assert kernels.said == [False] + [True] * 14
        kernels.said.clear()
        model.layers[1].norm.fused = False  # its own kernels lie between
        list(decoding.steps(model._layers(), states, x))
        assert kernels.said == ([False] + [True] * 4) * 2
        kernels.said.clear()
        model.layers[1].norm.fused = True
        list(
            decoding.steps(model._layers(), model.initial_states(5), torch.randn(5, 32, dtype=torch.float64))
        )
        said, kernels.said = kernels.said, []
        list(decoding.steps(model._layers()[1:2] * 2, [states[1]] * 2, x))  # a state that was just written
        assert kernels.said == ([False] + [True] * 4) * 2
        assert said == [False] + [True] * 14
        for name in ("kv", "length"):  # another tensor of the same memory
            kernels.said.clear()
            states = model.initial_states(1)
            setattr(states[2], name, getattr(states[0], name)[:])
            list(decoding.steps(model._layers(), states, x))
            assert kernels.said == [False] + [True] * 9 + [False] + [True] * 4, name


def test_large_states_are_not_read_early(
    model: TransNormerLM, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take the bandwidth that the product in front needs."""
    with torch.no_grad():
        states, x = model.initial_states(5), torch.randn(5, 32, dtype=torch.float64)
        monkeypatch.setattr(decoding, "SMALL", 0)
        list(decoding.steps(model._layers()[:2], states[:2], x))
        assert kernels.said == [False, False] + [True] * 4 + [False] + [True] * 3
        assert kernels.made == 1  # counters, for all layers


def test_no_kernel_is_early_on_older_gpus(
    model: TransNormerLM, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistent, "capability", lambda device: (8, 0))
    with torch.no_grad():
        for batch in (1, 5):
            x = torch.randn(batch, 32, dtype=torch.float64)
            list(decoding.steps(model._layers(), model.initial_states(batch), x))
    assert kernels.said == [False] * 30


def test_what_a_layer_of_ones_own_gives_is_looked_at(
    model: TransNormerLM, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model._layers()[0].__class__ = Spread
    monkeypatch.setattr(decoding, "fuses", lambda x: x.is_contiguous())
    with torch.no_grad():
        x = torch.randn(2, 32, dtype=torch.float64)
        assert runs(model._layers()[1], x)
        list(decoding.steps(model._layers(), model.initial_states(2), x))
    assert kernels.said == [False] + [True] * 4  # the second layer's own steps, whose results have none


def runs(layer: TransNormerLayer, x: torch.Tensor) -> bool:
    """Whether the kernels take this layer and these rows, here and now."""
    return decoding._now(x) and parts.taken([layer], x) is not None


class Spread(TransNormerLayer):
    """A layer whose results have gaps."""

    def step(self, x: Any, state: Any) -> Any:
        return torch.stack([super().step(x, state)] * 2, -1)[..., 0]


def test_methods_in_place_of_ours_run(model: TransNormerLM, kernels: Kernels) -> None:
    x, layer, mixer = torch.randn(1, 32, dtype=torch.float64), model._layers()[0], model.layers[0].token_mixer
    methods = [
        (layer, "step"), (mixer, "step"), (mixer, "project"), (mixer, "options"), (mixer, "split"),
        (mixer, "decays"), (layer.norm, "gated"), (mixer.norm, "gated"),
    ]  # fmt: skip
    classes = [(type(one), name) for one, name in methods]
    classes += [(SGLU, "forward"), (SimpleRMSNorm, "forward"), (nn.Linear, "forward"), (Lrpe, "forward")]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for one, name in methods:  # of one object
            setattr(one, name, getattr(one, name))
            assert not runs(layer, x), name
            delattr(one, name)
        assert runs(layer, x)
        for kind, name in classes:  # of all of them
            method = getattr(kind, name)
            patch.setattr(kind, name, lambda *given, method=method: method(*given))
            assert not runs(layer, x), (kind, name)
            patch.setattr(kind, name, method)
        assert runs(layer, x)
        patch.setattr(SGLU, "forward", lambda self, x: 7 * torch.ones_like(x))
        (row,) = decoding.steps([layer], model.initial_states(1)[:1], x)
        mixed = x + mixer.step(layer.norm(x), model.initial_states(1)[0])
        assert_close(row, mixed + 7)


def test_where_modules_are_watched_they_run(model: TransNormerLM, kernels: Kernels) -> None:
    x, layer = torch.randn(1, 32, dtype=torch.float64), model._layers()[0]
    assert not runs(layer, x)  # gradients
    with torch.no_grad():
        assert runs(layer, x)
        mixer = layer.token_mixer
        for part in (layer, mixer, layer.channel_mixer, layer.norm, mixer.norm, mixer.out_proj):
            handle = part.register_forward_hook(lambda *given: None)
            assert not runs(layer, x), part
            handle.remove()
        for watch in (register_module_forward_hook, register_module_forward_pre_hook):
            handle = watch(lambda *given: None)  # of all modules
            assert not runs(layer, x)
            handle.remove()
        for kind in ("buffer", "attribute"):
            linear, bias = layer.channel_mixer.l3, torch.ones(32, dtype=torch.float64)
            del linear.bias
            if kind == "buffer":
                linear.register_buffer("bias", bias)
            else:
                linear.bias = bias
            assert not runs(layer, x)
            del linear.bias
            linear.register_parameter("bias", None)
            assert runs(layer, x)
        norm = layer.token_mixer.norm
        del layer.token_mixer.norm
        layer.token_mixer.norm = norm.forward  # no module
        assert not runs(layer, x)
        del layer.token_mixer.norm
        layer.token_mixer.norm = norm
        layer.token_mixer.norm.fused = False
        assert not runs(layer, x)
        layer.token_mixer.norm.fused = True
        assert runs(layer, x)
        for part in (mixer, layer.channel_mixer, mixer.qkvu_proj):
            kind = type(part)
            part.__class__ = type("Other", (kind,), {})  # whose forward may be another one
            assert not runs(layer, x), part
            part.__class__ = kind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "fits", lambda x, *weights: False)
            assert not runs(layer, x)
        assert runs(layer, x)
        biased = TransNormerLM(TransNormerConfig(**{**vars(CONFIG), "bias": True})).double()
        assert not runs(biased._layers()[0], x)
        layer.channel_mixer.l3 = nn.Sequential(layer.channel_mixer.l3)
        assert not runs(layer, x)
        layer = model._layers()[1]
        assert runs(layer, x)
        with torch.autocast("cpu", torch.bfloat16):  # linear maps would change the dtype
            assert not runs(layer, x)
        assert not runs(layer, x[:, :16])
        layer.channel_mixer.l2 = nn.Linear(32, 48, False, dtype=torch.float64)
        assert not runs(layer, x)
        layer.channel_mixer.l2 = layer.channel_mixer.l1
        assert runs(layer, x)
        for part, width in ((layer.token_mixer.out_proj, 40), (layer.channel_mixer.l3, 72)):
            weight = part.weight
            part.weight = nn.Parameter(torch.zeros(32, width, dtype=torch.float64))
            assert not runs(layer, x), part
            part.weight = weight
        assert runs(layer, x)
        layer.token_mixer.norm = nn.RMSNorm(48)  # adapted
        assert not runs(layer, x)
        layer = model._layers()[2]
        assert runs(layer, x)
        layer.__class__ = Doubled
        assert not runs(layer, x)
        head = nn.Linear(32, 7, dtype=torch.float64)
        assert_close(decoding.logits(head, x), head(x))
        assert not kernels.said
        head.bias = None
        assert_close(decoding.logits(head, x[:, None])[:, 0], head(x))
        assert len(kernels.said) == 1
        decoding.logits(head, torch.randn(5, 32, dtype=torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            decoding.logits(head, x)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            decoding.logits(head, x[:, :16])
        assert len(kernels.said) == 1


class Doubled(TransNormerLayer):
    """A layer of somebody's own."""

    def step(self, x: Any, state: Any) -> Any:
        return 2 * super().step(x, state)


def test_a_layer_of_ones_own_steps_as_it_says(model: TransNormerLM, kernels: Kernels) -> None:
    model._layers()[1].__class__ = Doubled
    ids = torch.tensor([[3, 5]])
    got, _ = walked(model, ids)
    assert kernels.said == [*([False] + [True] * 4) * 2, False] * 2  # the last of each is the head
    for part in model.modules():
        if isinstance(part, SimpleRMSNorm):
            part.fused = False
    assert_close(got, walked(model, ids)[0])


def test_tables_made_just_before_are_waited_for(model: TransNormerLM, kernels: Kernels) -> None:
    """A chained step of attention reads decays and angles early."""
    states, x = model.initial_states(1), torch.randn(1, 32, dtype=torch.float64)
    chained, alone = [False] + [True] * 4, [False, False] + [True] * 3
    with torch.no_grad():
        for change, want in (
            (lambda part: part, chained),
            (lambda part: part.lrpe.float(), alone),  # widened for each call
            (lambda part: part.lrpe.double().register_forward_hook(lambda *given: None), alone),
        ):
            change(model._layers()[0].token_mixer)
            kernels.said.clear()
            list(decoding.steps(model._layers()[:1], states[:1], x))
            assert kernels.said == want


def test_released_models_step_in_the_same_way(kernels: Kernels) -> None:
    torch.manual_seed(0)
    config = Released(
        vocab_size=40, decoder_embed_dim=32, hidden_dim=48, decoder_attention_heads=3, decoder_layers=3,
        glu_dim=64, linear_use_lrpe_list=[1, 0, 1],
    )  # fmt: skip
    model, found = TransNormerForCausalLM(config).double().eval(), []
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    for fused in (True, False):
        for part in model.modules():
            if isinstance(part, SimpleRMSNorm):
                part.fused = fused
        kernels.said.clear()
        with torch.no_grad():
            out = model(ids[:, :4], use_cache=True)
            cache, logits, hidden = out.past_key_values, [], []
            for i in range(4, 9):
                out = model(ids[:, i : i + 1], past_key_values=cache, output_hidden_states=True)
                assert out.past_key_values is cache and cache.columns == i + 1
                assert [tuple(row.shape) for row in out.hidden_states] == [(2, 1, 32)] * 4
                logits.append(out.logits)
                hidden.append(torch.stack(out.hidden_states))
            assert len(kernels.said) == 5 * (3 * 5 * fused + 1)
            assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits[:, 4:])
        found.append((torch.stack(hidden), torch.stack([state.kv for state in cache.states[::2]])))
        assert [state.length.tolist() for state in cache.states] == [[9, 9]] * 3
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other)


def test_under_a_compiler_the_modules_run(model: TransNormerLM, kernels: Kernels) -> None:
    ids, states = torch.tensor([3, 5]), model.initial_states(2)
    torch.compiler.reset()
    got = torch.compile(model.step, backend="eager")(ids, states)
    assert not kernels.said
    assert_close(got, walked(model, ids[:, None])[0][:, 0])
