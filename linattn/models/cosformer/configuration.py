"""What a cosFormer model is made of."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from linattn.errors import OptionError, ValueRangeError
from linattn.models.fields import (
    check_choice,
    check_flags,
    check_heads,
    check_positive,
    check_sizes,
    check_special_ids,
)
from linattn.models.huggingface.strict import StrictFields
from linattn.nn.cosformer import FEATURE_MAPS

__all__ = ["CosformerConfig"]

POSITIONS = ("learned", "none")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


class CosformerConfig(StrictFields, PreTrainedConfig):
    """Sizes and choices of encoders, causal models and encoder-decoders of cosFormer attention.

    num_hidden_layers: of the encoder, or of a causal model. num_decoder_layers: above 0 for an
    encoder-decoder, and then is_encoder_decoder is set. num_attention_heads: divides hidden_size.
    intermediate_size, hidden_act: width and activation of the MLP. max_position_embeddings: the M of the
    cosine, fixed, so that a text's outputs do not change as it grows; no text may be longer. act_fun: the
    feature map, "relu" (the paper's) or "elu" (elu(x) + 1). dropout: on the embeddings and on what each
    sublayer adds. position_embeddings: "learned", a table of max_position_embeddings rows added to the
    embeddings, or "none", where order shows in the cosine alone. initializer_range: of new weights.
    tie_word_embeddings: one matrix for the embeddings and the head; the two texts of an encoder-decoder share
    their embeddings in any case.

    Raises OptionError or ValueRangeError for values that do not exist or do not fit together.
    Source: Qin et al. 2022, cosFormer, https://arxiv.org/abs/2202.08791. The pre-norm blocks
    around its attention are this library's own layout.
    """

    model_type = "cosformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_decoder_layers: int = 0
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    act_fun: str = "relu"
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    position_embeddings: str = "learned"
    initializer_range: float = 0.02
    use_cache: bool = True
    is_encoder_decoder: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.is_encoder_decoder and self.num_decoder_layers == 0:
            raise OptionError("is_encoder_decoder=True needs num_decoder_layers of at least 1, got 0")
        self.check()
        self.is_encoder_decoder = self.num_decoder_layers > 0
        if self.is_encoder_decoder and self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise OptionError or ValueRangeError for values that do not exist or do not fit together."""
        check_sizes(self, *SIZES)
        check_sizes(self, "num_decoder_layers", least=0)
        check_flags(self, "use_cache", "tie_word_embeddings")
        check_heads(self, "num_attention_heads", "hidden_size")
        check_choice(self, "act_fun", FEATURE_MAPS)
        check_choice(self, "position_embeddings", POSITIONS)
        check_choice(self, "hidden_act", ACT2FN)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueRangeError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        check_positive(self, "layer_norm_eps", "initializer_range")
        check_special_ids(self, "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
