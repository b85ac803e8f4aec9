"""Calls that have been checked before: the same facts give the same problem and the same backend.

Only facts are remembered (shapes, strides, dtypes, devices, options), never values or arrays. What decides
about a call is a matter of the library whose arrays it has (`prepared` for torch, `checked` for CuPy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linattn import registry
from linattn.arrays import dtype_name, kind_of
from linattn.checks import Call
from linattn.problem import Problem
from linattn.route import decodes

if TYPE_CHECKING:
    from linattn.backends import Backend

Facts = tuple[Any, ...] | None  # None: there is an unusual argument


class Unusual(Exception):
    """An argument that is not remembered: the call is checked as if it were the first of its kind."""


@dataclass(slots=True, eq=False)
class Known:
    """What follows from the facts of a call."""

    problem: Problem
    backend: Backend
    on_host: bool  # values of it lie where they can be read without waiting for a device
    where: str  # the type of its device
    direct: Callable[..., Any] | None  # the backend's method, if it takes the call's arrays as they are
    writable: bool = False  # the strides of a state to change in place have been looked at


LIMIT = 4096  # calls to remember; then everything is forgotten, so that no length of the day stays for good

_known: dict[Any, Known] = {}
_latest: list[tuple[Facts, Known | None]] = [(None, None)]  # a model's layers ask for the same in turn
_registered: list[Any] = [None]  # the registry that the backends above come from


def forget() -> None:
    """As if no call had come yet."""
    _known.clear()
    _latest[0] = None, None


def seen(facts: Facts) -> Known | None:
    """What follows from facts that were seen before."""
    if _registered[0] is not registry.known():
        forget()
        _registered[0] = registry.known()
    if facts is None:
        return None
    latest, found = _latest[0]
    if facts == latest:
        return found
    found = _known.get(facts)
    if found is not None:
        _latest[0] = facts, found
    return found


def remember(facts: Facts, problem: Problem, key: str, call: Call, on_host: bool, *, step: bool) -> Known:
    """What is known about a call from now on; step: it is the one token of a `decode_step`.

    Raises what `registry.choose` raises.
    """
    backend = registry.choose(problem, key)
    direct = _direct(problem, backend, call, step)
    found = Known(problem, backend, on_host, problem.device.partition(":")[0], direct)
    if facts is not None:
        if len(_known) >= LIMIT:
            forget()
        _known[facts] = found
    return found


def _direct(problem: Problem, backend: Backend, call: Call, step: bool) -> Callable[..., Any] | None:
    """The method that takes a call without a table to bring beside q and without slots to gather."""
    for table in (call.log_decay, call.theta):
        if table is not None and (kind_of(table) != problem.kind or dtype_name(table) != problem.accumulate):
            return None
    if step:
        return backend.decode_step if decodes(backend) else None
    return backend.forward if call.slots is None else None
