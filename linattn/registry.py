"""Which backends exist, which can run here, and which one takes a call."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Union

from linattn.errors import ArgumentTypeError, UnknownBackendError, UnsupportedError
from linattn.problem import Problem

if TYPE_CHECKING:
    from linattn.backends import Backend

BackendLike = Union[str, Sequence[str], "Backend"]

_chosen: ContextVar[str | tuple[str, ...]] = ContextVar("linattn backend", default="auto")
_objects: dict[
    str, Backend
] = {}  # backends that were passed as objects, so that compiled graphs can name them


@functools.cache
def known() -> dict[str, Backend]:
    """Every backend by name: built-in ones in order of preference, then installed `linattn.backends` entry
    points.
    """
    from linattn.backends import BUILTIN

    found = [importlib.import_module(path).backend for path in BUILTIN]
    found += [entry.load() for entry in entry_points(group="linattn.backends")]
    return {backend.name: backend for backend in found}


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
        return ",".join(backend)
    from linattn.backends import Backend

    if not isinstance(backend, Backend):
        raise ArgumentTypeError(
            f"backend must be 'auto', a name, a sequence of names or a Backend, got {type(backend).__name__}"
        )
    if known().get(backend.name) is backend:
        return backend.name
    key = f"{backend.name} at {id(backend):#x}"
    _objects[key] = backend
    return key


def names_of(key: str, kind: str) -> list[str]:
    """The candidates of a choice, in order; for "auto" those that take this kind of array unasked."""
    if key == "auto":
        return [name for name, backend in known().items() if backend.arrays.get(kind, False)]
    return key.split(",")


def requested(backend: BackendLike) -> str:
    """The key of the argument, or of `use_backend` around it if the argument is "auto"."""
    key = key_of(backend)
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
        for name in key.split(","):
            get(name)
    token = _chosen.set(key)
    try:
        yield
    finally:
        _chosen.reset(token)
