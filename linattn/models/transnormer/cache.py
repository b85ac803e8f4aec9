"""What a TransNormerLLM remembers."""

from __future__ import annotations

from linattn.models.huggingface.cache import StateCache

__all__ = ["TransNormerCache"]


class TransNormerCache(StateCache):
    """The `past_key_values` of TransNormer models: one `linattn.State` a layer."""
