"""What a cosFormer decoder remembers: a state a layer, and one more of the source in an encoder-decoder."""

from __future__ import annotations

from linattn.models.transnormer.cache import TransNormerCache

__all__ = ["CosformerCache"]


class CosformerCache(TransNormerCache):
    """The `past_key_values` of cosFormer models, of a size that does not depend on any length.

    states: one `linattn.State` for each layer's own text, then, in an encoder-decoder, one for each layer's
    view of the source, which never changes. Everything else is as in `TransNormerCache`.
    """

    def __repr__(self) -> str:
        return f"CosformerCache(states={len(self.states)}, columns={self.columns}, bytes={self.nbytes})"
