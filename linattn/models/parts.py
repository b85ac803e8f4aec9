"""What the kernels of a step take of TransNormer layers, and what a recorded step is of.

A step that is replayed costs the host this look and hardly anything else, and a model has 240 modules. So
they are looked at in columns, the same part of all layers at once, by functions that loop in C.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from linattn import registry
from linattn.nn import SGLU, GatedLinearAttention, Lrpe, SimpleRMSNorm
from linattn.nn.norm import bare, kernels
from linattn.prepared import PLAIN
from linattn.state import State

if TYPE_CHECKING:
    from linattn.models.transnormer_lm import TransNormerLayer

Tensor = torch.Tensor

WRITTEN: dict[type, dict[str, Any]] = {}  # what the kernels' work is derived from: methods of classes


def stands_for(kind: type, *methods: str) -> None:
    """Say that kernels do what methods of a class do: with others in their place, of the class, of one of
    somebody's own or of an object, modules run.
    """
    WRITTEN[kind] = {name: getattr(kind, name) for name in methods}


stands_for(GatedLinearAttention, "step", "project", "options", "split", "decays")
stands_for(SGLU, "forward")
stands_for(SimpleRMSNorm, "forward", "gated")
stands_for(nn.Linear, "forward")
stands_for(Lrpe, "forward")


class Parts(NamedTuple):
    """What the kernels take of layers, a column each."""

    mixers: list[GatedLinearAttention]
    norms: list[SimpleRMSNorm]  # in front of both branches
    gates: list[SimpleRMSNorm]  # the mixers' own
    weights: list[list[Tensor]]  # qkvu, out, l1, l2, l3


def taken(layers: Sequence[TransNormerLayer], x: Tensor) -> Parts | None:
    """The parts of layers, if nothing sees or replaces their calls and the kernels take the weights.

    x: rows [B, E]. What sees every module's calls (`linattn.nn.norm.any_hook`) is for the caller to ask.
    """
    if not all(map(_as_written, {*map(type, layers), *WRITTEN})):
        return None
    # asking modules for their parts by attribute would cost the host more than the rest
    mixers, channels, norms = (_column(layers, name) for name in ("token_mixer", "channel_mixer", "norm"))
    if not (_are(mixers, GatedLinearAttention) and _are(channels, SGLU)):
        return None
    gates = _column(mixers, "norm")
    linears = [_column(mixers, name) for name in ("qkvu_proj", "out_proj")]
    linears += [_column(channels, name) for name in ("l1", "l2", "l3")]
    flat = [*chain.from_iterable(linears)]
    if not (_are([*norms, *gates], SimpleRMSNorm) and _are(flat, nn.Linear)):
        return None
    if not (bare([*layers, *mixers, *channels, *norms, *gates, *flat]) and all(map(_FUSED, norms + gates))):
        return None
    if _replaced(layers, "step") or _replaced([*norms, *gates], "gated"):
        return None
    if _replaced(mixers, *WRITTEN[GatedLinearAttention]):
        return None
    if not all(one._parameters.get("bias", one) is None for one in flat):
        return None
    weights = [[one._parameters.get("weight") for one in column] for column in linears]
    if not kernels("rows").fits(x, *chain.from_iterable(weights)):
        return None
    shapes = [[*map(_SHAPE, column)] for column in weights]
    if not all(_joined(x.shape[1], *found) for found in {*zip(*shapes, strict=True)}):
        return None
    return Parts(mixers, norms, gates, weights)


def facts_of(
    layers: Sequence[TransNormerLayer], states: Sequence[State], x: Tensor
) -> tuple[Hashable, list[Tensor | None]] | None:
    """What decides about the launches of a step, and the layers' decays; None where modules have to run."""
    parts = taken(layers, x)
    if parts is None or len(states) != len(layers):
        return None
    found = [one._modules.get("lrpe", vars(one).get("lrpe")) for one in parts.mixers]  # None is no module
    lrpes = [one for one in found if one is not None]
    if not (_are(lrpes, Lrpe) and bare(lrpes)):
        return None
    angles = [one._parameters.get("theta") for one in lrpes]
    if not {*map(type, angles)} <= {*PLAIN}:
        return None
    decays = [mixer.decays(x.dtype) for mixer in parts.mixers]
    if not {one.dtype for one in decays if one is not None} <= {wide(x)}:
        return None
    weights, kvs, lengths = (
        [*chain.from_iterable(parts.weights)],
        [*map(_KV, states)],
        [*map(_LENGTH, states)],
    )
    if not {*map(type, kvs), *map(type, lengths)} <= {*PLAIN}:
        return None
    return (
        (x.shape, x.dtype, x.device, registry.requested("auto"), torch.is_inference_mode_enabled()),
        (*map(Tensor.data_ptr, weights), *map(_SHAPE, weights)),
        (*map(float, map(_EPS, parts.norms)), *map(float, map(_EPS, parts.gates))),
        (*map(_OF_MIXER, parts.mixers), *(one is None for one in found)),
        _places(angles),
        _places(decays),
        _places(kvs),
        _places([*map(_Z, states)]),
        _places(lengths),
        (*map(_OF_STATE, states), *map(Tensor.is_inference, kvs)),
    ), decays


def steps_as_written(*modules: nn.Module) -> bool:
    """Whether modules take steps as their classes here were written, and not in a way of somebody's own."""
    return all(map(_as_written, map(type, modules))) and not _replaced(modules, "step")


def kind_of_state(state: State) -> Any:
    """What a state is like, its numbers and their addresses apart."""
    return type(state), _OF_STATE(state), *map(_kind, _NUMBERS(state))


def numbers(states: Iterable[State]) -> Iterator[Tensor | None]:
    """What a step writes."""
    return chain.from_iterable(map(_NUMBERS, states))


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(x.dtype, torch.float32)


_SHAPE, _KIND = operator.attrgetter("shape"), operator.attrgetter("dtype", "shape")
_FUSED, _EPS = operator.attrgetter("fused"), operator.attrgetter("eps")
_OF_MIXER = operator.attrgetter("num_heads", "feature_map")
_OF_STATE = operator.attrgetter("feature_map", "reweight", "d")
_KV, _Z, _LENGTH = (operator.attrgetter(name) for name in ("kv", "z", "length"))
_NUMBERS = operator.attrgetter("kv", "z", "length")


def _kind(x: Any) -> Any:
    return (type(x), x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) else type(x)


def _column(modules: Iterable[nn.Module], name: str) -> list[Any]:
    return [one._modules.get(name) for one in modules]


def _replaced(modules: Iterable[nn.Module], *methods: str) -> bool:
    return any(name in one.__dict__ for one in modules for name in methods)


def _are(modules: Iterable[Any], kind: type) -> bool:
    return {*map(type, modules)} <= {kind}


def _places(tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """Where tensors lie and what they are; which of them are none."""
    some = [x for x in tensors if x is not None]
    return (
        *(x is None for x in tensors),
        *map(Tensor.data_ptr, some), *map(_KIND, some), *map(Tensor.stride, some), *map(Tensor.is_neg, some),
    )  # fmt: skip


def _joined(width: int, qkvu: Any, out: Any, l1: Any, l2: Any, l3: Any) -> bool:
    """Whether matrices follow each other, on rows of this width; where they do not, modules say so."""
    f, e = qkvu
    return bool(e == width and out == (e, f // 4) and l1 == l2 == (l1[0], e) and l3 == (e, l1[0]))


def _as_written(kind: type) -> bool:
    """Whether a class, maybe one of somebody's own, has the methods that the kernels stand for."""
    return all(
        getattr(kind, name) is method
        for known, methods in WRITTEN.items() if issubclass(kind, known)
        for name, method in methods.items()
    )  # fmt: skip
