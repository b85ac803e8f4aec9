"""What a recorded step is of: every one of these makes it another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import linattn
from linattn.models import TransNormerLM, parts
from tests.models.stepping import Kernels


@pytest.fixture
def step(model: TransNormerLM, kernels: Kernels) -> tuple[list[Any], list[Any], torch.Tensor]:
    """Layers, states and rows of a step that the kernels take."""
    return model._layers(), model.initial_states(2), torch.randn(2, 32, dtype=torch.float64)


def changes() -> dict[str, Any]:
    """What may happen to a model and its states between two steps, and every one of which a graph is of."""

    def weight(name: str) -> Any:
        def change(layer: Any, state: Any) -> None:
            linear = layer.get_submodule(name)
            linear.weight = nn.Parameter(linear.weight.detach().clone())

        return change

    def narrower(layer: Any, state: Any) -> None:  # where the wider ones lay
        for name in ("l1", "l2"):
            linear = getattr(layer.channel_mixer, name)
            linear.weight.data = linear.weight.data[:16]
        layer.channel_mixer.l3.weight.data = torch.as_strided(
            layer.channel_mixer.l3.weight.data, (32, 16), (16, 1)
        )

    def spread(layer: Any, state: Any) -> None:  # the same beginning
        theta = layer.token_mixer.lrpe.theta
        theta.data = torch.as_strided(theta.data, theta.shape, (0, 0, 1))

    def fewer(layer: Any, state: Any) -> None:
        state.kv = state.kv[:1]

    def normalized(layer: Any, state: Any) -> None:
        state.z = state.kv[..., 0]

    def turned(layer: Any, state: Any) -> None:
        state.kv = torch._neg_view(state.kv)

    def sets(find: Any, name: str, value: Any) -> Any:
        return lambda layer, state: setattr(find(layer, state), name, value)

    def moved(name: str) -> Any:
        return lambda layer, state: setattr(state, name, getattr(state, name).clone())

    def data(layer: Any, state: Any) -> None:
        layer.channel_mixer.l1.weight.data = layer.channel_mixer.l1.weight.data.clone()

    def decays(layer: Any, state: Any) -> None:
        layer.token_mixer.log_decay_bits = layer.token_mixer.log_decay_bits.clone()

    def angles(layer: Any, state: Any) -> None:
        layer.token_mixer.lrpe.theta = nn.Parameter(layer.token_mixer.lrpe.theta.detach().clone())

    def mirrored(layer: Any, state: Any) -> None:
        theta = layer.token_mixer.lrpe.theta
        theta.data = torch._neg_view(theta.data)

    def rounded(layer: Any, state: Any) -> None:  # where the others lie
        theta = layer.token_mixer.lrpe.theta
        theta.data = theta.data.view(torch.float32)[..., ::2]

    return {
        **{name: weight(name) for name in (
            "token_mixer.qkvu_proj", "token_mixer.out_proj", "channel_mixer.l1", "channel_mixer.l2",
            "channel_mixer.l3",
        )},
        "data": data, "shapes": narrower, "decays": decays, "angles": angles,
        "angles' dtype": rounded, "angles' sign": mirrored,
        "angles' strides": spread, "rows": fewer, "z": normalized, "sign": turned,
        "eps": sets(lambda layer, state: layer.norm, "eps", 1e-3),
        "gate's eps": sets(lambda layer, state: layer.token_mixer.norm, "eps", 1e-3),
        "feature map": sets(lambda layer, state: layer.token_mixer, "feature_map", "elu"),
        "heads": sets(lambda layer, state: layer.token_mixer, "num_heads", 1),
        "state's dtype": lambda layer, state: setattr(state, "kv", state.kv.view(torch.int64)),
        "state": moved("kv"), "length": moved("length"),
        "state's feature map": sets(lambda layer, state: state, "feature_map", None),
        "state's d": sets(lambda layer, state: state, "d", None),
        "state's reweighting": sets(lambda layer, state: state, "reweight", None),
    }  # fmt: skip


def test_a_graph_is_of_what_is_where(step: tuple[list[Any], list[Any], torch.Tensor]) -> None:
    layers, states, x = step
    states[0].z = states[0].kv[..., 0]
    with torch.no_grad():
        found = [parts.facts_of(layers, states, x)]
        states[0].z, states[1].z = None, states[0].z
        found.append(parts.facts_of(layers, states, x))
        mixers = [layer.token_mixer for layer in layers]
        mixers[1].lrpe, mixers[0].lrpe = mixers[0].lrpe, None
        found.append(parts.facts_of(layers, states, x))
    assert len({facts[0] for facts in found if facts is not None}) == 3


def test_a_graph_is_of_states_of_a_mode(step: tuple[list[Any], list[Any], torch.Tensor]) -> None:
    layers, states, x = step
    memory = states[0].kv.numpy()
    with torch.no_grad():
        before = parts.facts_of(layers, states, x)
        with torch.inference_mode():
            states[0].kv = torch.from_numpy(memory)
        after = parts.facts_of(layers, states, x)
    assert before is not None and after is not None and before[0] != after[0]


@pytest.mark.parametrize("name", changes())
@pytest.mark.parametrize("where", [0, 2])
def test_a_graph_is_of_what_it_was_recorded_from(
    step: tuple[list[Any], list[Any], torch.Tensor],
    name: str,
    where: int,
) -> None:
    layers, states, x = step
    with torch.no_grad():
        before = parts.facts_of(layers, states, x)
        assert before is not None and before[0] == parts.facts_of(layers, states, x)[0]
        changes()[name](layers[where], states[where])
        after = parts.facts_of(layers, states, x)
    assert after is not None and after[0] != before[0]


def test_a_graph_is_of_rows_a_dtype_a_mode_and_a_backend(
    step: tuple[list[Any], list[Any], torch.Tensor],
) -> None:
    layers, states, x = step
    with torch.no_grad():
        found = [parts.facts_of(layers, states, x), parts.facts_of(layers, states, x[:1])]
        found.append(parts.facts_of(layers[:2], states[:2], x))
        with linattn.use_backend("torch"):
            found.append(parts.facts_of(layers, states, x))
        with torch.inference_mode():
            found.append(parts.facts_of(layers, states, x))
        found += [parts.facts_of([], [], other) for other in (x, x.half(), x.to("meta"))]
    assert len({facts[0] for facts in found if facts is not None}) == len(found) == 8
