"""The sizes and choices of a TransNormerLM, by the names of this library and by the released ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from linattn.errors import CheckpointError, OptionError, ValueRangeError
from linattn.features import FEATURE_MAPS
from linattn.models.fields import (
    check_choice,
    check_flags,
    check_heads,
    check_lrpe,
    check_positive,
    check_sizes,
    check_special_ids,
)
from linattn.models.names import check_field

SCHEDULES = ("released", "paper")
NORM = "simplermsnorm"
# The released names of fields, and of activations that are feature maps here; "None" leaves q and k alone.
RELEASED = {
    "embed_dim": "decoder_embed_dim",
    "num_layers": "decoder_layers",
    "num_heads": "decoder_attention_heads",
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "1+elu": "elu+1", "None": None}
ACT_NAMES = {act: name for name, act in reversed(ACTIVATIONS.items())}  # the first name of each
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


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
        check_choice(self, "decay_schedule", SCHEDULES)
        if self.feature_map not in (None, *FEATURE_MAPS):
            known = ", ".join(FEATURE_MAPS)
            raise OptionError(f"feature_map must be None or one of {known}, got {self.feature_map!r}")
        use = check_lrpe(self.linear_use_lrpe_list, self.num_layers, "layers")
        object.__setattr__(self, "linear_use_lrpe_list", use)

    def uses_lrpe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has LRPE."""
        return bool(self.linear_use_lrpe_list) and bool(self.linear_use_lrpe_list[layer])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, under the released names.

        Special tokens that a reader would have by default, and the vocabulary has not, are none.
        """
        fields = dataclasses.asdict(self) | {"linear_use_lrpe_list": list(self.linear_use_lrpe_list)}
        for own, released in RELEASED.items():
            fields[released] = fields.pop(own)
        act = fields.pop("feature_map")
        none = {name: None for name in IDS if getattr(Released, name) >= self.vocab_size}
        return fields | {"linear_act_fun": ACT_NAMES[act]} | none

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> TransNormerConfig:
        """Read what `to_dict` or transformers wrote, or a released checkpoint has.

        `linattn.models.transnormer` reads the same of it. Older checkpoints of this library have its own
        names. Raises CheckpointError for bad values, fields that are misspelt, and in older checkpoints for
        all that are unknown.
        """
        try:
            if RELEASED.keys() <= fields.keys():
                return _of_older(fields)
            return Released.read(fields).parts()
        except (ValueRangeError, OptionError) as error:
            raise CheckpointError(f"the configuration is damaged: {error}") from error


def _of_older(fields: Mapping[str, Any]) -> TransNormerConfig:
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(TransNormerConfig)})
    if unknown:
        raise CheckpointError(f"the configuration has unknown fields: {', '.join(unknown)}")
    return TransNormerConfig(**fields)


@dataclass(kw_only=True, repr=False, eq=False)
class Released:
    """The released fields and what they are where a configuration has none: transformers' class has these.

    attribute_map: what transformers calls some of them; that name counts where both are there.
    """

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
    norm_type: str = NORM
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

    @staticmethod
    def read(fields: Mapping[str, Any]) -> Released:
        """Read what a config.json holds, as transformers does and without it; fields of others are left out.

        Raises OptionError for a name that is one of these but for a slip of the hand.
        """
        own, aliases = [field.name for field in dataclasses.fields(Released)], Released.attribute_map
        for name in fields:
            check_field("TransNormerConfig", name, (*own, *aliases))
        renamed = {aliases[name]: value for name, value in fields.items() if name in aliases}
        return Released(**{name: value for name, value in fields.items() if name in own} | renamed)

    def parts(self) -> TransNormerConfig:
        """Return what `linattn.models.transnormer_lm` builds layers from.

        Raises OptionError or ValueRangeError for any field, its own or not, that cannot be.
        """
        check_sizes(self, "vocab_size", *RELEASED.values(), "hidden_dim", "glu_dim")
        check_heads(self, "decoder_attention_heads", "hidden_dim")
        lrpe = check_lrpe(self.linear_use_lrpe_list, self.decoder_layers, "decoder_layers")
        if self.norm_type != NORM:
            raise OptionError(f"norm_type must be {NORM!r}, got {self.norm_type!r}")
        act = str(self.linear_act_fun)
        if act not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise OptionError(f"linear_act_fun must be one of {known}, got {self.linear_act_fun!r}")
        parts = TransNormerConfig(
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
        check_special_ids(self, *IDS)
        return parts


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
