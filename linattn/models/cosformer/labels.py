"""What a classifier is asked: a class of each text, several at once, or numbers."""

from __future__ import annotations

from typing import Any

import torch

from linattn.arrays import readable
from linattn.errors import DtypeError, ShapeError, ValueRangeError
from linattn.models.cosformer.configuration import CosformerConfig
from linattn.models.huggingface.labels import IGNORED, within
from linattn.models.ids import check_tensor

__all__ = ["check_classes"]

SINGLE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"


def check_classes(
    labels: Any, ids: Any, embeds: Any, config: CosformerConfig, options: dict[str, Any]
) -> Any:
    """Return labels in a dtype that the loss of the configuration's problem_type takes, or refuse them.

    Without a problem_type it is, as in transformers, regression of one number, one class of several for
    integers, several at once for others. options: the loss's, of which ignore_index counts. Values are read
    only where they lie on the host. Raises ArgumentTypeError, DtypeError, ShapeError or ValueRangeError.
    """
    if labels is None:
        return None
    check_tensor("labels", labels)
    whole = labels.dtype != torch.bool and not labels.is_floating_point() and not labels.is_complex()
    count = config.num_labels
    problem = config.problem_type or (NUMBERS if count == 1 else SINGLE if whole else SEVERAL)
    given = embeds if ids is None else ids
    rows = given.shape[0] if isinstance(given, torch.Tensor) and given.ndim else None
    name = str(labels.dtype).removeprefix("torch.")
    if labels.is_complex() or (problem == SINGLE and not whole):
        wanted = "integers, the classes' numbers" if problem == SINGLE else "real numbers"
        raise DtypeError(f"labels must be {wanted} for problem_type {problem!r}, got {name}")
    one = problem == SINGLE or count == 1
    shapes: tuple[tuple[int, ...], ...] = ((), (1,)) if one and problem != SEVERAL else ((count,),)
    if not labels.ndim or labels.shape[1:] not in shapes or rows not in (None, labels.shape[0]):
        wanted = f"[{'b' if rows is None else rows}{'' if () in shapes else f', {count}'}]"
        raise ShapeError(
            f"labels must have shape {wanted} for problem_type {problem!r}, got {list(labels.shape)}"
        )
    if problem == SINGLE:
        return within("labels", labels.long(), count, options.get("ignore_index", IGNORED))
    if problem == SEVERAL:
        return _shares(labels if labels.is_floating_point() else labels.float())
    return labels


def _shares(labels: torch.Tensor) -> torch.Tensor:
    if readable(labels):
        wrong = ~((labels >= 0) & (labels <= 1))
        if bool(wrong.any()):
            raise ValueRangeError(
                f"labels of several classes at once must lie in 0 … 1, got {labels[wrong][0].item()}"
            )
    return labels
