"""Calls without autograd: checked, and those on CuPy arrays remembered.

Only facts are remembered (shapes, strides, dtypes, devices, options), never values or arrays. torch tensors
have `linattn.prepared`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from linattn import registry
from linattn.arrays import Array, dtype_name, kind_of
from linattn.checks import Call, problem_of
from linattn.problem import Problem
from linattn.registry import BackendLike
from linattn.reweight import LRPE, Cosine
from linattn.route import decodes
from linattn.state import State
from linattn.values import check_values

if TYPE_CHECKING:
    from linattn.backends import Backend


class Known(NamedTuple):
    """What follows from the facts of a call."""

    problem: Problem
    backend: Backend
    on_host: bool  # it has values where they can be read without waiting for a device
    direct: Callable[..., Any] | None  # the backend's method, if it takes the call's arrays as they are


LIMIT = 4096  # calls to remember; then everything is forgotten

_known: dict[Any, Known] = {}
_registered: list[Any] = [None]  # the registry that their backends come from
_NOTHING = contextlib.nullcontext()


def device_of(x: Array) -> contextlib.AbstractContextManager[Any]:
    """Inside, CuPy makes arrays on the device of its array x."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(x, cupy.ndarray) or cupy.cuda.runtime.getDevice() == x.device.id:
        return _NOTHING
    return x.device  # type: ignore[no-any-return]


def checked(
    call: Call,
    check: bool,
    backend: BackendLike,
    *,
    needs_grad: bool = False,
    whole: Callable[[Call], Call] | None = None,
) -> Known:
    """What there is to know about a call, whose values are checked as far as they can be read.

    whole: makes the call of a step's rows. Raises what `problem_of`, `choose` and `check_values` raise.
    """
    key = registry.requested(backend)
    if _registered[0] is not registry.known():
        _known.clear()
        _registered[0] = registry.known()
    facts = facts_of(call, key, needs_grad, whole is not None)
    known = None if facts is None else _known.get(facts)
    if known is not None and not known.on_host and check is False:
        return known
    given = call if whole is None else whole(call)
    problem = problem_of(given, needs_grad=needs_grad) if known is None else known.problem
    check_values(given, device_too=check)
    if known is None:
        chosen = registry.choose(problem, key)
        known = Known(problem, chosen, _on_host(call), _direct(problem, chosen, call, whole is not None))
        if facts is not None:
            if len(_known) >= LIMIT:
                _known.clear()
            _known[facts] = known
    return known


class _Unusual(Exception):
    """An argument that is not remembered: the call is checked as if it were the first of its kind."""


def facts_of(call: Call, key: str, needs_grad: bool, step: bool) -> Any:
    """What decides about a call on CuPy arrays, or None; True is no 1 here, as it is to a dictionary."""
    if kind_of(call.q) != "cupy":
        return None
    flags = call.normalize, call.causal, call.return_state, call.batch_invariant
    words = call.feature_map, call.precision
    if not (
        all(type(flag) is bool for flag in flags) and all(word is None or type(word) is str for word in words)
        and type(call.eps) is float and type(call.scale) is float
    ):  # fmt: skip
        return None
    reweight, state = call.reweight, call.initial_state
    try:
        return (
            _array(call.q), _array(call.k), _array(call.v), _array(call.log_decay), flags, words, call.eps,
            call.scale, key, needs_grad, step, None if reweight is None else _turned(reweight),
            None if state is None else _memory(state), _array(call.slots), _array(call.key_mask),
            _array(call.lengths), _array(call.cu_seqlens),
        )  # fmt: skip
    except _Unusual:
        return None


def _array(x: Any) -> Any:
    """Of an array that may be missing, on a device or a table on the host."""
    if x is None:
        return None
    kind = kind_of(x)
    if kind == "cupy":
        return x.shape, x.strides, x.dtype, x.data.device_id
    if kind == "numpy":
        return x.shape, x.strides, x.dtype, None
    raise _Unusual


def _turned(reweight: Any) -> Any:
    if type(reweight) is Cosine:
        return "cosine", reweight.max_len
    if type(reweight) is LRPE:
        return "lrpe", _array(reweight.theta)
    raise _Unusual


def _memory(state: Any) -> Any:
    if type(state) is not State:
        raise _Unusual
    named = state.feature_map, state.reweight
    if not all(name is None or type(name) is str for name in named) or type(state.d) not in (int, type(None)):
        raise _Unusual
    return _array(state.kv), _array(state.z), _array(state.length), named, state.d


def _on_host(call: Call) -> bool:
    state = call.initial_state
    given = [call.q, call.log_decay, call.theta, call.lengths, call.cu_seqlens, call.slots]
    if state is not None:
        given.append(state.length)
    return any(kind_of(x) == "numpy" for x in given)


def _direct(problem: Problem, backend: Backend, call: Call, step: bool) -> Callable[..., Any] | None:
    """The method that takes a call without a table to bring beside q and without slots to gather."""
    for table in (call.log_decay, call.theta):
        if table is not None and (kind_of(table) != problem.kind or dtype_name(table) != problem.accumulate):
            return None
    if step:
        return backend.decode_step if decodes(backend) else None
    return backend.forward if call.slots is None else None
