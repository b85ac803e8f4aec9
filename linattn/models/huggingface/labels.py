"""What a causal model is asked: labels that a token of the same text foretells, and how many they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from linattn.arrays import readable
from linattn.errors import DtypeError, OptionError, ShapeError, ValueRangeError
from linattn.models.huggingface.inputs import keeps_all
from linattn.models.huggingface.padding import real_tokens
from linattn.models.ids import check_tensor

if TYPE_CHECKING:
    from jaxtyping import Int

IGNORED = -100  # a label that asks nothing


def check_labels(
    labels: Any, ids: Any, embeds: Any, vocab_size: int, options: dict[str, Any], keep: Any = 0
) -> Any:
    """Return labels as int64; refuse what are no ids, and not [b, n] as the call's input is.

    options: the loss's, of which ignore_index counts; its shift_labels are looked at and cast, too. keep: the
    call's logits_to_keep. Values are read only where they lie on the host. Raises ArgumentTypeError,
    DtypeError, ShapeError or ValueRangeError, and OptionError for labels of columns without logits.
    """
    if labels is None:
        return None
    given = embeds if ids is None else ids
    rows = given.shape[:2] if isinstance(given, torch.Tensor) and given.ndim > 1 else None
    ignored = options.get("ignore_index", IGNORED)
    labels = _ids_of("labels", labels, rows, vocab_size, ignored)
    if not keeps_all(keep, labels.shape[1]):
        raise OptionError(
            "labels ask for every column's logits, logits_to_keep leaves some out: pass one of them"
        )
    if options.get("shift_labels") is not None:
        shifted = options["shift_labels"]
        options["shift_labels"] = _ids_of("shift_labels", shifted, labels.shape, vocab_size, ignored)
    return labels


def _ids_of(
    name: str, labels: Any, rows: torch.Size | None, vocab_size: int, ignored: int
) -> Int[torch.Tensor, "b n"]:
    """Labels as int64, of so many rows and columns, where those are known."""
    check_tensor(name, labels)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise DtypeError(f"{name} must be integers, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.ndim != 2 or (rows is not None and labels.shape != rows):
        wanted = "[b, n]" if rows is None else f"{list(rows)}, as the input"
        raise ShapeError(f"{name} must have shape {wanted}, got {list(labels.shape)}")
    return within(name, labels.long().contiguous(), vocab_size, ignored)  # transformers takes views of them


def within(
    name: str, labels: Int[torch.Tensor, "*shape"], count: int, ignored: int
) -> Int[torch.Tensor, "*shape"]:
    """Return labels of so many classes; raise ValueRangeError for others, where they lie on the host."""
    if readable(labels):
        wrong = ((labels < 0) | (labels >= count)) & (labels != ignored)
        if bool(wrong.any()):
            raise ValueRangeError(
                f"{name} must lie in 0 … {count - 1}, or be {ignored} where nothing is asked, got "
                f"{labels[wrong][0].item()}"
            )
    return labels


def asked(
    labels: Int[torch.Tensor, "b n"],
    attention_mask: torch.Tensor | None,
    borders: Int[torch.Tensor, " s1"] | None,
    options: dict[str, Any],
) -> tuple[Int[torch.Tensor, "b n"], dict[str, Any]]:
    """Return the labels of `foretold`, and a loss's keywords with the number of items that they leave.

    num_items_in_batch counts what is asked in all passes of a step, and whoever counts (Trainer) does not
    know which labels nothing foretells. This pass's share of it shrinks as its own labels do: exact for a
    step of one pass; with several, passes are weighed by what was counted.
    """
    ignored = options.get("ignore_index", IGNORED)
    kept = foretold(labels, attention_mask, borders, ignored)
    items = options.get("num_items_in_batch")
    if items is None or kept is labels or options.get("shift_labels") is not None:
        return kept, options
    counted, left = ((x[:, 1:] != ignored).sum() for x in (labels, kept))
    if isinstance(items, torch.Tensor):
        counted, left = counted.to(items.device), left.to(items.device)
    share = torch.where(left > 0, left / counted.clamp(min=1), 1.0)  # nothing left: the sum is 0 anyway
    return kept, {**options, "num_items_in_batch": items * share}


def foretold(
    labels: Int[torch.Tensor, "b n"],
    attention_mask: torch.Tensor | None,
    borders: Int[torch.Tensor, " s1"] | None,
    ignored: int,
) -> Int[torch.Tensor, "b n"]:
    """Return labels with those masked that no token of their text comes before.

    Those are real tokens that have only padding before them, whose columns are zeros, and where texts lie
    back to back, in rows one after the other, the first token of each.
    """
    n = labels.shape[1]
    if attention_mask is not None:
        real = real_tokens(attention_mask, n).to(labels.device)
        labels = labels.masked_fill(real & (real.cumsum(1) == 1), ignored)
    if borders is not None:
        count = labels.numel()
        begins = borders[1:-1].long().clamp(max=count)  # that is where empty texts at the end begin
        marked = functional.pad(labels.flatten(), (0, 1)).index_fill(0, begins, ignored)
        labels = marked[:count].view(labels.shape)
    return labels
