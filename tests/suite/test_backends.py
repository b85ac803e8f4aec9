"""Every property on every backend: the conformance suite in pytest."""

from __future__ import annotations

import contextlib

import hypothesis
import pytest
from hypothesis import strategies as st

from linattn import testing
from linattn.testing.check import intersection, strategy
from linattn.testing.variants import combinations

PROPERTIES = sorted(testing.PROPERTIES)


def rows(of: testing.Subject, plan: testing.Property, full: bool = False) -> list[dict]:
    axes = intersection(of.axes(), plan.axes)
    assert axes is not None
    return combinations(full, **axes)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(backend: str, name: str) -> None:
    of, plan = testing.subject(backend), testing.PROPERTIES[name]
    chosen = st.sampled_from(rows(of, plan)).flatmap(lambda row: strategy(plan, row))

    @hypothesis.given(case=chosen)
    def holds(case: testing.Case) -> None:
        with contextlib.suppress(testing.NotOffered):
            plan.check(of, case)

    holds()


@pytest.mark.parametrize("name", PROPERTIES)
def test_property_is_tried(backend: str, name: str) -> None:
    """Refusals are counted: a property that a built-in backend never offers would pass unseen above."""
    finding = testing.check_backend(backend, only=[name], quick=True).findings[0]
    assert (finding.status, finding.message) == ("pass", "")
    assert finding.examples >= finding.variants > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_property_on_every_combination(backend: str, name: str) -> None:
    finding = testing.check_backend(backend, only=[name], full=True, examples=1).findings[0]
    assert (finding.status, finding.message) == ("pass", "")
