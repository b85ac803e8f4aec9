"""The suite itself: every lie is caught, and every property is the only one that catches some lie."""

from __future__ import annotations

import pytest

from linattn.testing import PROPERTIES
from linattn.testing.check import check
from tests.suite import lies_elsewhere, lies_forward, lies_rare
from tests.suite.liars import LIES, Liar

assert lies_elsewhere and lies_forward and lies_rare  # importing them fills LIES

ALONE = [name for name, lie in LIES.items() if lie.alone]


def test_there_are_many_lies() -> None:
    assert len(LIES) >= 30


def test_every_property_has_a_lie_of_its_own() -> None:
    assert {LIES[name].alone for name in ALONE} == set(PROPERTIES)


@pytest.mark.parametrize("name", LIES)
def test_is_caught(name: str) -> None:
    lie = LIES[name]
    only = [lie.alone] if lie.alone else None
    if lie.where == "decode" and only is None:
        only = [other for other in PROPERTIES if "decode" in other]
    report = check(Liar(lie), examples=3, shrink=False, until_failure=True, only=only)
    assert not report.ok
    assert report.failures[0].message


@pytest.mark.parametrize("name", ALONE)
def test_survives_without_its_property(name: str) -> None:
    rest = [other for other in PROPERTIES if other != LIES[name].alone]
    report = check(Liar(LIES[name]), quick=True, shrink=False, only=rest)
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_survives_many_examples_without_its_property(name: str) -> None:
    rest = [other for other in PROPERTIES if other != LIES[name].alone]
    report = check(Liar(LIES[name]), examples=3, shrink=False, only=rest)
    assert report.ok, str(report)
