"""What a cosFormer decoder remembers: a state a layer, and one more of the source in an encoder-decoder."""

from __future__ import annotations

from linattn.errors import StateError
from linattn.models.huggingface.cache import StateCache

__all__ = ["CosformerCache"]


class CosformerCache(StateCache):
    """The `past_key_values` of cosFormer models.

    states: one `linattn.State` for each layer's own text, then, in an encoder-decoder, one for each layer's
    view of the source, which never changes.
    max_len: max_position_embeddings of the model that began them, the cosine's M; memories: how many states
    are of a source. Both are 0 before the first call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.max_len = 0
        self.memories = 0

    def begin(self, max_len: int, memories: int = 0) -> None:
        """Take the M of a model that is about to read more, and how many layers attend to a source.

        Raises StateError where another model has begun: angles are part of what states add up, and the
        number of all states does not say which are of a source.
        """
        if self.states and self.max_len != max_len:
            raise StateError(
                f"past_key_values were begun with max_position_embeddings = {self.max_len}, this model has "
                f"{max_len}"
            )
        if self.states and self.memories != memories:
            raise StateError(
                f"past_key_values hold {self.memories} states of a source, this model has {memories}: they "
                "are of another model"
            )
        self.max_len, self.memories = max_len, memories
