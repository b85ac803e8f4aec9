"""Which backend runs: the order, the argument, the context, plugins, and the same decision explained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import State, backends, errors, registry, route
from linattn.backends import Backend
from linattn.problem import Problem


class Plugin:
    """A third party's backend: NumPy and torch, forward only, and no decay."""

    name = "mine"
    arrays = {"numpy": True, "torch": False}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls = 0

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, problem: Problem) -> str | None:
        return "has no decay" if problem.decay else None

    def forward(self, problem: Problem, *arrays: Any) -> Any:
        self.calls += 1
        return registry.get(problem.kind).forward(problem, *arrays)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    mine = Plugin()
    found = registry.known() | {"mine": mine}
    monkeypatch.setattr(registry, "known", lambda: found)
    yield mine


X = np.random.default_rng(0).standard_normal((1, 6, 2, 3))
T = torch.from_numpy(X)


def test_every_builtin_is_a_backend() -> None:
    for name, backend in registry.known().items():
        assert isinstance(backend, Backend)
        assert backend.name == name
    assert list(linattn.available_backends())[: len(backends.BUILTIN)] == [
        "triton",
        "cupy",
        "torch",
        "numpy",
        "reference",
    ]
    reasons = linattn.available_backends()
    assert {reasons[name] for name in ("torch", "numpy", "reference")} == {None}


def test_auto_never_takes_the_reference() -> None:
    assert linattn.explain(X, X, X).chosen == "numpy"
    assert linattn.explain(T, T, T).chosen == "torch"
    assert "reference" not in registry.names_of("auto", "numpy")


def test_the_argument_wins_over_the_context(plugin: Plugin) -> None:
    with linattn.use_backend("mine"):
        linattn.attention(X, X, X)
        assert plugin.calls == 1
        linattn.attention(X, X, X, backend="numpy")
        assert plugin.calls == 1
    linattn.attention(X, X, X)
    assert plugin.calls == 1


def test_an_order_of_names_takes_the_first_that_can(plugin: Plugin) -> None:
    linattn.attention(X, X, X, backend=["mine", "numpy"])
    assert plugin.calls == 1
    linattn.attention(X, X, X, log_decay=-np.ones(2), backend=["mine", "numpy"])
    assert plugin.calls == 1


def test_an_explicit_backend_never_falls_back(plugin: Plugin) -> None:
    with pytest.raises(errors.UnsupportedError, match="mine  has no decay"):
        linattn.attention(X, X, X, log_decay=-np.ones(2), backend="mine")


def test_explain_is_the_decision(plugin: Plugin) -> None:
    decided = linattn.explain(X, X, X, log_decay=-np.ones(2), backend=["mine", "numpy"])
    assert decided.chosen == "numpy"
    assert decided.reasons == {"mine": "has no decay", "numpy": None}
    assert str(decided).splitlines() == [
        "call: b=1 n=6 h=2 d=3 e=3, float64, numpy on cpu, causal, decay per head",
        "  mine   has no decay",
        "  numpy  runs",
    ]
    assert linattn.explain(X, X, X, log_decay=-np.ones(2), backend="mine").chosen is None


def test_a_backend_object_runs_without_a_name() -> None:
    mine = Plugin()
    assert np.array_equal(linattn.attention(X, X, X, backend=mine), linattn.attention(X, X, X))
    q = T.clone().requires_grad_()
    linattn.attention(q, q, q, backend=mine).sum().backward()
    assert mine.calls == 2
    with pytest.raises(errors.UnknownBackendError):
        registry.get("mine")


def test_a_forward_is_enough_for_gradients(plugin: Plugin) -> None:
    want = T.clone().requires_grad_()
    linattn.attention(want, want, want).sum().backward()
    got = T.clone().requires_grad_()
    linattn.attention(got, got, got, backend="mine").sum().backward()
    assert torch.equal(got.grad, want.grad)  # type: ignore[arg-type]
    _, vjp = linattn.attention_vjp(X, X, X, backend="mine")
    assert np.array_equal(vjp(np.ones_like(X))["v"], linattn.attention_vjp(X, X, X)[1](np.ones_like(X))["v"])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("slots", [None, [2, -1]])
def test_a_forward_is_enough_to_decode(plugin: Plugin, kind: str, slots: list[int] | None) -> None:
    x: Any = np.random.default_rng(1).integers(-3, 4, (2, 2, 3)).astype(np.float64)  # exact, in any order
    place: Any = None if slots is None else np.array(slots)
    if kind == "torch":
        x, place = torch.from_numpy(x), None if place is None else torch.from_numpy(place)
    states = [State.zeros(x, 3 if slots else 2, 2, 3, 3) for _ in range(2)]
    outputs = [
        linattn.decode_step(x, x, x, state, slots=place, backend=name)
        for state, name in zip(states, ("mine", kind), strict=True)
    ]
    assert plugin.calls == 1
    assert np.array_equal(np.asarray(outputs[0]), np.asarray(outputs[1]))
    assert np.array_equal(np.asarray(states[0].kv), np.asarray(states[1].kv))
    assert states[0].length.tolist() == ([0, 0, 1] if slots else [1, 1])


def test_backward_goes_to_the_builtin_for_the_same_arrays(plugin: Plugin) -> None:
    assert not isinstance(plugin, backends.Differentiable)
    assert isinstance(registry.get("numpy"), backends.Differentiable)
    assert route.get is registry.get


def test_importing_the_library_imports_no_framework() -> None:
    heavy = ("torch", "triton", "cupy", "typer", "rich", "hypothesis")
    code = f"import sys, linattn; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_names_versions_and_backends() -> None:
    facts = linattn.environment()
    assert facts["linattn"] == linattn.__version__
    assert facts["numpy"] == np.__version__
    assert facts["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["backends"].split(", ")[:3] == ["torch", "numpy", "reference"]


class Entry:
    """An installed entry point, as importlib.metadata gives them."""

    def __init__(self, name: str, found: Any) -> None:
        self.name, self.value, self.found = name, f"{name}_package:backend", found

    def load(self) -> Any:
        if isinstance(self.found, ImportError):
            raise self.found
        return self.found


class Namesake(Plugin):
    name = "numpy"


def test_a_bad_plugin_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = [
        Entry("broken", ImportError("no module named 'gone'")),
        Entry("odd", 3),
        Entry("same", Namesake()),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: plugins)
    found = registry.known.__wrapped__()
    monkeypatch.setattr(registry, "known", lambda: found)
    assert registry.get("numpy") is found["numpy"]
    assert not isinstance(found["numpy"], Namesake)
    assert np.array_equal(linattn.attention(X, X, X), linattn.attention(X, X, X, backend="numpy"))
    reasons = linattn.available_backends()
    assert (
        reasons["broken"] == "its entry point broken_package:backend cannot be loaded: no module named 'gone'"
    )
    assert reasons["odd"] == "its entry point odd_package:backend is no Backend but int"
    assert reasons["same (same_package:backend)"] == "its name, 'numpy', is taken already"
    with pytest.raises(errors.UnsupportedError, match="cannot be loaded"):
        linattn.attention(X, X, X, backend="broken")
