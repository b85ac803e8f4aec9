"""From a checked call to a backend's method: tables brought beside q, slots gathered and written back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np

from linattn.arrays import Array, cast, device_name, kind_of, namespace, table
from linattn.backends import Backend, Decoding, Differentiable, Gradients, Keeping, Pooling, Saved
from linattn.checks import Call
from linattn.errors import StateError
from linattn.problem import Problem
from linattn.registry import get
from linattn.slots import Slots
from linattn.state import State


def torch_calls() -> Any:
    """`linattn.autograd`, which imports torch. By a statement: compilers would guard a name that keeps it."""
    from linattn import autograd

    return autograd


_protocols: dict[tuple[type, type], bool] = {}


def _offers(backend: Backend, protocol: type) -> bool:
    """Whether a kind of backend has a protocol's methods; asked once, as protocols are slow to check."""
    key = protocol, type(backend)
    if key not in _protocols:
        _protocols[key] = isinstance(backend, protocol)
    return _protocols[key]


def differentiates(backend: Backend) -> TypeGuard[Differentiable]:
    """Whether a backend has a backward pass of its own."""
    return _offers(backend, Differentiable)


def decodes(backend: Backend) -> TypeGuard[Decoding]:
    """Whether a backend has a decode step of its own."""
    return _offers(backend, Decoding)


def beside(x: Array | None, like: Array, dtype: str) -> Array | None:
    """A decay or angle table in the accumulation dtype, on q's device."""
    if x is None:
        return None
    if isinstance(x, np.ndarray) and kind_of(like) != "numpy":
        return table(x, like, dtype)
    return cast(x, dtype)


def pools(backend: Backend) -> TypeGuard[Pooling]:
    """Whether a backend works on rows of a pool in place."""
    return _offers(backend, Pooling)


def keeps(backend: Backend) -> TypeGuard[Keeping]:
    """Whether a backend's forward pass keeps denominators for its backward pass."""
    return _offers(backend, Keeping)


def _whole(pool: State) -> bool:
    """Whether a pool's arrays lie without gaps."""
    return all(
        x is None or (x.is_contiguous() if kind_of(x) == "torch" else x.flags.c_contiguous)
        for x in (pool.kv, pool.z, pool.length)
    )


def saved_of(
    problem: Problem, call: Call, state: State | None, o: Array | None = None, kept: Array | None = None
) -> Saved:
    """The arrays of a call as backends take them."""
    decay = beside(call.log_decay, call.q, problem.accumulate)
    theta = beside(call.theta, call.q, problem.accumulate)
    return Saved(
        call.q, call.k, call.v, decay, theta, call.key_mask, call.lengths, call.cu_seqlens, state, o,
        kept=kept,
    )  # fmt: skip


def forward(problem: Problem, backend: Backend, call: Call) -> tuple[Array, State | None]:
    """Run a call; with slots, in the pool itself, or gather the states before and write them back after."""
    if call.slots is None or call.initial_state is None:
        s = saved_of(problem, call, call.initial_state)
        return backend.forward(
            problem, s.q, s.k, s.v, s.log_decay, s.theta, s.key_mask, s.lengths, s.cu_seqlens, s.state
        )
    pool = call.initial_state
    check_writable(pool, "initial_state")
    pool.cut()
    if (
        pools(backend)
        and not problem.return_state
        and device_name(call.slots) == problem.device
        and _whole(pool)
    ):
        return backend.forward_in_pool(problem, saved_of(problem, call, pool), call.slots), None
    rows = Slots(call.slots, pool)
    # Padding rows begin empty, not with another sequence's memory.
    start = rows.read(pool)
    inner = replace(problem, slots=False, return_state=True)
    s = saved_of(problem, call, start)
    o, final = backend.forward(
        inner, s.q, s.k, s.v, s.log_decay, s.theta, s.key_mask, s.lengths, s.cu_seqlens, s.state
    )
    assert final is not None
    rows.write(pool, final)
    o = rows.without_padding(o, call.cu_seqlens)
    return o, final if problem.return_state else None


def forward_keeping(
    problem: Problem, backend: Backend, call: Call
) -> tuple[Array, State | None, Array | None]:
    """Run a call without slots that will be differentiated: o, final state, denominators if they are kept."""
    if problem.normalize and keeps(backend):
        return backend.forward_keeping(problem, saved_of(problem, call, call.initial_state))
    return *forward(problem, backend, call), None


def backward(problem: Problem, backend: Backend, saved: Saved, do: Array, dstate: State | None) -> Gradients:
    """Run a backend's own backward, or the built-in one for the same arrays."""
    if differentiates(backend):
        return backend.backward(problem, saved, do, dstate)
    fallback = get("torch" if problem.kind == "torch" else "numpy")
    assert isinstance(fallback, Differentiable)
    return fallback.backward(problem, saved, do, dstate)


def decode(
    problem: Problem,
    backend: Backend,
    call: Call,
    state: State,
    rows: tuple[Array, Array, Array] | None = None,
) -> Array:
    """One token: q, k [b 1 h d], v [b 1 h e], decay [h] or [b 1 h] -> o [b h e]; `state` changes in place.

    rows: q, k, v without the axis of one token, where they are at hand.
    """
    decay = beside(call.log_decay, call.q, problem.accumulate)
    theta = beside(call.theta, call.q, problem.accumulate)
    if decodes(backend):
        decay = decay[:, 0] if decay is not None and decay.ndim == 3 else decay
        if rows is None:
            rows = call.q[:, 0], call.k[:, 0], call.v[:, 0]
        return backend.decode_step(problem, *rows, decay, theta, state, call.slots)
    start, pool = state, None
    if call.slots is not None:
        pool = Slots(call.slots, state)
        start = pool.read(state)
    inner = replace(problem, slots=False, return_state=True)
    o, final = backend.forward(inner, call.q, call.k, call.v, decay, theta, None, None, None, start)
    assert final is not None
    if pool is not None:
        pool.write(state, final)
        o = pool.without_padding(o, None)
    else:
        state.assign(final)
    return o[:, 0]


def check_writable(state: State, name: str) -> None:
    """Refuse NumPy states that cannot be changed in place."""
    parts = {"kv": state.kv, "z": state.z, "length": state.length}
    for part, x in parts.items():
        if isinstance(x, np.ndarray) and not x.flags.writeable:
            raise StateError(f"{name}.{part} must be writable: it is changed in place")
        if kind_of(x) == "torch":
            torch = namespace("torch")
            if x.is_neg():
                raise StateError(f"{name}.{part} is a negated view (z.conj().imag): it is changed in place")
            if x.numel() and any(
                step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)
            ):
                raise StateError(
                    f"{name}.{part} is expanded: its rows share memory, and it is changed in place"
                )
            if _overlaps(x):
                raise StateError(f"{name}.{part} overlaps itself (as_strided), and it is changed in place")
            if x.is_inference() and not torch.is_inference_mode_enabled():
                raise StateError(
                    f"{name}.{part} was made in inference mode and cannot be changed outside of it"
                )


def _overlaps(x: Array) -> bool:
    """Whether two elements of a tensor may lie in one place: slicing and turning never does that."""
    reach = 0  # of the axes with smaller strides
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return bool(x.numel())
            reach += step * (size - 1)
    return False
