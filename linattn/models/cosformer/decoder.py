"""The causal cosFormer: a stack that remembers in states, and a language model of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from linattn.arrays import traced
from linattn.errors import OptionError
from linattn.models.cosformer.base import (
    LOOK_BOTH_WAYS,
    CosformerPreTrainedModel,
    CosformerStack,
    Rows,
    Source,
    check_options,
    source_of,
)
from linattn.models.cosformer.block import CosformerBlock
from linattn.models.cosformer.cache import CosformerCache
from linattn.models.cosformer.configuration import CosformerConfig
from linattn.models.huggingface.inputs import check_dtype, columns_of
from linattn.models.huggingface.labels import asked, check_labels
from linattn.models.huggingface.model import StateGeneration, named
from linattn.models.huggingface.newer import CACHE, cache_given, cache_of
from linattn.nn import CosformerAttention
from linattn.nn.norm import unseen
from linattn.state import State

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["CosformerDecoder", "CosformerForCausalLM"]


class CosformerDecoder(CosformerStack):
    """Token ids in, normed rows out, each of what is before it; with decoder layers, of a source as well.

    Blocks as `CosformerModel`'s, causal; of an encoder-decoder (num_decoder_layers above 0) each also attends
    to all of the source, with the cosine of both positions' difference, counted from each text's beginning,
    and the text comes as inputs_embeds, as the encoder's embedding is for both.
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791.
    """

    base_model_prefix = "decoder"
    _unlike = LOOK_BOTH_WAYS
    _left_out = (r"^lm_head\.weight$",)

    def __init__(self, config: CosformerConfig) -> None:
        crosses = config.num_decoder_layers > 0
        layers = config.num_decoder_layers if crosses else config.num_hidden_layers
        super().__init__(config, layers, causal=True, crosses=crosses)

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b n"] | None = None,
        attention_mask: Int[torch.Tensor, "b k"] | None = None,
        past_key_values: CosformerCache | None = None,
        inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: Float[torch.Tensor, "b m e"] | None = None,
        encoder_attention_mask: Int[torch.Tensor, "b m"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: CosformerCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return BaseModelOutputWithPast, or a tuple without return_dict.

        attention_mask: 0 for padding, wherever it is: such a token leaves no trace, and has the output of the
        last real token before it, zeros where there is none; of a mask longer than the input its end counts.
        past_key_values: continues a text, by any number of tokens; what it remembers of the source counts,
        not encoder_hidden_states. encoder_attention_mask: 0 for the source's padding. cache: past_key_values,
        as newer transformers calls them.

        Raises OptionError where a source is missing or not taken, ShapeError unless there is one for every
        text, StateError for a cache of other texts or another model, and what
        `CosformerModel.forward` raises.
        """
        past_key_values = cache_given(past_key_values, cache)
        check_options(kwargs, self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = self._cache(past_key_values, use_cache)
        rows = self.begin(input_ids, inputs_embeds, attention_mask, cache)
        if cache is not None:
            cache.check_seen(attention_mask, rows.columns)
        known = cache is not None and bool(cache.states)
        if self.crosses and not known and encoder_hidden_states is None:
            raise OptionError("a decoder with num_decoder_layers above 0 needs encoder_hidden_states")
        if not self.crosses and encoder_hidden_states is not None:
            raise OptionError("encoder_hidden_states are for models with num_decoder_layers above 0")
        source = None
        if encoder_hidden_states is not None and not known:
            source = source_of(encoder_hidden_states, encoder_attention_mask, rows.x.shape[0])
            check_dtype("encoder_hidden_states", source.x, self.layers)
        count = len(self.layers) + 1 if output_hidden_states else 1
        before = [None] * count if cache is None else cache.before(count, rows.padding)
        seen = [rows.x]
        for x in self._run(rows, source, cache):
            seen = [*seen, x] if output_hidden_states else [x]
        seen[-1] = self.norm(seen[-1])
        back = tuple(seen)
        if rows.padding is not None:
            back = tuple(map(rows.padding.after, seen, before))
        if cache is not None:
            cache.keep(back)
        found = BaseModelOutputWithPast(
            last_hidden_state=back[-1],
            **{CACHE: cache},
            hidden_states=back if output_hidden_states else None,
        )
        return found if named(return_dict, self.config) else found.to_tuple()

    def _run(self, rows: Rows, source: Source | None, cache: CosformerCache | None) -> Iterator[torch.Tensor]:
        """Yield what each block gives; the cache is brought up to date once all have."""
        x, blocks = rows.x, self.blocks()
        states: list[State | None] = [None] * len(blocks)
        memories: list[State | None] = [None] * len(blocks)
        if cache is not None and cache.states:
            states = [*cache.states[: len(blocks)]]
            memories = [*(cache.states[len(blocks) :] or memories)]
        stepping = x.shape[1] == 1 and rows.lengths is None and not torch.is_grad_enabled()
        in_place = [stepping and _steps(block) for block in blocks]
        for block, state, memory, moves in zip(blocks, states, memories, in_place, strict=True):
            if moves and state is not None and not traced():  # while none has moved yet
                block.check_states(x, state, memory)
        after: list[State] = []
        kept: list[State] = []
        for block, state, memory, moves in zip(blocks, states, memories, in_place, strict=True):
            if moves and state is not None:
                x, seen = block.step(x[:, 0], state, memory, rows.positions)[:, None], memory
            else:
                x, state, *found = block(
                    x, rows.lengths, state, cache is not None,
                    None if source is None else source.x, None if source is None else source.lengths,
                    memory, rows.positions,
                )  # fmt: skip
                seen = found[0] if found else None
            after += [] if state is None else [state]
            kept += [] if seen is None else [seen]
            yield x
        if cache is not None:
            cache.states = [*after, *kept]
            cache.columns += rows.columns


def _steps(block: nn.Module) -> bool:
    """Whether a block's step does what calling it with one token would: nothing sees its calls."""
    return (
        type(block) is CosformerBlock
        and type(block.attention) is CosformerAttention
        and unseen(block, block.attention)
    )


class CosformerForCausalLM(CosformerPreTrainedModel, StateGeneration, GenerationMixin):
    """A causal cosFormer and a head without bias: logits of the next token, a loss where labels are given.

    `generate` goes greedily, samples and keeps beams, with padding on either side, and continues a
    `CosformerCache` by any number of tokens, up to max_position_embeddings in all.
    Raises OptionError for a configuration of an encoder-decoder.
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791.
    """

    base_model_prefix = "decoder"
    _unlike = LOOK_BOTH_WAYS
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: CosformerConfig) -> None:
        super().__init__(config)
        if config.num_decoder_layers:
            raise OptionError(
                f"num_decoder_layers must be 0 for a causal model, got {config.num_decoder_layers}; its "
                "layers are num_hidden_layers, an encoder-decoder is CosformerForConditionalGeneration"
            )
        self.decoder = CosformerDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b n"] | None = None,
        attention_mask: Int[torch.Tensor, "b k"] | None = None,
        past_key_values: CosformerCache | None = None,
        inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        labels: Int[torch.Tensor, "b n"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = 0,
        cache: CosformerCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return CausalLMOutputWithPast: logits [b, n, vocab_size], and what the decoder returns.

        labels: the ids themselves, shifted inside; -100 where nothing is asked. logits_to_keep: logits of the
        last so many columns only, or of these; 0 or None for all, which labels ask for. Everything else:
        `CosformerDecoder.forward`.
        """
        past_key_values, columns = cache_given(past_key_values, cache), columns_of(logits_to_keep)
        labels = check_labels(
            labels, input_ids, inputs_embeds, self.config.vocab_size, kwargs, logits_to_keep
        )
        found = self.decoder(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache,
            output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(found.last_hidden_state[:, columns])
        loss = None
        if labels is not None:
            labels, kwargs = asked(labels, attention_mask, None, kwargs)
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        answer = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=found.hidden_states, **{CACHE: cache_of(found)}
        )
        return answer if named(return_dict, self.config) else answer.to_tuple()
