"""What a model remembers of a text: one state a layer, of constant size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from transformers import Cache

from linattn.errors import ShapeError, StateError, ValueRangeError
from linattn.models.huggingface.padding import Padding
from linattn.models.ids import check_tensor
from linattn.state import State

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["StateCache"]


class StateCache(Cache):
    """A `past_key_values` of states.

    states: one `linattn.State` a layer, float32 (float64 for float64 weights), empty before the first call.
    A step of one token changes them in place; `copy.deepcopy` keeps a prompt's for another continuation.
    `generate` with several beams or answers a prompt continues a copy with a row for each.
    outputs: what the model gave for each text's last real token, [b, e]: its normed rows, after those of all
    layers where hidden states were asked for. A text that is padded while others go on still ends with them.
    get_seq_length counts columns of input, padding included; the states' own lengths count real tokens.

    crop raises StateError: what a state has added up cannot be taken out again.
    """

    is_compileable = False
    is_initialized = True
    is_croppable = False
    is_sliding: ClassVar[list[bool]] = []  # there are no layers of keys
    is_linear: ClassVar[list[bool]] = [False]  # what it has seen is left out of prompts, as with keys

    # whether gradients end at what has filled it, as torch's reentrant checkpoints pass none; in this call
    severed = severs = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State] = []
        self.outputs: list[Float[torch.Tensor, "b e"]] = []
        self.columns = 0

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(states={len(self.states)}, columns={self.columns}, bytes={self.nbytes})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that shares no memory with this one, and none of the graph that gradients would take.

        Outside of inference mode the copy of a cache that was made in it is as any other.
        """
        made = copy.copy(self)
        memo[id(self)] = made
        with torch.no_grad():
            for parts in (self.states, self.outputs):
                for one in parts:
                    if id(one) not in memo:
                        memo[id(one)] = one.clone()
                memo[id(parts)] = [memo[id(one)] for one in parts]
        for name, value in vars(self).items():
            setattr(made, name, copy.deepcopy(value, memo))
        made.severed = False  # who copies has asked for it
        return made

    @property
    def rows(self) -> int:
        """How many texts were seen; 0 before the first call."""
        return len(self.states[0].length) if self.states else 0

    @property
    def batch_size(self) -> int:
        """The same: a name of transformers'."""
        return self.rows

    max_batch_size = batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of all states; the same after one token and after a million."""
        arrays = (x for s in self.states for x in (s.kv, s.z) if x is not None)
        return sum(x.numel() * x.element_size() for x in arrays)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input seen so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no longest text."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask over everything seen and a query has, and the first one's index."""
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was seen."""
        return bool(self.states)

    def has_graph(self) -> bool:
        """Whether gradients reach what has filled it."""
        return any(state.kv.grad_fn is not None for state in self.states)

    def states_for(self, count: int, rows: int) -> list[State]:
        """The states of so many texts, for a model that has `count` of them; none before the first call.

        Raises StateError for another number of either: another model, or other texts, were seen.
        """
        if self.states and len(self.states) != count:
            raise StateError(
                f"past_key_values of this model hold {count} states, got {len(self.states)}: they are of "
                "another model"
            )
        if self.states and self.states[0].length.shape[0] != rows:
            raise StateError(f"past_key_values are of {self.rows} texts, the input is of {rows}")
        return self.states

    def begun(self) -> Int[torch.Tensor, " b"] | None:
        """Which texts have real tokens; None before the first call."""
        return self.states[0].length > 0 if self.states else None

    def before(self, count: int, padding: Padding | None) -> Sequence[torch.Tensor | None]:
        """The last `count` of outputs, for rows with padding; None for those that are not here.

        Raises StateError where such are those of a text of which no token is new.
        """
        if padding is None or padding.ahead is None:
            return [None] * count
        found = self.outputs[-count:]
        if len(found) < count and not torch.compiler.is_compiling():
            bare = padding.ahead.all(1)
            if bool(bare.any()):
                raise StateError(
                    f"row {int(bare.nonzero()[0])} has only padding, and its last token's outputs are not in "
                    "past_key_values: ask for hidden states in every call, or in none"
                )
        return [None] * (count - len(found)) + found

    def keep(self, rows: Sequence[Float[torch.Tensor, "b n e"]], borders: torch.Tensor | None = None) -> None:
        """Keep what was given for each text's last real token: the last column, padded or not.

        borders: where texts begin that lie back to back in one row, and end.
        """
        self.severed = self.severed or self.severs
        if not rows[-1].shape[1]:
            return
        if borders is None:
            # one column is kept as it is: a copy would be a kernel a token
            self.outputs = [row[:, 0] if row.shape[1] == 1 else row[:, -1].clone() for row in rows]
            return
        ends = (borders[1:] - 1).clamp(min=0)
        after = [row[0].index_select(0, ends.to(row.device)) for row in rows]
        if self.outputs:
            empty = (borders.diff() == 0)[:, None]
            count = min(len(after), len(self.outputs))
            after = [
                torch.where(empty.to(new.device), old, new)
                for old, new in zip(self.outputs[-count:], after[-count:], strict=True)
            ]
        self.outputs = after

    def check_seen(self, mask: torch.Tensor | None, n: int) -> None:
        """Compare a mask over everything, n new columns last, with what the states hold.

        Generation leaves them apart: rows that have ended go on with padding until the last one ends. Raises
        StateError where the mask calls tokens padding that a state holds, or the other way round.
        """
        if mask is None or not self.states or torch.compiler.is_compiling():
            return
        if mask.ndim != 2 or mask.shape[1] != self.columns + n:
            return
        held = self.states[0].length.to(mask.device)
        wanted = mask[:, : self.columns].bool().sum(1)
        if bool((wanted != held).any()):
            row = int((wanted != held).nonzero()[0])
            raise StateError(
                f"attention_mask has {int(wanted[row])} real tokens among the columns that the cache has "
                f"seen, its state of row {row} holds {int(held[row])}: read that text again"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row b goes on from what row beam_idx[b] has seen.

        Raises ArgumentTypeError for what is no tensor, and what `State.select` does.
        """
        check_tensor("beam_idx", beam_idx)
        self.states = [state.select(beam_idx.to(state.kv.device)) for state in self.states]
        self.outputs = [row.index_select(0, beam_idx.to(row.device)) for row in self.outputs]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order, or those where a mask [b] of bool is True.

        Raises ArgumentTypeError for what is no tensor, ShapeError for masks of another number of rows, and
        what `State.select` does.
        """
        check_tensor("indices", indices)
        if indices.dtype == torch.bool:
            if list(indices.shape) != [self.rows]:
                raise ShapeError(f"a mask of rows must have shape [{self.rows}], got {list(indices.shape)}")
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other. Raises ValueRangeError for less than once."""
        if type(repeats) is not int or repeats < 1:
            raise ValueRangeError(f"repeats must be an int of at least 1, got {repeats!r}")
        if self.states:
            rows = torch.arange(self.rows, device=self.states[0].kv.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.outputs, self.columns, self.severed = [], [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise StateError unless nothing is to be removed."""
        if tokens_to_remove:
            raise StateError(
                "a state of linear attention cannot be rolled back: keep a copy (copy.deepcopy) from before, "
                "or generate without an assistant model"
            )

    def activate_past_recording(self) -> None:
        """Raise StateError: assisted generation wants to roll back."""
        self.crop(1)
