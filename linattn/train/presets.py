"""What transformers' Trainer begins with: a published size, or what a folder holds of a model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from linattn.errors import CheckpointError, OptionError
from linattn.models.config import Released
from linattn.models.transnormer import PRESETS, TransNormerConfig, TransNormerForCausalLM, preset
from linattn.train import checkpoint, trainer_checkpoint
from linattn.train.tokenizers import BYTES, TOKENIZER, check_bytes, load_tokenizer, own_tokenizer

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LOSS_CHUNK = 8192  # tokens whose logits are there at once,
LOGITS = 1 << 29  # or fewer: so many logits, 1 GiB in bfloat16
FIELDS = [  # what makes a model; transformers' own fields come and go with its versions
    field.name for field in dataclasses.fields(Released) if field.name != "use_cache"
]


def is_published(size: str) -> bool:
    """Whether a name is a published size; every other one is a folder's."""
    return size.lower() in PRESETS


def is_there(size: str) -> bool:
    """Whether a name is a published size or a folder with a configuration."""
    return is_published(size) or bool(size and (Path(size) / checkpoint.CONFIG).is_file())


def known(size: str) -> None:
    """Raise OptionError unless a size is a published one or a folder with a configuration."""
    if not is_there(size):
        sizes = ", ".join(("tiny", "small", *PRESETS))
        raise OptionError(f"--preset must be one of {sizes}, or a folder with a config.json, got {size!r}")


def has_weights(size: str) -> bool:
    """Whether a name is of a folder with weights, which a run then begins with."""
    return not is_published(size) and any(Path(size).glob("*.safetensors"))


def config_of(size: str, vocab_size: int, tokenizer: Any = None) -> TransNormerConfig:
    """Return the configuration of the model that a run begins with.

    A new model gets the text's vocabulary and the tokenizer's special tokens; bytes have none.

    Raises OptionError for a name that is neither a size nor a folder, or for bytes and weights of another
    vocabulary, CheckpointError for a configuration that is none of this model, or weights that do not know
    the text's tokens.
    """
    if is_published(size):
        ids = {name: getattr(tokenizer, name, None) for name in IDS[:2]}
        return preset(size, vocab_size=vocab_size, pad_token_id=None, **ids)
    config = _config(size)
    if not has_weights(size):
        config.vocab_size = vocab_size
        for name in IDS:
            ids_of = config if tokenizer is None or name == "pad_token_id" else tokenizer
            setattr(config, name, _inside(getattr(ids_of, name), vocab_size))
        return config
    if tokenizer is None and vocab_size <= BYTES:
        check_bytes(config.vocab_size)
    if config.vocab_size < vocab_size:
        raise CheckpointError(
            f"{size} is of a vocabulary of {config.vocab_size}, the text's tokens need {vocab_size}"
        )
    return config


def _config(size: str) -> TransNormerConfig:
    known(size)
    folder = Path(size)
    place = folder / checkpoint.CONFIG
    fields = checkpoint.read_json(place)
    kind, dtype = fields.get("model_type"), fields.get("dtype", fields.get("torch_dtype"))
    if kind != TransNormerConfig.model_type:
        raise CheckpointError(
            f"{place} is for a model of type {kind!r}, not {TransNormerConfig.model_type!r}"
        )
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise CheckpointError(f"{place} is damaged: torch has no dtype {dtype!r}")
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])
    if pickles and not has_weights(size):
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which can run code: where you trust it, load the model with "
            "use_safetensors=False and save it again"
        )
    config: TransNormerConfig = TransNormerConfig.from_pretrained(folder)
    return config


def _inside(ids: Any, vocab_size: int) -> Any:
    """Special tokens, or None where one of them is outside of the vocabulary."""
    several = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    return ids if all(one < vocab_size for one in several) else None


def model_of(
    size: str, vocab_size: int, tokenizer: Any = None, *, looked_at: bool = False
) -> TransNormerForCausalLM:
    """Return a new model of a published size, or of a folder's configuration, or that folder's weights.

    looked_at: its files are known to be whole. Raises what `config_of` does, CheckpointError for weights that
    are missing or damaged.
    """
    config = config_of(size, vocab_size, tokenizer)
    if not has_weights(size):
        return TransNormerForCausalLM(config)
    if not looked_at:
        trainer_checkpoint.check_model(Path(size))
    # in float32: steps of a small learning rate are lost in half precision
    model: TransNormerForCausalLM = TransNormerForCausalLM.from_pretrained(Path(size), dtype=torch.float32)
    return model


def tokenizer_of(size: str, last: Path | None) -> tuple[Any, Path | None]:
    """Return the tokenizer that a run has if none is named, and the folder that it lies in; None: bytes.

    last: the checkpoint that the run goes on from. A run that begins with a folder has that folder's.

    Raises OptionError for a name that is neither a size nor a folder, and for weights that are not over
    bytes and have no tokenizer; what `own_tokenizer` raises.
    """
    if last is not None:
        return (load_tokenizer(last), last) if (last / TOKENIZER).is_file() else (None, None)
    if is_published(size):
        return None, None
    config, folder = _config(size), Path(size)
    if has_weights(size):
        found = own_tokenizer(folder, config.vocab_size)
    elif any((folder / name).is_file() for name in (TOKENIZER, "tokenizer.json", "tokenizer.model")):
        found = own_tokenizer(folder, sys.maxsize)  # a new model has its vocabulary
    else:
        found = None
    return found, None if found is None else folder


def fields_of(config: TransNormerConfig) -> dict[str, Any]:
    """What a configuration says about a model, as JSON holds it."""
    values = {name: getattr(config, name) for name in FIELDS}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def loss_chunk(vocab_size: int) -> int:
    """How many tokens have logits at once: 8192, or less of a wide vocabulary, in whole tiles of products."""
    return max(128, min(LOSS_CHUNK, LOGITS // vocab_size // 128 * 128))
