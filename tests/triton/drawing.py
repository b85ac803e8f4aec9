"""Cases for the Triton kernels: options in pairs, sizes at blocks' edges, sequences whole or cut."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from linattn import testing
from linattn.testing.check import intersection
from linattn.testing.strategies import EDGES
from linattn.testing.variants import Options, combinations, fields_of

WIDTHS = ((1, 1), (3, 2), (5, 17), (16, 16), (20, 3), (8, 33))
"""Features d and e of q and v. Kernels are compiled for each pair, so a row of options has one of them."""


def rows(of: testing.Subject, name: str, full: bool = False) -> list[Options]:
    """The combinations of options that a property is tried on."""
    axes = intersection(of.axes(), testing.PROPERTIES[name].axes)
    assert axes is not None
    return combinations(full, **axes)


def drawn(name: str, row: Options, lengths: Sequence[int] = (), example: int = 0) -> testing.Case:
    """One case of a property with these options: the same one whenever it is asked for.

    lengths: of sequences, as far as the property is worth trying on them; where none is, its own.
    """
    plan = testing.PROPERTIES[name]
    d, e = random.Random(str(row)).choice(WIDTHS)
    rng = random.Random(f"{name} {row} {example}")
    least = min(plan.sizes, default=0)
    lengths = [n for n in lengths if least <= n <= plan.longest]
    lengths = lengths or plan.sizes or [n for n in EDGES if n <= plan.longest]
    fields: dict[str, Any] = {
        "n": rng.choice(lengths),
        "batch": rng.choice([1, 1, 2]),
        "heads": rng.choice([1, 1, 2]),
        "d": d,
        "e": e,
        "sequences": rng.choice([1, 2, 4]),
        "rates": tuple(sorted(rng.sample(testing.RATES, 3))),
        "values": rng.choice([1.0, 8.0]),
        "layout": rng.choice(plan.layouts),
        "seed": rng.randrange(1 << 16),
    }
    if not row["causal"] and row["borders"] is None and rng.random() < 0.5:
        fields["m"] = rng.choice([0, 1, 17, 90])
    return testing.Case(**(fields_of(row) | fields | dict(plan.fixed)))


def check(of: testing.Subject, name: str, cases: Iterator[testing.Case]) -> int:
    """Assert a property on every case; how many of them were offered."""
    tried = 0
    for case in cases:
        try:
            testing.PROPERTIES[name].check(of, case)
        except testing.NotOffered:
            continue
        except AssertionError as error:
            error.add_note(testing.check.pasteable(of, name, case))
            raise
        tried += 1
    return tried


@contextlib.contextmanager
def segmented(grain: int, block: int = 0, *, across: bool = True) -> Iterator[None]:
    """Cut sequences into segments of so few tokens that short calls have several of them.

    block: tokens and values that a program works on at a time; 0 leaves the shipped configurations. across:
    how it holds its state, where it may choose.
    """
    from linattn.backends.triton import backward, launch, launcher, plan

    changes: list[tuple[Any, str, Any]] = [
        (plan, "GRAIN", grain),
        (plan, "LEAST_SEGMENT", grain // 2),
        (plan, "FULL", 64),
        (backward, "ANGLE_SEGMENT", grain),
        (launch, "total_size", lambda problem: grain),
        (backward, "total_size", lambda problem: grain),
    ]
    if block:
        shape = plan.Blocks(block, block, 4, 1, across)
        changes += [(plan, "blocks", lambda *sizes, **device: shape), (plan, "UPRIGHT", block)]
    plan.segments.cache_clear()
    launcher._tapes.clear()  # passes that are remembered as they were
    with contextlib.ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
    plan.segments.cache_clear()
    launcher._tapes.clear()


@contextlib.contextmanager
def carried() -> Iterator[list[bool]]:
    """Whether the states of each pass in segments are added up by those who read them."""
    from linattn.backends.triton import backward, launch

    folded: list[bool] = []
    right = launch.carried

    def noting(*given: Any, **named: Any) -> Any:
        states = right(*given, **named)
        folded.append(states.fold)
        return states

    with mock.patch.object(launch, "carried", noting), mock.patch.object(backward, "carried", noting):
        yield folded
