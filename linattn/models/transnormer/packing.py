"""Texts that lie back to back in a row: where each begins, in every way that this is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linattn.errors import OptionError, ShapeError
from linattn.models.huggingface.padding import real_tokens
from linattn.models.ids import check_tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

PADDED = (
    "texts back to back have no padding: pass cu_seqlens, seq_idx or position_ids that begin again, or a "
    "mask with zeros"
)
ONE_ROW = "takes one text a row, padded to one length, with an attention_mask"
ONE_TEXT = "position_ids begin again: an exported model takes one text a row"


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
    embeddings. A text begins at a real token with another seq_idx, or with position 0, than the real token
    before it: padded texts, whose positions may begin at their first token, are one text. The values are read
    back, at which compilers cut their graph; an exported program asserts that position_ids are of one text.
    Raises ArgumentTypeError for what is no tensor, ShapeError for position_ids and seq_idx that are not
    [b or 1, n], OptionError for seq_idx where
    torch.export looks, and for several texts behind a cache that has seen tokens.
    """
    name, borders = "cu_seqlens", cu_seqlens
    if borders is None:
        name, borders = "cu_seq_lens_q", options.get("cu_seq_lens_q")
    if borders is not None:
        check_tensor(name, borders)
        return borders
    seq_idx, begun = options.get("seq_idx"), bool(getattr(cache, "states", None))
    if seq_idx is not None and begun:
        raise OptionError(
            "seq_idx parts texts of a first call, a cache that has seen tokens goes on with one text a row: "
            "pass cu_seqlens"
        )
    exporting = torch.compiler.is_exporting()
    if seq_idx is not None and exporting:
        raise OptionError(
            "seq_idx: where texts begin cannot be looked at by torch.export, pass one text a row"
        )
    again = _begins_again(seq_idx, position_ids, mask, given)
    if again is None:
        return None
    if exporting:
        torch._assert_async(~again.any(), ONE_TEXT)
        return None
    if not bool(again.any()):
        return None
    if begun:
        raise OptionError(
            "position_ids begin again behind a cache that has seen tokens, it goes on with one text a row: "
            "pass cu_seqlens"
        )
    begins = nn.functional.pad(again, (1, 0), value=True).flatten().nonzero()[:, 0]
    return torch.cat([begins, begins.new_full((1,), again.shape[0] * (again.shape[1] + 1))])


def check_apart(given: Mapping[str, Any]) -> None:
    """Raise OptionError where the prompts that `generate` is given lie back to back."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if given.get(name) is not None:
            raise OptionError(f"{name}: generate {ONE_ROW}")
    if given.get("seq_idx") is not None:
        again = _begins_again(given["seq_idx"], None, given.get("attention_mask"), None)
        if again is not None and bool(again.any()):
            raise OptionError(f"seq_idx has several texts in a row: generate {ONE_ROW}")


def check_whole(mask: torch.Tensor, n: int) -> None:
    """Raise ShapeError where a mask calls any of the last n columns padding, which packed texts have not.

    An exported program asserts it.
    """
    whole = real_tokens(mask, n).all()
    if torch.compiler.is_exporting():
        torch._assert_async(whole, PADDED)
    elif not bool(whole):
        raise ShapeError(PADDED)


def _begins_again(
    seq_idx: torch.Tensor | None, position_ids: torch.Tensor | None, mask: Any, given: Any
) -> Bool[torch.Tensor, "b n-1"] | None:
    """Which tokens but the first begin a text, real tokens in front; None where nothing says so."""
    if seq_idx is not None:
        place = _in_rows("seq_idx", seq_idx, given)
    elif position_ids is not None:
        place = _in_rows("position_ids", position_ids, given)
    else:
        return None
    n, inside = place.shape[1], None
    if n < 2:  # a token of `generate`, for which nothing more is to be done
        return None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= n:  # others are refused later
        real = real_tokens(mask, n).to(place.device)
        if real.shape[0] == place.shape[0]:
            place = place.gather(1, torch.argsort((~real).to(torch.int8), dim=1, stable=True))
            inside = torch.arange(1, n, device=place.device) < real.sum(1, keepdim=True)
    again = place[:, 1:] == 0 if seq_idx is None else place[:, 1:] != place[:, :-1]
    return again if inside is None else again & inside


def _in_rows(name: str, place: torch.Tensor, given: Any) -> torch.Tensor:
    """What there is of every column, with a row for each of the input's."""
    check_tensor(name, place)
    rows = list(given.shape[:2]) if isinstance(given, torch.Tensor) and given.ndim > 1 else None
    wanted = [list(place.shape)] if rows is None else [rows, [1, rows[1]]]
    if place.ndim != 2 or list(place.shape) not in wanted:
        shape = "[b, n]" if rows is None else f"{rows}"
        raise ShapeError(f"{name} must have shape {shape}, got {list(place.shape)}")
    return place if rows is None else place.expand(rows)
