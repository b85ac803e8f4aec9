"""What a TransNormerLLM is made of, with the released field names, and the published sizes."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from linattn.errors import OptionError
from linattn.models.config import ACTIVATIONS, NORM
from linattn.models.config import TransNormerConfig as Parts
from linattn.models.fields import check_flags, check_heads, check_ids, check_lrpe, check_positive, check_sizes
from linattn.models.huggingface.strict import StrictFields

__all__ = ["PRESETS", "TransNormerConfig", "preset"]

SIZES = (
    "vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "hidden_dim", "glu_dim",
)  # fmt: skip


class TransNormerConfig(StrictFields, PreTrainedConfig):
    """The released configuration (model type "transnormer"), with one field more: decay_schedule.

    decoder_embed_dim: width of the residual. hidden_dim: width of q, k, v and the gate, split into
    decoder_attention_heads; may differ from decoder_embed_dim. glu_dim: inner width of the channel mixer.
    decoder_layers: their number. linear_use_lrpe_list: one 0 or 1 per layer, 1 where it has LRPE; [] for
    none. linear_act_fun: what acts on q and k: "silu" ("swish"), "relu", "1+elu" or "None". norm_type:
    "simplermsnorm". no_scale_embedding: leave out the factor sqrt(decoder_embed_dim) on the embeddings.
    bias: of every linear layer but the head. init_std: of new weights. add_bos_token: kept for tokenizers.
    decay_schedule: "released" or "paper" (`linattn.decay.transnormer`).

    Raises OptionError or ValueRangeError for values that do not exist or do not fit together.
    Source: `TransnormerConfig` of the released TransNormerLLM code.
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
        "initializer_range": "init_std",
    }

    vocab_size: int = 64000
    decoder_embed_dim: int = 1024
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    hidden_dim: int = 1024
    glu_dim: int = 2816
    linear_use_lrpe_list: list[int] | tuple[int, ...] | None = ()
    linear_act_fun: str | None = "silu"
    norm_type: str = "simplermsnorm"
    no_scale_embedding: bool = False
    bias: bool = False
    decay_schedule: str = "released"
    init_std: float = 0.02
    add_bos_token: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # sets what came under transformers' names
        if not isinstance(self.linear_use_lrpe_list, list | tuple | None):
            raise OptionError(f"linear_use_lrpe_list must be a list, got {self.linear_use_lrpe_list!r}")
        self.linear_use_lrpe_list = list(self.linear_use_lrpe_list or ())
        self.parts()

    def parts(self) -> Parts:
        """Return what `linattn.models.transnormer_lm` builds layers from.

        Raises OptionError or ValueRangeError for any field, its own or not, that cannot be.
        """
        check_sizes(self, *SIZES)
        check_heads(self, "decoder_attention_heads", "hidden_dim")
        lrpe = check_lrpe(self.linear_use_lrpe_list, self.decoder_layers, "decoder_layers")
        if self.norm_type != NORM:
            raise OptionError(f"norm_type must be {NORM!r}, got {self.norm_type!r}")
        act = str(self.linear_act_fun)
        if act not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise OptionError(f"linear_act_fun must be one of {known}, got {self.linear_act_fun!r}")
        parts = Parts(
            vocab_size=self.vocab_size,
            embed_dim=self.decoder_embed_dim,
            hidden_dim=self.hidden_dim,
            num_heads=self.decoder_attention_heads,
            num_layers=self.decoder_layers,
            glu_dim=self.glu_dim,
            decay_schedule=self.decay_schedule,
            linear_use_lrpe_list=lrpe,
            no_scale_embedding=self.no_scale_embedding,
            bias=self.bias,
            feature_map=ACTIVATIONS[act],
        )
        check_flags(self, "add_bos_token", "use_cache", "tie_word_embeddings")
        check_positive(self, "init_std")
        check_ids(self, "pad_token_id", "bos_token_id", "eos_token_id")
        return parts


def _size(layers: int, width: int, heads: int, glu: int) -> dict[str, Any]:
    """Fields of a published size: LRPE in the first layer, as in the paper."""
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "hidden_dim": width,
        "decoder_attention_heads": heads,
        "glu_dim": glu,
        "linear_use_lrpe_list": _in_the_first(layers),
    }


def _in_the_first(layers: int) -> list[int]:
    return [1] + [0] * (layers - 1)


# Layers, widths and heads of 385m to 7b and 175b: TransNormerLLM, arXiv:2307.14995, table of model variants;
# of 15b: the card of the released TransNormerLLM3-15B. The channel mixer is 8/3 of the width, rounded up to a
# multiple of 256.
PRESETS: dict[str, dict[str, Any]] = {
    "385m": _size(24, 1024, 8, 2816),
    "1b": _size(16, 2048, 16, 5632),
    "3b": _size(32, 2560, 20, 6912),
    "7b": _size(30, 4096, 32, 11008),
    "15b": _size(42, 5120, 40, 13824),
    "175b": _size(88, 12288, 96, 32768),
}


def preset(name: str, **fields: Any) -> TransNormerConfig:
    """Return the configuration of a published size ("385m", …), with `fields` in place of its own.

    Of another number of layers the first has LRPE, too, unless linear_use_lrpe_list says otherwise.
    Raises OptionError for a name that is not in `PRESETS`, and for fields that no configuration has.
    Source: layers, widths and heads are those of TransNormerLLM, arXiv:2307.14995; of "15b", those of the
    released TransNormerLLM3.
    """
    if name.lower() not in PRESETS:
        raise OptionError(f"no preset named {name!r}; known: {', '.join(PRESETS)}")
    made = TransNormerConfig(**PRESETS[name.lower()])
    unknown = [field for field in fields if not hasattr(made, field)]
    if unknown:
        raise OptionError(f"TransNormerConfig has no field {unknown[0]!r}")
    sizes = PRESETS[name.lower()] | {TransNormerConfig.attribute_map.get(k, k): v for k, v in fields.items()}
    if isinstance(sizes["decoder_layers"], int) and "linear_use_lrpe_list" not in fields:
        sizes["linear_use_lrpe_list"] = _in_the_first(sizes["decoder_layers"])
    return TransNormerConfig(**sizes)
