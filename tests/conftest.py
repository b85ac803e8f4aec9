"""Options and Hypothesis profiles of the whole suite."""

from __future__ import annotations

import hypothesis
import pytest

SHARED = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("ci", max_examples=25, **SHARED)
hypothesis.settings.register_profile("quick", max_examples=5, **SHARED)
hypothesis.settings.register_profile("full", max_examples=200, **SHARED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", action="append", metavar="NAME", help="check this backend only (repeatable)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", default=None):
        hypothesis.settings.load_profile("ci")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        from linattn import registry

        known = metafunc.config.getoption("--backend") or list(registry.known())
        metafunc.parametrize("backend", known)


@pytest.fixture(autouse=True)
def _skip_unavailable(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        from linattn import registry

        reason = registry.get(request.getfixturevalue("backend")).unavailable()
        if reason is not None:
            pytest.skip(reason)
