"""Padded rows: real tokens move to the front of their row, as if the others had never been there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from linattn.arrays import traced
from linattn.errors import ShapeError, ValueRangeError
from linattn.models.ids import check_tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of padded rows [b, n] are, on either side or in between.

    order: [b, n], the columns of real tokens first. lengths: [b], real tokens. place: [b, n], for each column
    the place of its token in that order; of padding that of the last real token before it, of padding in
    front of all that of the first one. front: [b, n], padding in front of all real tokens of this call.
    ahead: [b, n], those of them whose last real token was in an earlier call; None where there was none.
    Rows may lie on another device, as those of a model do whose layers are on several.
    """

    order: Int[torch.Tensor, "b n"]
    lengths: Int[torch.Tensor, " b"]
    place: Int[torch.Tensor, "b n"]
    front: Bool[torch.Tensor, "b n"]
    ahead: Bool[torch.Tensor, "b n"] | None = None

    def to_front(self, x: Float[torch.Tensor, "b n e"]) -> Float[torch.Tensor, "b n e"]:
        """Return rows with their real tokens in front."""
        return torch.gather(x, 1, self.order.to(x.device)[..., None].expand_as(x))

    def back(self, x: Float[torch.Tensor, "b n e"]) -> Float[torch.Tensor, "b n e"]:
        """Return every column's output, from rows with their real tokens in front, which may be fewer.

        Padding has that of the last real token before it, or of the first one: who reads the last column of
        a row that is padded on the right, or an encoder's first one, finds what belongs to a token.
        """
        return torch.gather(x, 1, self.place.to(x.device)[..., None].expand(-1, -1, x.shape[2]))

    def after(
        self, x: Float[torch.Tensor, "b n e"], before: Float[torch.Tensor, "b e"] | None = None
    ) -> Float[torch.Tensor, "b n e"]:
        """Return every column's output of a causal model: as `back`, but zeros in front of all real tokens.

        A copy of the first token's output there would know the token that the column seems to foretell, and
        a loss of one's own would teach the model to copy. before: outputs of the rows' last real tokens in
        earlier calls, which then go on.
        """
        found = self.back(x).masked_fill(self.front.to(x.device)[..., None], 0)
        if before is None or self.ahead is None:
            return found
        return torch.where(self.ahead.to(x.device)[..., None], before[:, None], found)


def padding_of(
    attention_mask: torch.Tensor | None,
    batch: int,
    n: int,
    begun: torch.Tensor | None = None,
    before: int = 0,
) -> Padding | None:
    """Return the padding among n columns, of a mask of those (1 for real tokens) or of those and all before.

    None where there is none. begun: [b], which rows had real tokens in earlier calls. before: columns that
    earlier calls have read. On a device this reads two numbers back, unless a
    compiler looks. Raises ArgumentTypeError for what is no tensor, ShapeError for masks of pairs and of other
    sizes, ValueRangeError for other values than 0 and 1.
    """
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    shape = attention_mask.shape
    if len(shape) != 2 or shape[0] != batch or (shape[1] != n and shape[1] != before + n):
        wide = f"{n} or {before + n}" if before else f"{n}"
        raise ShapeError(
            f"attention_mask must have shape [{batch}, {wide}], 1 for real tokens, 0 for padding, got "
            f"{tuple(shape)}; there is no matrix of pairs to mask"
        )
    real = real_tokens(attention_mask, n)
    if not traced():
        other = (attention_mask != 0) & (attention_mask != 1)
        whole, wrong = torch.stack([real.all(), other.any()]).tolist()
        if wrong:
            raise ValueRangeError(
                "attention_mask must hold 1 for real tokens and 0 for padding, got "
                f"{attention_mask[other][0].item()}; masks that are added to scores are not taken"
            )
        if whole:
            return None
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    count = real.cumsum(1)
    front = count == 0
    ahead = None if begun is None else front & begun.to(real.device)[:, None]
    return Padding(order, real.sum(1), (count - 1).clamp(min=0), front, ahead)


def real_tokens(attention_mask: torch.Tensor, n: int) -> torch.Tensor:
    """Which of the last n columns are tokens."""
    return attention_mask[:, attention_mask.shape[1] - n :].bool()
