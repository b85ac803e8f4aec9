"""Whether the configuration that is saved with a model still makes that model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from linattn.errors import OptionError
from linattn.nn import CosformerAttention, GatedLinearAttention, SimpleRMSNorm

__all__ = ["check_modules"]

# what a configuration decides of modules; what it does not say itself are its modules, and their sizes
DECIDED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.LayerNorm: ("normalized_shape", "eps"),
    SimpleRMSNorm: ("eps",),
    GatedLinearAttention: ("num_heads", "feature_map", "table"),
    CosformerAttention: ("num_heads", "feature_map", "causal", "reweight"),
}
REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
ACTIVATIONS = "torch.nn.modules.activation", "transformers.activations"


def check_modules(model: Any) -> None:
    """Raise OptionError where a model's configuration makes another one than it is.

    Modules of somebody's own, or wrapped, are not asked, nor is a class that takes more than a configuration.
    """
    kind, config = type(model), model.config
    takes = [one for one in inspect.signature(kind).parameters.values() if one.kind not in REST]
    if len(takes) != 1 or takes[0].kind is inspect.Parameter.KEYWORD_ONLY:
        return
    with torch.device("meta"):
        made = kind(type(config).from_dict(config.to_dict()))
    for said in (*_differences(model, made), *_tied(model, made)):
        raise OptionError(f"{said}: what would be loaded is another model")


def _tied(has: Any, made: Any) -> Iterator[str]:
    """What the configuration says of the head's weights and the embedding's, where both are plain."""
    parts = [(one.get_output_embeddings(), one.get_input_embeddings()) for one in (has, made)]
    if any(type(head) is not nn.Linear or type(rows) is not nn.Embedding for head, rows in parts):
        return
    (own, rows), (head, others) = ([part._parameters.get("weight") for part in pair] for pair in parts)
    if type(own) is not nn.Parameter or type(rows) is not nn.Parameter or own.is_meta or not own.numel():
        return  # what DeepSpeed keeps elsewhere is empty here
    if (own.shape, own.dtype, own.device) != (rows.shape, rows.dtype, rows.device):
        return
    if head is not others and own.data_ptr() == rows.data_ptr() != 0:
        yield "the head is the embedding, and the configuration says otherwise"
    elif head is others and own is not rows and not torch.equal(own, rows):
        yield "the head is not the embedding, and the configuration says otherwise"


def _differences(has: nn.Module, made: nn.Module, at: str = "") -> Iterator[str]:
    """What two modules differ in, sizes first. at: where they are, with a dot behind it."""
    if type(has) is not type(made):
        activations = all(type(one).__module__ in ACTIVATIONS for one in (has, made))
        if activations and not _compute_the_same(has, made):
            yield f"{at[:-1]} is {has}, and the configuration makes {made}"
        return
    for option in DECIDED.get(type(has), ()):
        one, other = (_value(module, option) for module in (has, made))
        if not np.array_equal(one, other):
            yield f"{at}{option} is {one}, and the configuration makes {other}"
    own, others = dict(has.named_children()), dict(made.named_children())
    for name in others:
        if name not in own:
            yield f"there is no {at}{name}, and the configuration makes one"
    for name in own:
        if name not in others and (isinstance(made, nn.ModuleList) or hasattr(made, name)):
            yield f"there is {at}{name}, and the configuration makes none"
    for name, child in own.items():
        if name in others:
            yield from _differences(child, others[name], f"{at}{name}.")


def _value(module: nn.Module, option: str) -> Any:
    value = getattr(module, option)
    return "a tensor" if isinstance(value, torch.Tensor) else value


def _compute_the_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two activations are one under two names."""
    if [*one.parameters(), *other.parameters()]:
        return False
    x = torch.linspace(-12, 12, 97, dtype=torch.float64, device="cpu")
    return torch.allclose(type(one).forward(one, x), type(other).forward(other, x))  # past any hooks
