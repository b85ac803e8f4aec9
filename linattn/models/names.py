"""Names that are nearly others: of fields and keywords, which may be misspelt."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch

from linattn.errors import OptionError

__all__ = ["check_field", "meant"]

LONG = 6  # letters of a word that one wrong letter does not make another word


def check_field(kind: str, name: str, known: Collection[str]) -> None:
    """Raise OptionError for a field that a class has not, but for a slip of the hand."""
    if (field := meant(name, known)) is not None:
        raise OptionError(f"{kind} has no field {name!r}, did you mean {field}?")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # no search in graphs
def meant(name: str, known: Collection[str]) -> str | None:
    """Return the known name that another one is but for a slip of the hand; None where there is none.

    A slip is a letter too few, too many, or in its neighbour's place, and a wrong one in a word of at least
    `LONG`: bos_token_id and eot_token_id are not eos_token_id.
    """
    if name in known:
        return None
    return next((one for one in known if _slipped(name, one)), None)


def _slipped(name: str, to: str) -> bool:
    if abs(len(name) - len(to)) > 1:
        return False
    pairs = itertools.zip_longest(name, to)
    at = next(place for place, (one, other) in enumerate(pairs) if one != other)  # the first that differs
    if len(name) != len(to):
        short, long = sorted((name[at:], to[at:]), key=len)
        return long[1:] == short
    if name[at:] == to[at + 1 : at + 2] + to[at] + to[at + 2 :]:
        return True
    word = to[:at].rpartition("_")[2] + to[at:].partition("_")[0]
    return name[at + 1 :] == to[at + 1 :] and len(word) >= LONG
