"""The cosFormer encoder-decoder: a text in, another text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from linattn.errors import OptionError
from linattn.models.cosformer.base import CosformerPreTrainedModel
from linattn.models.cosformer.cache import CosformerCache
from linattn.models.cosformer.configuration import CosformerConfig
from linattn.models.cosformer.decoder import CosformerDecoder
from linattn.models.cosformer.modeling import CosformerModel
from linattn.models.huggingface.labels import check_labels
from linattn.models.huggingface.model import StateExpansion, check_unseen, named
from linattn.models.huggingface.newer import CACHE, cache_given, cache_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["CosformerForConditionalGeneration"]


class CosformerForConditionalGeneration(CosformerPreTrainedModel, StateExpansion, GenerationMixin):
    """An encoder, a decoder that attends to its rows, and a head without bias.

    `generate` goes greedily, samples and keeps beams; what is kept of the source is a state a layer, so a
    step's time and memory depend on neither text's length.
    Raises OptionError unless the configuration's num_decoder_layers is at least 1.
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "encoder.embed_tokens.weight",
    }

    def __init__(self, config: CosformerConfig) -> None:
        super().__init__(config)
        if not config.num_decoder_layers:
            raise OptionError("num_decoder_layers must be at least 1 for an encoder-decoder, got 0")
        self.encoder = CosformerModel(config)
        self.decoder = CosformerDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # labels are not shifted: the decoder's input is
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """The embedding of both texts."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding in its place."""
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b m"] | None = None,
        attention_mask: Int[torch.Tensor, "b m"] | None = None,
        decoder_input_ids: Int[torch.Tensor, "b n"] | None = None,
        decoder_attention_mask: Int[torch.Tensor, "b k"] | None = None,
        encoder_outputs: Any = None,
        past_key_values: CosformerCache | None = None,
        inputs_embeds: Float[torch.Tensor, "b m e"] | None = None,
        decoder_inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        labels: Int[torch.Tensor, "b n"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: CosformerCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return Seq2SeqLMOutput: logits [b, n, vocab_size], the loss where labels are given.

        input_ids, attention_mask, inputs_embeds: the source's; encoder_outputs: what the encoder gave, in
        their place. labels: the ids that each column of the decoder is to give, -100 where nothing is asked;
        without decoder_input_ids those are the labels, one later. The rest: `CosformerDecoder.forward`.
        """
        past_key_values = cache_given(past_key_values, cache)
        labels = check_labels(
            labels, decoder_input_ids, decoder_inputs_embeds, self.config.vocab_size, kwargs
        )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds, output_hidden_states, True, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = _outputs_of(encoder_outputs)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise OptionError(
                "pass either decoder_input_ids or decoder_inputs_embeds, one of them, or labels"
            )
        embeds = self.encoder.embed(decoder_input_ids, decoder_inputs_embeds)
        found = self.decoder(
            None, decoder_attention_mask, past_key_values, embeds, use_cache,
            encoder_outputs.last_hidden_state, attention_mask, output_hidden_states, True, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(found.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        answer = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: cache_of(found)},
            decoder_hidden_states=found.hidden_states,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
        )
        return answer if named(return_dict, self.config) else answer.to_tuple()

    def prepare_decoder_input_ids_from_labels(
        self, labels: Int[torch.Tensor, "b n"]
    ) -> Int[torch.Tensor, "b n"]:
        """Return the labels one column later, after decoder_start_token_id; those below 0 become padding.

        Raises OptionError where the configuration has no decoder_start_token_id or no pad_token_id.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise OptionError(
                "labels alone need decoder_start_token_id and pad_token_id in the configuration"
            )
        first = labels.new_full((labels.shape[0], 1), start)
        return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] < 0, pad)], 1)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """What transformers prepares; after the first call no decoder mask, as all that is new is real.

        Of a text that a cache has seen the beginning of, what is new: transformers sees to that only where
        there is a decoder mask. Raises StateError where nothing is new.
        """
        cache, mask = kwargs.get(CACHE), kwargs.get("decoder_attention_mask")
        if kwargs.get("is_first_iteration") and cache is not None and mask is None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        check_unseen(cache, kwargs.get("next_sequence_length"))
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("use_cache") and not kwargs.get("is_first_iteration"):
            inputs["decoder_attention_mask"] = None
        return inputs


def _outputs_of(given: Any) -> BaseModelOutput:
    """What an encoder gave, with names or as a tuple. Raises OptionError where its rows are not in it."""
    if isinstance(given, Mapping):
        rows, hidden = given.get("last_hidden_state"), given.get("hidden_states")
    else:
        rows, hidden = (*(given if isinstance(given, tuple | list) else ()), None, None)[:2]
    if not isinstance(rows, torch.Tensor):
        raise OptionError("encoder_outputs must have last_hidden_state, by that name or first of a tuple")
    return BaseModelOutput(last_hidden_state=rows, hidden_states=hidden)
