"""Calls that have been checked before: the same facts give the same problem and the same backend.

Only facts are remembered (shapes, strides, dtypes, devices, options), never values or arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linattn import registry
from linattn.checks import Call, problem_of
from linattn.problem import Problem
from linattn.reweight import LRPE, Cosine
from linattn.state import State

if TYPE_CHECKING:
    from linattn.backends import Backend

LIMIT = 4096  # calls to remember; then everything is forgotten, so that no length of the day stays for good

_known: dict[Any, tuple[Problem, Backend, bool]] = {}
_registered: list[Any] = [None]  # the registry that the backends above come from

PLAIN = (torch.Tensor, torch.nn.Parameter)


NAMES = (str, type(None))


class _Unusual(Exception):
    """An argument that is no plain tensor: the call is checked as if it were the first of its kind."""


def _tensor(x: Any) -> Any:
    """What decides about a tensor that may be missing."""
    if x is None:
        return None
    if type(x) not in PLAIN:
        raise _Unusual
    return x.shape, x.stride(), x.dtype, x.device, x.layout


def _facts(call: Call, key: str, needs_grad: bool) -> tuple[Any, ...]:
    q, k, v = call.q, call.k, call.v
    flags = call.normalize, call.causal, call.return_state, call.batch_invariant
    if (
        type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN
        or type(call.eps) is not float or type(call.scale) is not float
        or type(call.feature_map) not in NAMES or type(call.precision) is not str
    ):  # fmt: skip
        raise _Unusual
    for flag in flags:
        if flag is not True and flag is not False:
            raise _Unusual
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
        k.device, v.device, q.layout, k.layout, v.layout, _tensor(call.log_decay), call.feature_map, flags,
        call.eps, call.scale, call.precision, key, needs_grad,
        None if call.reweight is None and call.initial_state is None and call.key_mask is None
        and call.lengths is None and call.cu_seqlens is None else _rare(call),
    )  # fmt: skip


def _rare(call: Call) -> tuple[Any, ...]:
    """Facts about what most calls do not have."""
    state, reweight = call.initial_state, call.reweight
    turned: Any = None
    if type(reweight) is Cosine:
        turned = ("cosine", reweight.max_len)
    elif type(reweight) is LRPE:
        turned = ("lrpe", _tensor(reweight.theta))
    elif reweight is not None:
        raise _Unusual
    memory: Any = None
    if state is not None:
        if type(state) is not State or not {type(state.feature_map), type(state.reweight)} <= {*NAMES}:
            raise _Unusual
        memory = (
            _tensor(state.kv), _tensor(state.z), _tensor(state.length), state.feature_map, state.reweight,
            state.d if type(state.d) is int else None,
        )  # fmt: skip
        if state.d is not None and type(state.d) is not int:
            raise _Unusual
    return (
        turned, memory, _tensor(call.key_mask), _tensor(call.lengths), _tensor(call.cu_seqlens),
        _tensor(call.slots),
    )  # fmt: skip


def _on_host(call: Call) -> bool:
    """Whether the call holds values that can be looked at without waiting for a device."""
    if call.q.device.type == "cpu":
        return True
    state = call.initial_state
    given = [call.log_decay, call.theta, call.lengths, call.cu_seqlens, call.slots]
    if isinstance(state, State):
        given.append(state.length)
    return any(x is not None and (not isinstance(x, torch.Tensor) or x.device.type == "cpu") for x in given)


def prepared(call: Call, key: str, needs_grad: bool) -> tuple[Problem, Backend, bool]:
    """The problem of a call, the backend that takes it, and whether values of it lie on the host.

    Raises what `problem_of` and `registry.choose` raise.
    """
    try:
        facts = _facts(call, key, needs_grad)
    except _Unusual:
        facts = None
    if _registered[0] is not registry.known():
        _known.clear()
        _registered[0] = registry.known()
    if facts is not None:
        found = _known.get(facts)
        if found is not None:
            return found
    problem = problem_of(call, needs_grad=needs_grad)
    found = problem, registry.choose(problem, key), _on_host(call)
    if facts is not None:
        if len(_known) >= LIMIT:
            _known.clear()
        _known[facts] = found
    return found
