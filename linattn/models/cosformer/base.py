"""What all cosFormer models share: how weights begin and are loaded, embeddings, positions, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from linattn.arrays import readable, traced
from linattn.errors import OptionError, ShapeError, ValueRangeError
from linattn.models.cosformer.block import CosformerBlock
from linattn.models.cosformer.cache import CosformerCache
from linattn.models.cosformer.configuration import CosformerConfig
from linattn.models.huggingface import model
from linattn.models.huggingface.inputs import check_inputs
from linattn.models.huggingface.padding import Padding, padding_of
from linattn.models.ids import check_ids

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["CosformerPreTrainedModel", "CosformerStack", "Rows", "Source"]


# whose tensors may be the same: a stack computes otherwise where tokens see those behind them, too
LOOK_BACK = "CosformerDecoder", "CosformerForCausalLM"
LOOK_BOTH_WAYS = "CosformerModel", "CosformerForMaskedLM", "CosformerForSequenceClassification"


class CosformerPreTrainedModel(model.StateModel):
    """What the models share."""

    config: CosformerConfig
    config_class = CosformerConfig
    cache_class = CosformerCache
    _no_split_modules: ClassVar[list[str]] = ["CosformerBlock"]


@dataclass(frozen=True)
class Rows:
    """Embedded texts, their real tokens in front.

    x: [b, n, e]. positions: [b or 1, n], of each token in its text. lengths: [b], real tokens, or None where
    all are. padding: how to put rows back into the columns they came in. columns: how many those were.
    """

    x: Float[torch.Tensor, "b n e"]
    positions: Int[torch.Tensor, "b n"]
    lengths: Int[torch.Tensor, " b"] | None
    padding: Padding | None
    columns: int

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Return every column's output of an encoder: `Padding.back`."""
        return x if self.padding is None else self.padding.back(x)


@dataclass(frozen=True)
class Source:
    """What a decoder attends to: x [b, m, e], real tokens in front; lengths [b], None where all are real."""

    x: Float[torch.Tensor, "b m e"]
    lengths: Int[torch.Tensor, " b"] | None


class CosformerStack(CosformerPreTrainedModel):
    """Embeddings, blocks and a last norm; what is done with them is the subclasses' business.

    A stack that crosses has no embeddings of its own: its source's stack embeds both texts.
    """

    def __init__(self, config: CosformerConfig, layers: int, causal: bool, crosses: bool) -> None:
        config.check()
        super().__init__(config)
        self.crosses = crosses
        self.embed_tokens = None if crosses else nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embeddings == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(CosformerBlock(config, causal, crosses) for _ in range(layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """The embedding; None where the source's serves."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding in its place."""
        self.embed_tokens = value

    def begin(
        self,
        ids: torch.Tensor | None,
        embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: CosformerCache | None = None,
    ) -> Rows:
        """Return the rows that the first block takes, at the positions where a cache's texts end."""
        x = self.embed(ids, embeds)
        arrived = x.shape[1]
        before, columns, limit = None, 0, self.config.max_position_embeddings
        if cache is not None:
            cache.begin(limit, len(self.layers) if self.crosses else 0)
        if cache is not None and cache.states_for(len(self.layers) * (2 if self.crosses else 1), x.shape[0]):
            before, columns = cache.states[0].length, cache.columns
        begun = None if mask is None or cache is None else cache.begun()
        padding = padding_of(mask, x.shape[0], arrived, begun, columns)
        lengths = None
        if padding is not None:
            x, lengths = _to_front(x, padding), padding.lengths
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if before is not None:
            positions = positions + before.to(x.device)[:, None]
        if columns + x.shape[1] > limit:  # the values are read only where they may be too large
            total = positions[:, -1] + 1 if lengths is None else positions[:, 0] + lengths.to(x.device)
            if not traced() and total.numel() and int(total.max()) > limit:
                raise ValueRangeError(
                    f"a text of {int(total.max())} tokens is longer than max_position_embeddings = {limit}"
                )
            positions = positions.clamp(max=limit - 1)  # what is behind a text's end may lie further
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        return Rows(self.dropout(x), positions, lengths, padding, arrived)

    def blocks(self) -> list[Any]:
        """The blocks, first to last, which somebody may have wrapped or replaced."""
        return list(self.layers)

    def embed(
        self, ids: Int[torch.Tensor, "b n"] | None, embeds: Float[torch.Tensor, "b n e"] | None
    ) -> Float[torch.Tensor, "b n e"]:
        """Return the embeddings of ids, or those given. Raises what `CosformerModel.forward` does."""
        check_inputs(ids, embeds, self.config.hidden_size, self.layers)
        if embeds is not None:
            return embeds
        assert ids is not None
        if self.embed_tokens is None:
            raise OptionError("a decoder with a source takes inputs_embeds: the encoder embeds both texts")
        check_ids(ids, self.embed_tokens, self.config.vocab_size)
        embedded: torch.Tensor = self.embed_tokens(ids)
        return embedded


def source_of(rows: Float[torch.Tensor, "b m e"], mask: torch.Tensor | None, batch: int) -> Source:
    """Return the encoder's rows [b, m, e] as a decoder takes them.

    Raises ShapeError for other masks, and unless there is a source for each of `batch` texts.
    """
    if rows.ndim != 3 or rows.shape[0] != batch:
        raise ShapeError(
            f"there must be a source for each of {batch} texts, encoder_hidden_states are {tuple(rows.shape)}"
        )
    if isinstance(mask, torch.Tensor) and mask.shape != rows.shape[:2]:
        raise ShapeError(
            f"the source's attention_mask must have shape {tuple(rows.shape[:2])}, got {tuple(mask.shape)}"
        )
    padding = padding_of(mask, *rows.shape[:2])
    return Source(rows, None) if padding is None else Source(_to_front(rows, padding), padding.lengths)


def _to_front(x: Float[torch.Tensor, "b m e"], padding: Padding) -> Float[torch.Tensor, "b n e"]:
    """Return rows with their real tokens in front, as long as the longest text."""
    x = padding.to_front(x)
    if traced():
        return x
    return x[:, : max(1, int(padding.lengths.max()))]


def check_options(given: dict[str, Any], config: CosformerConfig) -> None:
    """Raise OptionError for keywords that ask for what these models do not have.

    The values of token_type_ids are read only where they lie on the host.
    """
    model.check_options(given, config)
    for name in ("position_ids", "decoder_position_ids"):
        if given.get(name) is not None:
            raise OptionError(f"{name}: positions count a text's real tokens, the mask says which those are")
    for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx"):
        if given.get(name) is not None:
            raise OptionError(f"{name}: texts back to back are not taken, pass one text a row")
    for name in ("head_mask", "decoder_head_mask", "cross_attn_head_mask"):
        if given.get(name) is not None:
            raise OptionError(f"{name}: no head can be left out of these models")
    kinds = given.get("token_type_ids")  # tokenizers give zeros for single texts
    if isinstance(kinds, torch.Tensor) and readable(kinds) and bool(kinds.any()):
        raise OptionError("token_type_ids must all be 0: these models tell no first text from a second one")
