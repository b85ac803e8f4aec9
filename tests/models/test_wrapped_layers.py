"""Generation by models whose layers a compiler wrapped, hooks watch, or somebody replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linattn.errors import OptionError
from linattn.models import TransNormerLM
from linattn.models.cosformer import CosformerForCausalLM, CosformerForConditionalGeneration
from linattn.models.transnormer_lm import TransNormerLayer, compiled_of, steppers
from linattn.nn import GatedLinearAttention
from tests.models import test_cosformer
from tests.models.test_transnormer import GREEDY, greedy, make, text
from tests.models.test_transnormer_lm import BASE
from tests.models.test_transnormer_lm import make as make_plain


def compiled(module):
    torch.compiler.reset()
    return torch.compile(module, backend="eager")


def generated(model):
    return model.generate(text(2, 7), generation_config=GREEDY)


@pytest.mark.parametrize("which", [[0], [1], [0, 1, 2]])
def test_compiled_layers_take_their_own_steps(which):
    model, (plain, _) = make(), make_plain(BASE)
    want, ids = greedy(model, text(2, 7), 6), text(2, 5, seed=1) % BASE.vocab_size
    with torch.no_grad():
        states = plain.initial_states(2)
        steps = [plain.step(column, states) for column in ids.T]
    for i in which:
        layer = model.model.layers[i]
        model.model.layers[i] = compiled(layer)
        assert steppers([model.model.layers[i]]) == [layer]  # which kernels may take
        plain.layers[i] = compiled(plain.layers[i])
        assert isinstance(compiled_of(plain.layers[i]), TransNormerLayer)
    assert torch.equal(generated(model), want)
    with torch.no_grad():
        states = plain.initial_states(2)
        for column, logits in zip(ids.T, steps, strict=True):
            assert torch.equal(plain.step(column, states), logits)


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        lambda model: setattr(model, "model", compiled(model.model)) or model,
        lambda model: setattr(model, "forward", compiled(model.forward)) or model,
        lambda model: model.compile(backend="eager") or model,
        lambda model: [layer.compile(backend="eager") for layer in model.model.layers] and model,
        lambda model: (
            setattr(model.model.layers[1], "token_mixer", compiled(model.model.layers[1].token_mixer))
            or model
        ),
    ],
    ids=["model", "inner model", "forward", "in place", "layers in place", "mixer"],
)
def test_compiled_models_generate(wrap):
    model = make()
    want = greedy(model, text(2, 7), 6)
    torch.compiler.reset()
    assert torch.equal(generated(wrap(model)), want)


def halved(module, given, out):
    return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2


@pytest.mark.parametrize("part", ["layer", "mixer", "compiled layer"])
def test_hooks_see_every_generated_token(part):
    model, seen = make(), []
    ids, plainly = text(2, 7), generated(model)
    if part == "compiled layer":
        model.model.layers[1] = compiled(model.model.layers[1])
    layer = model.model.layers[1]
    watched = layer.token_mixer if part == "mixer" else layer
    handle = watched.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    assert torch.equal(generated(model), plainly) and seen == [7, 1, 1, 1, 1, 1]
    handle.remove()
    assert steppers([layer]) == [compiled_of(layer)]
    watched.register_forward_hook(halved)
    steered = generated(model)
    assert torch.equal(steered, greedy(model, ids, 6)) and not torch.equal(steered, plainly)


class Around(nn.Module):
    """A layer's output backwards."""

    def __init__(self, layer):
        super().__init__()
        self.inside = layer

    def forward(self, *arguments):
        x, state = self.inside(*arguments)
        return x.flip(-1), state


class Backwards(TransNormerLayer):
    """The same as a layer of its own class, which says nothing of steps."""

    def forward(self, *arguments):
        x, state = super().forward(*arguments)
        return x.flip(-1), state


def test_layers_of_ones_own_are_called():
    for place in (0, 2):
        model = make()
        plainly, layer = generated(model), model.model.layers[place]
        model.model.layers[place] = Around(layer)
        want = greedy(model, text(2, 7), 6)
        assert torch.equal(generated(model), want) and not torch.equal(want, plainly)
        model.model.layers[place] = layer
        layer.__class__ = Backwards
        assert torch.equal(generated(model), want)


class Louder(GatedLinearAttention):
    """A token mixer with another output, which says nothing of steps."""

    def forward(self, *arguments, **options):
        out = super().forward(*arguments, **options)
        return (1.5 * out[0], out[1]) if isinstance(out, tuple) else 1.5 * out


class Stepping(Louder):
    """The same with a step to it."""

    def step(self, *arguments, **options):
        return 1.5 * super().step(*arguments, **options)


class Louder2(Stepping):
    """Another forward, to which the step does not belong."""

    def forward(self, *arguments, **options):
        return Louder.forward(self, *arguments, **options)


@pytest.mark.parametrize("kind", [Louder, Stepping, Louder2])
def test_token_mixers_of_ones_own_are_called(kind):
    model = make()
    plainly, layer = generated(model), model.model.layers[1]
    layer.token_mixer.__class__ = kind
    assert (steppers([layer]) is None) == (kind is not Stepping)
    want = greedy(model, text(2, 7), 6)
    assert torch.equal(generated(model), want) and not torch.equal(want, plainly)
    if kind is Louder:
        torch.compiler.reset()
        assert torch.equal(generated(torch.compile(model, backend="eager")), want)


def test_token_mixers_that_take_no_steps_are_called():
    model = make()
    layer = model.model.layers[1]
    layer.token_mixer = Mixing(layer.token_mixer)
    assert torch.equal(generated(model), greedy(model, text(2, 7), 6))


class Mixing(nn.Module):
    """A token mixer that somebody wrapped."""

    def __init__(self, mixer):
        super().__init__()
        self.inside = mixer

    def forward(self, x, **options):
        return self.inside(x, **options)


def test_plain_steps_of_a_forward_of_ones_own_are_refused():
    model, _ = make_plain(BASE)
    ids, states = torch.tensor([1]), model.initial_states(1)
    model.layers[1].token_mixer.__class__ = Stepping
    model.step(ids, states)
    model.layers[1].token_mixer.__class__ = Louder
    with pytest.raises(
        OptionError, match=r"forward of its own needs a step .* TransNormerLayer with a Louder"
    ):
        model.step(ids, states)
    model, _ = make_plain(BASE)
    model.layers[0].__class__ = Backwards
    with pytest.raises(OptionError, match="Backwards with a GatedLinearAttention"):
        model.step(ids, states)


def test_steps_of_what_is_no_layer_are_refused():
    model = TransNormerLM(BASE)
    model.layers[1] = Around(model.layers[1])
    with pytest.raises(OptionError, match="must be TransNormerLayers, got a Around"):
        model.initial_states(1)


@pytest.mark.parametrize("kind", [CosformerForCausalLM, CosformerForConditionalGeneration])
@pytest.mark.parametrize("part", ["layer", "compiled layer"])
def test_no_layer_of_a_cosformer_is_passed_over(kind, part):
    model, seen = test_cosformer.build(kind), []
    ids, layers = test_cosformer.text(2, 5), model.get_decoder().layers
    plainly = model.generate(ids, max_new_tokens=6, do_sample=False)
    if part == "compiled layer":
        layers[1] = compiled(layers[1])
    handle = layers[1].register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plainly)
    assert len(seen) == 6 and seen[1:] == [1] * 5
    handle.remove()
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plainly)


def test_layers_of_ones_own_are_called_in_a_cosformer():
    model, ids = test_cosformer.build(CosformerForCausalLM), test_cosformer.text(2, 5)
    plainly = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.get_decoder().layers[1] = Around(model.get_decoder().layers[1])
    changed, whole = (
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert torch.equal(changed, whole) and not torch.equal(changed, plainly)
