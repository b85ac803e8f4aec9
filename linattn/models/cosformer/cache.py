"""What a cosFormer decoder remembers: a state a layer, and one more of the source in an encoder-decoder."""

from __future__ import annotations

from linattn.models.huggingface.cache import StateCache

__all__ = ["CosformerCache"]


class CosformerCache(StateCache):
    """The `past_key_values` of cosFormer models.

    states: one `linattn.State` for each layer's own text, then, in an encoder-decoder, one for each layer's
    view of the source, which never changes.
    """
