"""Padded rows: real tokens move to the front of their row, as if the others had never been there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from linattn.errors import ShapeError
from linattn.surroundings import traced

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
    labels: Int[torch.Tensor, "b n"], attention_mask: torch.Tensor | None, ignored: int
) -> Int[torch.Tensor, "b n"]:
    """Return labels without those of real tokens that have only padding before them.

    A column of padding has the output of the real token before it, or of the first one: that token's own
    output would be asked for itself.
    """
    n = labels.shape[1]
    if attention_mask is None:
        return labels
    real = attention_mask[:, attention_mask.shape[1] - n :].to(labels.device).bool()
    return labels.masked_fill(real & (real.cumsum(1) == 1), ignored)


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
    real = attention_mask[:, attention_mask.shape[1] - n :].bool()
    if not traced() and bool(real.all()):
        return None
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    return Padding(order, real.sum(1), (real.cumsum(1) - 1).clamp(min=0))
