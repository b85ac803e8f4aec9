"""Calls without autograd: checked, and those on CuPy arrays remembered (`known`).

torch tensors have `linattn.prepared`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from linattn import registry
from linattn.arrays import Array, kind_of
from linattn.checks import Call, problem_of
from linattn.known import Facts, Known, Unusual, remember, seen
from linattn.registry import BackendLike
from linattn.reweight import LRPE, Cosine
from linattn.state import State
from linattn.values import check_values

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
    key, step = registry.requested(backend), whole is not None
    facts = facts_of(call, key, needs_grad, step)
    known = seen(facts)
    if known is not None and not known.on_host and check is False:
        return known
    given = call if whole is None else whole(call)
    problem = problem_of(given, needs_grad=needs_grad) if known is None else known.problem
    check_values(given, device_too=check)
    return remember(facts, problem, key, call, _on_host(call), step=step) if known is None else known


def facts_of(call: Call, key: str, needs_grad: bool, step: bool) -> Facts:
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
    except Unusual:
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
    raise Unusual


def _turned(reweight: Any) -> Any:
    if type(reweight) is Cosine:
        return "cosine", reweight.max_len
    if type(reweight) is LRPE:
        return "lrpe", _array(reweight.theta)
    raise Unusual


def _memory(state: Any) -> Any:
    if type(state) is not State:
        raise Unusual
    named = state.feature_map, state.reweight
    if not all(name is None or type(name) is str for name in named) or type(state.d) not in (int, type(None)):
        raise Unusual
    return _array(state.kv), _array(state.z), _array(state.length), named, state.d


def _on_host(call: Call) -> bool:
    state = call.initial_state
    given = [call.q, call.log_decay, call.theta, call.lengths, call.cu_seqlens, call.slots]
    if state is not None:
        given.append(state.length)
    return any(kind_of(x) == "numpy" for x in given)
