"""Checkpoints are loaded whole, from safetensors, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from linattn.errors import CheckpointError

__all__ = ["load_whole"]


def load_whole(
    load: Callable[..., Any], name: str, heads: tuple[str, ...], path: Any, *arguments: Any, **options: Any
) -> Any:
    """Return what `load`, a `PreTrainedModel.from_pretrained`, makes of a checkpoint, if nothing is amiss.

    name: of the class that is loaded. heads: beginnings of the names of tensors that may be missing from a
    checkpoint of another class, as its own task's are new; of the same class, they may not.

    Raises CheckpointError when tensors are missing, unknown or of another shape, or a file is damaged, and
    for pickled weights unless options have use_safetensors=False.
    """
    options.setdefault("use_safetensors", True)
    wants_report = options.pop("output_loading_info", False)
    try:
        model, report = load(path, *arguments, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except OSError as error:
        if options["use_safetensors"] and "safetensors" in str(error):
            raise CheckpointError(
                f"{path} has no safetensors; pickled weights can run code: where you trust them, pass "
                "use_safetensors=False"
            ) from error
        raise
    saved = model.config.architectures or [name]
    new = () if name in saved else heads
    wrong = {
        "lacks": [key for key in report["missing_keys"] if not key.startswith(new or ("\0",))],
        "has unknown": report["unexpected_keys"],
    }
    for words, keys in wrong.items():
        if keys:
            raise CheckpointError(
                f"{path} is of another model: it {words} {', '.join(sorted(keys)[:3])} ({len(keys)} in all)"
            )
    return (model, report) if wants_report else model
