"""What a cosFormer model is made of."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from linattn.errors import OptionError, ValueRangeError
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


class CosformerConfig(PreTrainedConfig):
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
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

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
        for name, least in (*((name, 1) for name in SIZES), ("num_decoder_layers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueRangeError(f"{name} must be an int of at least {least}, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise OptionError(
                f"num_attention_heads must divide hidden_size, got {self.num_attention_heads} heads and "
                f"width {self.hidden_size}"
            )
        for name, known in (
            ("act_fun", FEATURE_MAPS),
            ("position_embeddings", POSITIONS),
            ("hidden_act", ACT2FN),
        ):
            if (value := getattr(self, name)) not in known:
                raise OptionError(f"{name} must be one of {', '.join(sorted(known))}, got {value!r}")
        if not 0 <= self.dropout < 1:
            raise ValueRangeError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueRangeError(f"{name} must be above 0, got {getattr(self, name)!r}")
        self._check_ids()

    def _check_ids(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            for one in value if isinstance(value, list | tuple) else [value]:
                if one is not None and not 0 <= one < self.vocab_size:
                    raise ValueRangeError(f"{name} must lie in 0 … {self.vocab_size - 1}, got {one}")
