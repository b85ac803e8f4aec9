"""Texts that lie back to back in a row: where each begins, in every way that this is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linattn.arrays import traced
from linattn.errors import ShapeError

if TYPE_CHECKING:
    from jaxtyping import Int


def packed_at(
    options: Mapping[str, Any],
    cu_seqlens: Int[torch.Tensor, " s1"] | None,
    position_ids: Int[torch.Tensor, "b n"] | None,
    mask: torch.Tensor | None,
    cache: Any,
    given: Any,
) -> Int[torch.Tensor, " s1"] | None:
    """Return where texts begin that lie back to back, however that is said; None for one text a row.

    options: a call's other keywords, of which cu_seq_lens_q and seq_idx count. given: the call's ids or
    embeddings. Positions count only without a cache, and where no token is padding: those of padded texts
    may begin again as well. Raises ShapeError for position_ids that are not [b or 1, n].
    """
    borders = options.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
    if borders is not None or cache is not None or (mask is not None and traced()):
        return borders
    found = borders_of(position_ids, options.get("seq_idx"), given)
    if found is not None and isinstance(mask, torch.Tensor) and not bool((mask == 1).all()):
        return None
    return found


def borders_of(
    position_ids: torch.Tensor | None, seq_idx: torch.Tensor | None = None, given: Any = None
) -> torch.Tensor | None:
    """Where texts begin that lie back to back, in rows one after the other; None for one text a row."""
    if seq_idx is not None:
        again = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif position_ids is not None:
        again = _in_rows(position_ids, given)[:, 1:] == 0
    else:
        return None
    if not bool(again.any()):
        return None
    begins = nn.functional.pad(again, (1, 0), value=True).flatten().nonzero()[:, 0]
    return torch.cat([begins, begins.new_full((1,), again.shape[0] * (again.shape[1] + 1))])


def _in_rows(position_ids: torch.Tensor, given: Any) -> torch.Tensor:
    """Positions with a row for each of the input's."""
    rows = list(given.shape[:2]) if isinstance(given, torch.Tensor) and given.ndim > 1 else None
    wanted = [list(position_ids.shape)] if rows is None else [rows, [1, rows[1]]]
    if position_ids.ndim != 2 or list(position_ids.shape) not in wanted:
        shape = "[b, n]" if rows is None else f"{rows}"
        raise ShapeError(f"position_ids must have shape {shape}, got {list(position_ids.shape)}")
    return position_ids if rows is None else position_ids.expand(rows)
