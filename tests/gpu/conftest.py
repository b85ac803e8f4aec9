"""On a GPU: how much is tried, what the header says, and the one sentence where there is no GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        dest="all_rows",
        help="every combination of options, not only every pair",
    )
    if not pluginmanager.hasplugin("timeout"):  # these tests run where no more than pytest is installed
        parser.addini("timeout", "without pytest-timeout nothing ends a test that hangs")


@functools.cache
def why_not() -> str | None:
    """The sentence that says why nothing here can run, or None."""
    from linattn import registry

    return registry.get("triton").unavailable()


def pytest_report_header(config: pytest.Config) -> list[str]:
    import linattn

    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")  # environment() names the devices of what is imported already
    return [f"{name}: {fact}" for name, fact in linattn.environment().items()]


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"needs a GPU that Triton compiles for; this machine: {reason}")


@pytest.fixture(params=["head", "token", "lrpe", "cosformer", "both ways", "no way"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keywords of a call, one kind after the other."""
    import torch

    from tests.gpu.calls import OPTIONS

    torch.manual_seed(0)
    return OPTIONS[request.param]()
