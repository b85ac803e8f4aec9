"""The cosFormer encoder, and what is learned with it: hidden tokens, classes of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput

from linattn.errors import ShapeError, ValueRangeError
from linattn.models.cosformer.base import LOOK_BACK, CosformerPreTrainedModel, CosformerStack, check_options
from linattn.models.cosformer.configuration import CosformerConfig
from linattn.models.cosformer.labels import check_classes
from linattn.models.huggingface.labels import check_labels
from linattn.models.huggingface.model import named

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["CosformerForMaskedLM", "CosformerForSequenceClassification", "CosformerModel"]


class CosformerModel(CosformerStack):
    """Token ids in, the encoder's normed rows out; every token sees every other, linear in the length.

    x = Emb[ids] + Pos; per block x += attention(LN(x)), x += MLP(LN(x)); out = LN(x).
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791.
    """

    base_model_prefix = "encoder"
    _unlike = LOOK_BACK
    _left_out = (r"^lm_head\.weight$", r"^classifier\.(weight|bias)$")

    def __init__(self, config: CosformerConfig) -> None:
        super().__init__(config, config.num_hidden_layers, causal=False, crosses=False)

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b n"] | None = None,
        attention_mask: Int[torch.Tensor, "b n"] | None = None,
        inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return BaseModelOutput, last_hidden_state [b, n, hidden_size], or a tuple without return_dict.

        attention_mask: 0 for padding, wherever it is: real tokens are computed as if it was not there,
        their positions too; a column of padding has the output of the last real token before it (of the
        first, where there is none). inputs_embeds: instead of ids, before positions are added.

        Raises ArgumentTypeError, ShapeError, DtypeError or ValueRangeError for bad ids and masks,
        ValueRangeError for texts above max_position_embeddings, OptionError for output_attentions,
        position_ids, seq_idx, masks of heads, token_type_ids that are not 0 (on the host), and keywords of
        `linattn.attention`.
        """
        check_options(kwargs, self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        rows = self.begin(input_ids, inputs_embeds, attention_mask)
        x, seen = rows.x, [rows.x]
        for layer in self.layers:
            x = layer(x, rows.lengths)[0]
            seen = [*seen, x] if output_hidden_states else [x]
        seen[-1] = self.norm(seen[-1])
        back = tuple(map(rows.back, seen))
        found = BaseModelOutput(
            last_hidden_state=back[-1], hidden_states=back if output_hidden_states else None
        )
        return found if named(return_dict, self.config) else found.to_tuple()


class CosformerForMaskedLM(CosformerPreTrainedModel):
    """A CosformerModel and a head without bias: logits of the tokens that are hidden.

    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791.
    """

    base_model_prefix = "encoder"
    _unlike = LOOK_BACK
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "encoder.embed_tokens.weight"}
    _left_out = (r"^classifier\.(weight|bias)$",)
    _new_heads = ("lm_head.",)

    def __init__(self, config: CosformerConfig) -> None:
        super().__init__(config)
        self.encoder = CosformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b n"] | None = None,
        attention_mask: Int[torch.Tensor, "b n"] | None = None,
        inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        labels: Int[torch.Tensor, "b n"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return MaskedLMOutput: logits [b, n, vocab_size], the loss where labels are given.

        labels: the ids in each column, -100 where nothing is asked. The rest: `CosformerModel.forward`.
        """
        labels = check_labels(labels, input_ids, inputs_embeds, self.config.vocab_size, kwargs)
        found = self.encoder(input_ids, attention_mask, inputs_embeds, output_hidden_states, True, **kwargs)
        logits = self.lm_head(found.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        answer = MaskedLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return answer if named(return_dict, self.config) else answer.to_tuple()


class CosformerForSequenceClassification(CosformerPreTrainedModel):
    """A CosformerModel and a linear classifier of each text's first real token.

    The loss is by config.problem_type: regression, one class of several, or several at once.
    Raises ValueRangeError unless num_labels is at least 1.
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791.
    """

    base_model_prefix = "encoder"
    _unlike = LOOK_BACK
    _left_out = (r"^lm_head\.weight$",)
    _new_heads = ("classifier.",)

    def __init__(self, config: CosformerConfig) -> None:
        super().__init__(config)
        if config.num_labels < 1:
            raise ValueRangeError(f"num_labels must be at least 1, got {config.num_labels}")
        self.encoder = CosformerModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Int[torch.Tensor, "b n"] | None = None,
        attention_mask: Int[torch.Tensor, "b n"] | None = None,
        inputs_embeds: Float[torch.Tensor, "b n e"] | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return SequenceClassifierOutput: logits [b, num_labels], the loss where labels are given.

        labels: by config.problem_type, [b] of classes, [b, num_labels] of 0 to 1, or of numbers ([b], too, of
        one). Everything else: `CosformerModel.forward`.

        Raises ArgumentTypeError, DtypeError, ShapeError or, on the host, ValueRangeError for other labels.
        """
        labels = check_classes(labels, input_ids, inputs_embeds, self.config, kwargs)
        found = self.encoder(input_ids, attention_mask, inputs_embeds, output_hidden_states, True, **kwargs)
        if not found.last_hidden_state.shape[1]:
            raise ShapeError("a text to classify must have at least one token, got none")
        first = found.last_hidden_state[:, 0]  # of padding in front too: it has the first real token's output
        logits = self.classifier(self.dropout(first))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        answer = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return answer if named(return_dict, self.config) else answer.to_tuple()
