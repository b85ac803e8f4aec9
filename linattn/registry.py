"""Which backends exist, which can run here, and which one takes a call."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Union

from linattn.errors import ArgumentTypeError, UnknownBackendError, UnsupportedError
from linattn.problem import Problem

if TYPE_CHECKING:
    from linattn.backends import Backend
    from linattn.state import State

BackendLike = Union[str, Sequence[str], "Backend"]

SEPARATOR = "\n"  # between names in a key; no name has a line break

_chosen: ContextVar[str | tuple[str, ...]] = ContextVar("linattn backend", default="auto")
_objects: dict[
    str, Backend
] = {}  # backends that were passed as objects, so that compiled graphs can name them


@functools.cache
def known() -> dict[str, Backend]:
    """Every backend by name: built-in ones in order of preference, then installed `linattn.backends` entry
    points. One that cannot be loaded is among them, and says so as `unavailable`.
    """
    from linattn.backends import BUILTIN

    found: dict[str, Backend] = {}
    for path in BUILTIN:
        backend = importlib.import_module(path).backend
        found[backend.name] = backend
    for entry in entry_points(group="linattn.backends"):
        backend = _loaded(entry)
        if backend.name in found:
            backend = Unusable(
                f"{entry.name} ({entry.value})", f"its name, {backend.name!r}, is taken already"
            )
        found[backend.name] = backend
    return found


def _loaded(entry: EntryPoint) -> Backend:
    """A plugin's backend, or one that says why there is none: a bad plugin must not stop the rest."""
    from linattn.backends import Backend

    try:
        backend = entry.load()
    except (ImportError, AttributeError) as error:
        return Unusable(entry.name, f"its entry point {entry.value} cannot be loaded: {error}")
    if not isinstance(backend, Backend):
        return Unusable(
            entry.name, f"its entry point {entry.value} is no Backend but {type(backend).__name__}"
        )
    return backend


class Unusable:
    """Stands in for a plugin that cannot be loaded: listed, never chosen."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why
        self.arrays: Mapping[str, bool] = {"numpy": False, "torch": False, "cupy": False}

    def unavailable(self) -> str | None:
        return self.why

    def unsupported(self, problem: Problem) -> str | None:
        return self.why

    def forward(self, problem: Problem, *arrays: object) -> tuple[object, State | None]:
        """Never reached: `choose` asks `unavailable` first."""
        raise UnsupportedError(problem, {self.name: self.why})


def available_backends() -> dict[str, str | None]:
    """Return every backend's name with None if it is usable here, or the sentence that says why not."""
    return {name: backend.unavailable() for name, backend in known().items()}


def get(name: str) -> Backend:
    """Return the backend of a name. Raises UnknownBackendError."""
    if name in _objects:
        return _objects[name]
    try:
        return known()[name]
    except KeyError:
        names = ", ".join(known())
        raise UnknownBackendError(f"no backend named {name!r}; known: {names}") from None


def key_of(backend: BackendLike) -> str:
    """A string that `names_of` turns back into this choice: what a compiled graph carries."""
    if isinstance(backend, str):
        return backend
    if isinstance(backend, Sequence):
        if not backend or not all(isinstance(name, str) for name in backend):
            raise ArgumentTypeError(f"backend must name at least one backend, got {backend!r}")
        return SEPARATOR.join(backend)
    name = getattr(backend, "name", None)
    if isinstance(name, str) and known().get(name) is backend:
        return name
    from linattn.backends import Backend

    if not isinstance(backend, Backend):
        raise ArgumentTypeError(
            f"backend must be 'auto', a name, a sequence of names or a Backend, got {type(backend).__name__}"
        )
    key = f"{backend.name} at {id(backend):#x}"
    _objects[key] = backend
    return key


def names_of(key: str, kind: str) -> list[str]:
    """The candidates of a choice, in order; for "auto" those that take this kind of array unasked."""
    if key == "auto":
        return [name for name, backend in known().items() if backend.arrays.get(kind, False)]
    return key.split(SEPARATOR)


def requested(backend: BackendLike) -> str:
    """The key of the argument, or of `use_backend` around it if the argument is "auto"."""
    key = backend if isinstance(backend, str) else key_of(backend)
    return key_of(_chosen.get()) if key == "auto" else key


def reason(backend: Backend, problem: Problem) -> str | None:
    """Why a backend does not take a problem, in one sentence, or None."""
    if problem.kind not in backend.arrays:
        return f"takes {' or '.join(backend.arrays)} arrays, got {problem.kind}"
    return backend.unavailable() or backend.unsupported(problem)


def choose(problem: Problem, key: str) -> Backend:
    """Return the first candidate that takes the problem. Never runs it, so never hides a failure.

    Raises UnknownBackendError for a name that does not exist, UnsupportedError with every candidate's reason.
    """
    reasons: dict[str, str] = {}
    for backend in [get(name) for name in names_of(key, problem.kind)]:
        why = reason(backend, problem)
        if why is None:
            return backend
        reasons[backend.name] = why
    if not reasons:
        reasons["auto"] = f"no backend takes {problem.kind} arrays unasked"
    raise UnsupportedError(problem, reasons)


@contextlib.contextmanager
def use_backend(backend: str | Sequence[str]) -> Iterator[None]:
    """Calls inside that leave `backend` at "auto" use this one. Raises UnknownBackendError at once."""
    key = key_of(backend)
    if key != "auto":
        for name in key.split(SEPARATOR):
            get(name)
    token = _chosen.set(key)
    try:
        yield
    finally:
        _chosen.reset(token)
