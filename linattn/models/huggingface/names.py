"""Names: of classes, which transformers asks for, and of keywords, which may be misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Collection

import torch
from transformers.models.auto import modeling_auto

__all__ = ["meant", "tell"]

ALIKE = 0.83  # of difflib's ratio: two letters of six in another order


def tell(model_type: str, **names: str) -> None:
    """Add a model's classes to transformers' tables of names, which `AutoModel….register` leaves out.

    names: a class's name by its task, as in tell("transnormer", CAUSAL_LM="TransNormerForCausalLM"). Trainer
    shifts labels for label smoothing only where it finds a model among the causal ones.
    """
    for task, name in names.items():
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", None)
        if table is not None:
            table.setdefault(model_type, name)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # no difflib in graphs
def meant(name: str, known: Collection[str], alike: float = ALIKE) -> str | None:
    """Return the known name that another one, which is not, was probably to be; None where there is none."""
    if name in known:
        return None
    found = difflib.get_close_matches(name, known, 1, alike)
    return found[0] if found else None
