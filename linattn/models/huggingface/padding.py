"""Padded rows: real tokens move to the front of their row, as if the others had never been there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from linattn.arrays import traced
from linattn.errors import ShapeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


IGNORED = -100  # a label that asks nothing


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of padded rows [b, n] are, on either side or in between.

    order: [b, n], the columns of real tokens first. lengths: [b], real tokens. place: [b, n], for each column
    the place of its token in that order; of padding that of the last real token before it: who reads the last
    column of a row that is padded on the right finds what belongs to its last token.
    """

    order: Int[torch.Tensor, "b n"]
    lengths: Int[torch.Tensor, " b"]
    place: Int[torch.Tensor, "b n"]

    def to_front(self, x: Float[torch.Tensor, "b n e"]) -> Float[torch.Tensor, "b n e"]:
        """Return rows with their real tokens in front."""
        return torch.gather(x, 1, self.order[..., None].expand_as(x))

    def back(self, x: Float[torch.Tensor, "b n e"]) -> Float[torch.Tensor, "b n e"]:
        """Return every column's output, from rows with their real tokens in front, which may be fewer."""
        return torch.gather(x, 1, self.place[..., None].expand(-1, -1, x.shape[2]))


def foretold(
    labels: Int[torch.Tensor, "b n"],
    attention_mask: torch.Tensor | None,
    borders: Int[torch.Tensor, " s1"] | None,
    ignored: int,
) -> Int[torch.Tensor, "b n"]:
    """Return labels without those of tokens that no token of their text foretells.

    Those are real tokens that have only padding before them (a column of padding has the output of the real
    token before it, or of the first one: that token's own output would be asked for itself), and where texts
    lie back to back, in rows one after the other, the first token of each.
    """
    n = labels.shape[1]
    if attention_mask is not None:
        real = _real(attention_mask, n).to(labels.device)
        labels = labels.masked_fill(real & (real.cumsum(1) == 1), ignored)
    if borders is not None:
        count = labels.numel()
        begins = borders[1:-1].long().clamp(max=count)  # that is where empty texts at the end begin
        marked = functional.pad(labels.flatten(), (0, 1)).index_fill(0, begins, ignored)
        labels = marked[:count].view(labels.shape)
    return labels


def padding_of(attention_mask: torch.Tensor | None, batch: int, n: int) -> Padding | None:
    """Return the padding among the last n columns of a mask (1 for real tokens); None where there is none.

    On a device this reads one number back, unless a compiler looks. Raises ShapeError for masks of pairs and
    of other sizes.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < n:
        raise ShapeError(
            f"attention_mask must have shape [{batch}, {n} or more], 1 for real tokens, 0 for padding, got "
            f"{tuple(attention_mask.shape)}; there is no matrix of pairs to mask"
        )
    real = _real(attention_mask, n)
    if not traced() and bool(real.all()):
        return None
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    return Padding(order, real.sum(1), (real.cumsum(1) - 1).clamp(min=0))


def _real(attention_mask: torch.Tensor, n: int) -> torch.Tensor:
    """Which of the last n columns are tokens."""
    return attention_mask[:, attention_mask.shape[1] - n :].bool()
