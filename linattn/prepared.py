"""What decides about a call on torch tensors, so that the next one like it is not checked again (`known`)."""

from __future__ import annotations

from typing import Any

import torch

from linattn.checks import Call, problem_of
from linattn.known import Facts, Known, Unusual, remember, seen
from linattn.reweight import LRPE, Cosine
from linattn.state import State

PLAIN = (torch.Tensor, torch.nn.Parameter)


def _tensor(x: Any) -> Any:
    """What decides about a tensor that may be missing."""
    if x is None:
        return None
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested or x.is_neg():
        raise Unusual
    return x.shape, x.stride(), x.dtype, x.device


def facts_of(call: Call, key: str, needs_grad: bool, *, step: bool = False) -> Facts:
    """What decides about a call; True is no 1 here, as it is to a dictionary.

    step: it is one of `decode_step`, whose q, k and v have no axis of tokens.
    """
    q, k, v = call.q, call.k, call.v
    name, normalize, causal = call.feature_map, call.normalize, call.causal
    final, invariant, strided = call.return_state, call.batch_invariant, torch.strided
    if not (
        type(q) in PLAIN and type(k) in PLAIN and type(v) in PLAIN
        and q.layout is strided and k.layout is strided and v.layout is strided
        and not (q.is_nested or k.is_nested or v.is_nested or q.is_neg() or k.is_neg() or v.is_neg())
        and type(call.eps) is float and type(call.scale) is float and type(call.precision) is str
        and (name is None or type(name) is str)
        and (normalize is False or normalize is True) and (causal is True or causal is False)
        and (final is False or final is True) and (invariant is False or invariant is True)
    ):  # fmt: skip
        return None
    try:
        return (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, _tensor(call.log_decay), name, normalize, causal, final, invariant,
            call.eps, call.scale, call.precision, key, needs_grad, step,
            None if call.initial_state is None and call.slots is None
            else _memory(call.initial_state, call.slots),
            None if call.reweight is None and call.key_mask is None and call.lengths is None
            and call.cu_seqlens is None else _rare(call),
        )  # fmt: skip
    except Unusual:
        return None


def _memory(state: Any, slots: Any) -> tuple[Any, ...]:
    """Facts about a state and the rows of it."""
    if type(state) is not State:
        raise Unusual
    kv, length, name, reweight, d = state.kv, state.length, state.feature_map, state.reweight, state.d
    if not (
        type(kv) in PLAIN and type(length) in PLAIN and kv.layout is length.layout is torch.strided
        and (name is None or type(name) is str) and (reweight is None or type(reweight) is str)
        and (d is None or type(d) is int) and not kv.is_neg()
    ):  # fmt: skip
        raise Unusual
    return (
        kv.shape, length.shape, kv.stride(), length.stride(), kv.dtype, length.dtype, kv.device,
        length.device, None if state.z is None else _tensor(state.z),
        None if slots is None else _tensor(slots), name, reweight, d,
    )  # fmt: skip


def _rare(call: Call) -> tuple[Any, ...]:
    """Facts about what most calls do not have."""
    reweight = call.reweight
    turned: Any = None
    if type(reweight) is Cosine:
        turned = ("cosine", reweight.max_len)
    elif type(reweight) is LRPE:
        turned = ("lrpe", _tensor(reweight.theta))
    elif reweight is not None:
        raise Unusual
    return turned, _tensor(call.key_mask), _tensor(call.lengths), _tensor(call.cu_seqlens)


def _on_host(call: Call) -> bool:
    """Whether the call holds values that can be looked at without waiting for a device."""
    if call.q.device.type == "cpu":
        return True
    state = call.initial_state
    given = [call.log_decay, call.theta, call.lengths, call.cu_seqlens, call.slots]
    if isinstance(state, State):
        given.append(state.length)
    return any(x is not None and (not isinstance(x, torch.Tensor) or x.device.type == "cpu") for x in given)


def prepared(call: Call, key: str, needs_grad: bool, facts: Facts, *, step: bool = False) -> Known:
    """What is known about a call from now on; step: it is the one token of a `decode_step`.

    Raises what `problem_of` and `registry.choose` raise.
    """
    found = seen(facts)
    if found is not None:
        return found
    problem = problem_of(call, needs_grad=needs_grad)
    return remember(facts, problem, key, call, _on_host(call), step=step)
