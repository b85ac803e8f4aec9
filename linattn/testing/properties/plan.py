"""What the properties share: where each is worth trying, and what its results may differ by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from linattn import reference, tolerance
from linattn.arrays import Array
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import assert_within
from linattn.testing.subject import LETTERS, Subject, rounding

Parts = dict[str, Array]

SHORT = 220
"""Lengths up to here are compared with the quadratic definition and its bound, longer ones with
`tolerance.far`.
"""

LONG = (700, 1100, 1777)
"""Lengths that the quadratic reference cannot reach in a test's time."""


@dataclass(frozen=True)
class Property:
    """A property and the cases that are worth trying on it.

    axes: the option combinations to which it applies. fixed: fields of the case. sizes: lengths to draw from
    (empty: the usual edges up to `longest`). wide: features or heads as models have them.
    """

    name: str
    check: Callable[[Any, Case], None]
    summary: str
    axes: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    longest: int = 200
    layouts: tuple[str, ...] = ("plain",)
    wide: bool = False


PROPERTIES: dict[str, Property] = {}
"""Every property by name, in the order in which they are reported."""


def holds(
    axes: Mapping[str, Any] | None = None, **plan: Any
) -> Callable[[Callable[[Any, Case], None]], Callable[[Any, Case], None]]:
    """Register a property; the first line of its docstring is what reports print."""

    def register(check: Callable[[Any, Case], None]) -> Callable[[Any, Case], None]:
        name = check.__name__
        summary = " ".join((check.__doc__ or "").partition("\n\n")[0].split())
        PROPERTIES[name] = Property(name, check, summary, axes or {}, **plan)
        return check

    return register


def truth(x: Inputs) -> Parts:
    """What the definition says: o, and for causal calls the final state."""
    o, state = reference.attention(x.q, x.k, x.v, **x.options())
    return parts_of(x, o, state)


def parts_of(x: Inputs, o: Array, state: Any) -> Parts:
    """Outputs and a reference's state, as the parts of a result."""
    if state is None or not x.case.causal:
        return {"o": o}
    found = {"o": o, "kv": state[0]}
    return found if state[1] is None else found | {"z": state[1]}


def limits(of: Subject, x: Inputs, *, decode: bool = False) -> Parts:
    """Allowed errors of one computed result against the definition."""
    round_ = rounding(of, x.case, decode=decode)
    if max(x.case.n, x.case.keys) <= SHORT or not x.case.causal:
        b = tolerance.bound(x.q, x.k, x.v, rounding=round_, **x.options())
        return parts_of(x, b.o, (b.kv, b.z))
    o, state = tolerance.far(x.q, x.k, x.v, rounding=round_, **x.options())
    return parts_of(x, o, state)


def assert_parts(got: Parts, want: Parts, allowed: Parts, x: Inputs, label: str = "") -> None:
    """Assert that every part that both have is within its bound."""
    for name in ("o", "kv", "z"):
        if name in want and name in got:
            dtype = x.case.dtype if name == "o" else x.case.accumulate
            assert_within(label + name, LETTERS[name], got[name], want[name], allowed[name], dtype)


def twice(allowed: Parts) -> Parts:
    """Allowed difference of two computed results."""
    return {name: 2 * limit for name, limit in allowed.items()}


def rng_of(case: Case) -> np.random.Generator:
    """Randomness beside the inputs' own: where to cut, what to change."""
    return np.random.default_rng([case.seed, 1])
