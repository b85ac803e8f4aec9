"""Kernels with one thing wrong each: the suite must notice. Run as a program, with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from linattn import testing
from linattn.backends.triton import backward, segments
from linattn.backends.triton import product as product_module
from linattn.backends.triton.launcher import Launcher
from linattn.testing.check import intersection
from linattn.testing.variants import combinations
from tests.triton.drawing import check, drawn, segmented
from tests.triton.interpreted import Interpreted

LONGEST = 70
TWO_WAYS = {"causal": False, "decay": "head"}
FORWARD, GRADIENTS = "matches_the_reference", "gradients_match_the_reference"


@dataclass(frozen=True)
class Mutant:
    """What is wrong, the property that notices, and the options with which it does.

    flags: by kernel, of every launch that has another value. patch: a function of a module, and a function of
    the right one that makes the wrong one.
    """

    caught_by: str
    options: dict[str, Any]
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    patch: tuple[Any, str, Any] | None = None


def returning(place: int, value: int) -> Any:
    """Makes a function whose result has this value everywhere at one place."""

    def made(right: Any) -> Any:
        def wrong(*given: Any) -> Any:
            found = list(right(*given))
            found[place] = found[place] * 0 + value
            return tuple(found)

        return wrong

    return made


def flat(right: Any) -> Any:
    """Makes a slope of 1."""
    return lambda o, *given: o


def nothing(right: Any) -> Any:
    """Makes a function whose result is 0."""
    return lambda *given, **options: right(*given, **options) * 0


MUTANTS = {
    "a token counts itself twice": Mutant(FORWARD, TWO_WAYS, {"product": {"STRICT": False}}),
    "two directions do not add up": Mutant(FORWARD, TWO_WAYS, {"product": {"RAW": 1}}),
    "keys do not fade on their way to the state": Mutant(
        FORWARD, {"causal": True, "decay": "head"}, patch=(product_module, "decays", returning(2, 1))
    ),
    "the state does not fade on its way to queries": Mutant(
        FORWARD, {"causal": True, "decay": "token"}, patch=(product_module, "decays", returning(1, 1))
    ),
    "segments do not fade": Mutant(FORWARD, {"causal": True, "decay": "head"}, {"scan": {"DECAY": 0}}),
    "segments are passed in one order only": Mutant(
        GRADIENTS, {"causal": True}, {"scan": {"REVERSE": False}}
    ),
    "masked keys count": Mutant("takes_masked_keys_as_zero", {}, {"product": {"MASK": 0}}),
    "lengths are not read": Mutant("cuts_at_lengths", {}, {"product": {"BORDERS": 0}}),
    "packed sequences share segments": Mutant(
        "packs_as_if_separate", {}, patch=(segments, "sequence_of", returning(3, 0))
    ),
    "time is not reversed": Mutant(GRADIENTS, {"causal": True}, {"product": {"REVERSE": False}}),
    "the denominator has no gradient": Mutant(GRADIENTS, {"normalize": True}, {"product": {"EXTRA": 0}}),
    "feature maps have no slope": Mutant(
        GRADIENTS, {"feature_map": "silu"}, patch=(product_module, "feature_slope", flat)
    ),
    "rows of a pool are taken in their order": Mutant(
        "continues_only_named_rows",
        {},
        {"product": {"SLOTS": False}, "scan": {"SLOTS": False, "COUNTS": False}},
    ),
    "what a pool has seen is not counted": Mutant(
        "continues_only_named_rows", {}, {"scan": {"COUNTS": False}}
    ),
    "angles do not turn from segment to segment": Mutant(
        GRADIENTS, {"reweight": "lrpe", "causal": True}, patch=(backward, "_crossing", nothing)
    ),
}


@contextlib.contextmanager
def wrong(mutant: Mutant) -> Iterator[None]:
    """Launches go wrong inside."""

    def started(
        self: Launcher,
        programs: int,
        key: Any,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> None:
        flags = mutant.flags.get(self.jit.__name__, {})
        assert flags.keys() <= set(self.jit.arg_names)
        given = zip(self.jit.arg_names, (*arguments, *constants), strict=True)
        self.jit[(programs,)](*(flags.get(name, value) for name, value in given), **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launcher, "__call__", started))
        if mutant.patch is not None:
            module, name, make = mutant.patch
            stack.enter_context(mock.patch.object(module, name, make(getattr(module, name))))
        yield


def survives(mutant: Mutant) -> bool:
    """Whether a wrong kernel passes where the right one does."""
    of, name = Interpreted("cut"), mutant.caught_by
    axes = intersection(of.axes(), testing.PROPERTIES[name].axes, mutant.options)
    assert axes is not None
    try:
        with wrong(mutant):
            check(of, name, (drawn(name, row, [LONGEST]) for row in combinations(**axes)))
    except AssertionError:
        return False
    return True


if __name__ == "__main__":
    with segmented(32, 16):
        left = [name for name, mutant in MUTANTS.items() if survives(mutant)]
    if left:
        sys.exit(f"no property notices that {', that '.join(left)}")
