"""What a TransNormerLLM is made of, with the released field names, and the published sizes."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from linattn.errors import OptionError
from linattn.models.config import Released
from linattn.models.huggingface.strict import StrictFields

__all__ = ["PRESETS", "TransNormerConfig", "preset"]


class TransNormerConfig(StrictFields, Released, PreTrainedConfig):
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

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # sets what came under transformers' names
        if isinstance(self.linear_use_lrpe_list, list | tuple | None):  # a list of its own
            self.linear_use_lrpe_list = list(self.linear_use_lrpe_list or ())
        self.parts()


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
    if not isinstance(name, str) or name.lower() not in PRESETS:
        raise OptionError(f"no preset named {name!r}; known: {', '.join(PRESETS)}")
    made = TransNormerConfig(**PRESETS[name.lower()])
    unknown = [field for field in fields if not hasattr(made, field)]
    if unknown:
        raise OptionError(f"TransNormerConfig has no field {unknown[0]!r}")
    sizes = PRESETS[name.lower()] | {TransNormerConfig.attribute_map.get(k, k): v for k, v in fields.items()}
    if isinstance(sizes["decoder_layers"], int) and "linear_use_lrpe_list" not in fields:
        sizes["linear_use_lrpe_list"] = _in_the_first(sizes["decoder_layers"])
    return TransNormerConfig(**sizes)
