"""The sizes and choices of a TransNormerLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linattn.errors import CheckpointError, OptionError, ValueRangeError
from linattn.features import FEATURE_MAPS
from linattn.models.fields import check_flags, check_heads, check_lrpe, check_sizes

SCHEDULES = ("released", "paper")
NORM = "simplermsnorm"
# The released names of fields, and of activations that are feature maps here; "None" leaves q and k alone.
RELEASED = {
    "embed_dim": "decoder_embed_dim",
    "num_layers": "decoder_layers",
    "num_heads": "decoder_attention_heads",
}
# Fields that say who wrote a configuration: then it has more of them that mean nothing here.
HUGGING_FACE = {"architectures", "transformers_version", "auto_map", "eos_token_id"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "1+elu": "elu+1", "None": None}


@dataclass(frozen=True)
class TransNormerConfig:
    """What a TransNormerLM is made of.

    vocab_size: 256 for bytes. hidden_dim: width of q, k, v and the gate, split into num_heads; may differ
    from embed_dim. glu_dim: inner width of the channel mixer. decay_schedule: "released" or "paper"
    (`linattn.decay.transnormer`). linear_use_lrpe_list: one 0 or 1 per layer, 1 where the layer has LRPE; ()
    for none.
    no_scale_embedding: leave out the factor sqrt(embed_dim) on the embeddings. bias: of the layers' linear
    maps. feature_map: what acts on q and k (`linattn.attention`).

    Raises ValueRangeError or OptionError for sizes below 1, flags that are no bool, and choices that do not
    exist or do not fit together.
    Source: fields of the released TransNormerLLM code, arXiv:2307.14995, under names of this library.
    """

    vocab_size: int = 256
    embed_dim: int = 128
    hidden_dim: int = 128
    num_heads: int = 4
    num_layers: int = 4
    glu_dim: int = 384
    decay_schedule: str = "released"
    linear_use_lrpe_list: tuple[int, ...] = ()
    no_scale_embedding: bool = False
    bias: bool = False
    feature_map: str | None = "silu"

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "embed_dim", "hidden_dim", "num_heads", "num_layers", "glu_dim")
        check_flags(self, "no_scale_embedding", "bias")
        check_heads(self, "num_heads", "hidden_dim")
        if self.decay_schedule not in SCHEDULES:
            raise OptionError(
                f"decay_schedule must be one of {', '.join(SCHEDULES)}, got {self.decay_schedule!r}"
            )
        if self.feature_map not in (None, *FEATURE_MAPS):
            known = ", ".join(FEATURE_MAPS)
            raise OptionError(f"feature_map must be None or one of {known}, got {self.feature_map!r}")
        use = check_lrpe(self.linear_use_lrpe_list, self.num_layers, "layers")
        object.__setattr__(self, "linear_use_lrpe_list", use)

    def uses_lrpe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has LRPE."""
        return bool(self.linear_use_lrpe_list) and bool(self.linear_use_lrpe_list[layer])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, under the released names."""
        fields = dataclasses.asdict(self) | {"linear_use_lrpe_list": list(self.linear_use_lrpe_list)}
        for own, released in RELEASED.items():
            fields[released] = fields.pop(own)
        act = fields.pop("feature_map")
        return fields | {"linear_act_fun": next(name for name, has in ACTIVATIONS.items() if has == act)}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> TransNormerConfig:
        """Read what `to_dict` or transformers wrote, or a released checkpoint has.

        Raises CheckpointError for bad values, and for unknown fields unless transformers wrote them.
        """
        own = {field.name for field in dataclasses.fields(TransNormerConfig)}
        names = {released: name for name, released in RELEASED.items()}
        found = {names.get(name, name): value for name, value in fields.items()}
        act, norm = str(found.pop("linear_act_fun", "silu")), found.pop("norm_type", NORM)
        if act not in ACTIVATIONS or norm != NORM:
            raise CheckpointError(
                f"the configuration has linear_act_fun {act!r} and norm_type {norm!r}; known are "
                f"{', '.join(ACTIVATIONS)} and {NORM}"
            )
        found.setdefault("feature_map", ACTIVATIONS[act])
        unknown = sorted(set(found) - own)
        if unknown and not HUGGING_FACE & set(fields):
            raise CheckpointError(f"the configuration has unknown fields: {', '.join(unknown)}")
        use = found.get("linear_use_lrpe_list") or ()
        if not isinstance(use, (list, tuple)):
            raise CheckpointError(
                f"the configuration is damaged: linear_use_lrpe_list must be a list, got {use!r}"
            )
        kept = {name: value for name, value in found.items() if name in own}
        try:
            return TransNormerConfig(**{**kept, "linear_use_lrpe_list": tuple(use)})
        except (ValueRangeError, OptionError) as error:
            raise CheckpointError(f"the configuration is damaged: {error}") from error


# tiny is what two CPU cores can teach in two minutes; small wants an hour or a GPU.
PRESETS = {
    "tiny": TransNormerConfig(
        embed_dim=96,
        hidden_dim=96,
        num_heads=4,
        num_layers=3,
        glu_dim=192,
        linear_use_lrpe_list=(1, 0, 0),
    ),
    "small": TransNormerConfig(
        embed_dim=512,
        hidden_dim=512,
        num_heads=8,
        num_layers=8,
        glu_dim=1408,
        linear_use_lrpe_list=(1, *[0] * 7),
    ),
}
