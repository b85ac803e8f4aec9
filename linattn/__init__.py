"""Linear attention: one specification, and implementations proven equal to it."""

import importlib
from typing import Any

from linattn import decay, errors
from linattn.api import attention, cosformer_attention, lightning_attention
from linattn.decode import decode_step
from linattn.environment import environment
from linattn.registry import available_backends, use_backend
from linattn.reweight import LRPE, Cosine
from linattn.state import State, merge_states
from linattn.vjp import attention_vjp, explain

__version__ = "0.1.0"

__all__ = [
    "LRPE",
    "Cosine",
    "State",
    "attention",
    "attention_vjp",
    "available_backends",
    "cosformer_attention",
    "decay",
    "decode_step",
    "environment",
    "errors",
    "explain",
    "lightning_attention",
    "merge_states",
    "use_backend",
]

_LAZY = ("backends", "models", "nn", "reference", "testing")


def __getattr__(name: str) -> Any:
    """Subpackages on first use, so that `import linattn` stays light."""
    if name in _LAZY:
        return importlib.import_module(f"linattn.{name}")
    raise AttributeError(f"module 'linattn' has no attribute {name!r}")
