"""Checkpoints are loaded whole, from safetensors, or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from linattn.arrays import FLOATS
from linattn.errors import CheckpointError
from linattn.models.huggingface.files import classes_of, dtypes, kept, look, missing
from linattn.models.tensors import check_dtype, once

__all__ = ["ShapeMismatchError", "load_whole"]

PICKLED = (pickle.UnpicklingError, EOFError, KeyError, RuntimeError)  # what torch.load raises for damage
READER = "PytorchStreamReader"


class ShapeMismatchError(CheckpointError, RuntimeError):
    """A tensor of another shape; a RuntimeError, too, as transformers raises one there."""


def load_whole(
    load: Callable[..., Any],
    path: Any,
    *arguments: Any,
    new: tuple[str, tuple[str, ...]] = ("", ()),
    prefix: str = "",
    unlike: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Return what `load`, a `PreTrainedModel.from_pretrained`, makes of a checkpoint, if nothing is amiss.

    Pickled weights are read only with use_safetensors=False. With output_loading_info=True the report is
    returned, and nothing that it says is an error. new: a class, and beginnings of names of its tensors that
    a checkpoint of another class may lack, as its own task's are new. prefix: the base model's name and a
    dot, with which keys begin or not. unlike: classes whose checkpoints are none of this one, though their
    tensors are.

    Raises CheckpointError when tensors are missing, unknown, there twice, of another shape (unless
    ignore_mismatched_sizes=True) or of no floating point where the model's are, or a file is damaged or
    missing.
    """
    if options.get("use_safetensors") is None:
        options["use_safetensors"] = True  # None would be pickles, where there is nothing else
    wants_report = options.pop("output_loading_info", False)
    shapes_may_differ = options.pop("ignore_mismatched_sizes", wants_report)
    try:
        classes: list[str] = []
        given, source = options.get("state_dict"), "the state_dict" if path is None else path
        if given is not None or path is None:
            found = once(source, dtypes(given).items(), prefix)
        else:
            place = Path(path, options.get("subfolder") or "")
            found, classes = look(place, prefix, options), classes_of(place)
        model, report = load(
            path, *arguments, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        if given is None and (folder := kept(path, options, model.config)) is not None:
            found, classes = look(folder, prefix, options), classes_of(folder)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except PICKLED as error:
        if options["use_safetensors"] or (isinstance(error, RuntimeError) and READER not in str(error)):
            raise
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path}: its pickled weights are damaged, or hold more than tensors"
            ) from error
        name = type(error).__name__
        raise CheckpointError(f"{path}: its pickled weights are damaged ({name}: {error})") from error
    except OSError as error:
        if not options["use_safetensors"] and error.errno is not None:
            raise CheckpointError(f"{path}: its pickled weights cannot be read: {error}") from error
        if (lacks := missing(path, options, str(error))) is not None:
            raise CheckpointError(lacks) from error
        raise
    own = {name.removeprefix(prefix): dtype for name, dtype in dtypes(model.state_dict()).items()}
    for name, dtype in found.items():
        if own.get(name) in FLOATS:
            check_dtype(source, name, dtype)
    if wants_report:
        return model, report
    if report["mismatched_keys"] and not shapes_may_differ:
        name, theirs, mine = min(report["mismatched_keys"])
        raise ShapeMismatchError(
            f"{path} is of another model: {name} has shape {tuple(theirs)}, this model's is {tuple(mine)}"
        )
    saved = model.config.architectures or [new[0]]
    if other := {*classes}.intersection(unlike):
        raise CheckpointError(f"{path} is of another model: a {min(other)}, which a {new[0]} is not")
    may_lack = () if new[0] in saved else new[1]
    wrong = {
        "lacks": [key for key in report["missing_keys"] if not key.startswith(may_lack)],
        "has unknown": report["unexpected_keys"],
    }
    for words, keys in wrong.items():
        if keys:
            names = ", ".join(sorted(keys)[:3])
            raise CheckpointError(f"{path} is of another model: it {words} {names} ({len(keys)} in all)")
    return model
