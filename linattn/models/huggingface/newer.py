"""What newer transformers calls by another name, such as a cache: past_key_values became cache."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from linattn.errors import OptionError

__all__ = ["CACHE", "CHECKPOINTING", "CHECKPOINTS", "cache_given", "cache_of"]

_new = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if _new else "past_key_values"
"""The name among keywords of `generate`, and of what models return."""
_newer = hasattr(PreTrainedModel, "is_activation_checkpointing")
CHECKPOINTING = "activation_checkpointing" if _newer else "gradient_checkpointing"
"""What computing activations twice is called: an argument of Trainer; with _enable, a method of models."""
CHECKPOINTS = f"is_{CHECKPOINTING}"
"""The attribute of a model that says whether it does."""


def cache_given(past_key_values: Any, cache: Any) -> Any:
    """The cache that a call was given by either name. Raises OptionError for both."""
    if cache is None:
        return past_key_values
    if past_key_values is not None:
        raise OptionError("cache and past_key_values are two names of the same: pass one")
    return cache


def cache_of(found: Any) -> Any:
    """The cache in what a model returned."""
    return getattr(found, CACHE)
