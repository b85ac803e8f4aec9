"""Models of checkpoints: read whole, looked at, and only then loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from linattn.arrays import dtype_name
from linattn.errors import CheckpointError
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.models.tensors import check_dtype, once
from linattn.train.checkpoint import (
    CONFIG,
    MODEL,
    MODEL_TYPE,
    check_sum,
    find,
    instead,
    missing,
    read_json,
    read_tensors,
    weight_files,
)

TIED = "tie_word_embeddings"  # of transformers' folders: then one of two tensors will do
DEEPER = "model."  # what stands in front of names there


def load_model(path: Path, device: torch.device | str = "cpu") -> TransNormerLM:
    """Return the model of a checkpoint or of a run's newest one, float32; also of a transformers folder.

    Raises CheckpointError when anything is missing, damaged, or does not fit together; nothing is loaded by
    halves.
    """
    folder = find(path)
    fields = read_json(folder / CONFIG)
    kind, tied = fields.pop("model_type", None), fields.get(TIED, False)
    if kind != MODEL_TYPE:
        raise CheckpointError(f"{folder / CONFIG} is for a model of type {kind!r}, this is {MODEL_TYPE!r}")
    if not isinstance(tied, bool):  # the string "false" would be true
        raise CheckpointError(f"{folder / CONFIG} is damaged: {TIED} must be true or false, got {tied!r}")
    config = TransNormerConfig.from_dict(fields)
    _check_config(folder)
    tensors = _weights(folder)
    if tied:
        pair = "embed_tokens.weight", "lm_head.weight"
        for one, other in (pair, pair[::-1]):
            if one in tensors:
                tensors.setdefault(other, tensors[one])
    model = TransNormerLM(config)
    load_weights(model, tensors, folder / MODEL)
    return model.to(device)


def load_weights(model: TransNormerLM, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Put tensors into a model once all are right: names, shapes, finite numbers of floating point.

    Raises CheckpointError otherwise.
    """
    own = model.state_dict()
    lacking, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if lacking or extra:
        what = [f"lacks {', '.join(lacking[:3])}"] * bool(lacking) + [
            f"has unknown {', '.join(extra[:3])}"
        ] * bool(extra)
        raise CheckpointError(f"{source} is of another model: it {' and '.join(what)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, this model's is {tuple(own[name].shape)}"
            raise CheckpointError(f"{source} is of another model: {name} has shape {shapes}")
        check_dtype(source, name, dtype_name(tensor))
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{source} has weights that are NaN or infinite, in {name}: its training diverged"
                f"{instead(source.parent) or '; take an earlier checkpoint'}"
            )
    model.load_state_dict(dict(tensors))


def _check_config(folder: Path) -> None:
    """Refuse a configuration that was changed since it was saved, in ways that a model could have."""
    try:
        check_sum(folder / CONFIG)
    except OSError as error:  # gone since
        raise missing(folder / CONFIG) from error
    except CheckpointError as error:
        raise CheckpointError(f"{error}{instead(folder)}") from error


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's files by the names that they have here."""
    found = (pair for path in weight_files(folder) for pair in read_tensors(path).items())
    return once(folder, found, DEEPER)
