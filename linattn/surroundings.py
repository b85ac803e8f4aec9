"""What surrounds a call in torch: autograd, autocast, transforms, and modes that watch every op."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad

from linattn.checks import Call
from linattn.errors import GradientError
from linattn.prepared import PLAIN
from linattn.reweight import LRPE
from linattn.state import State

Tensor = torch.Tensor

_transform = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack


def wants_grad(call: Call) -> bool:
    """Whether autograd has to record this call."""
    if not torch.is_grad_enabled():
        return False
    state = call.initial_state
    parts = (state.kv, state.z) if isinstance(state, State) else ()
    for x in (call.q, call.k, call.v, call.log_decay, call.theta, *parts):
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def lowers(where: str) -> bool:
    """Whether autocast is on for a type of device."""
    if where not in ("cpu", "cuda") and not torch.amp.is_autocast_available(where):
        return False
    return torch.is_autocast_enabled(where)


def as_they_are(where: str) -> AbstractContextManager[Any]:
    """Products take operands as they are in here, under autocast, too."""
    return torch.autocast(where, enabled=False) if lowers(where) else nullcontext()


def lowered(call: Call) -> Call:
    """Under autocast, q, k and v in its dtype, as torch's own attention has it."""
    where = call.q.device.type
    if not lowers(where):
        return call
    dtype = torch.get_autocast_dtype(where)
    cast = [
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (call.q, call.k, call.v)
    ]
    return replace(call, q=cast[0], k=cast[1], v=cast[2])


def signed(call: Call) -> Call:
    """The same with every sign in memory: kernels know nothing of the bit that `z.conj().imag` has."""
    state, turned = call.initial_state, call.reweight
    parts = (state.kv, state.z) if isinstance(state, State) else ()
    given = (call.q, call.k, call.v, call.log_decay, call.theta, *parts)
    if not any(isinstance(x, Tensor) and x.is_neg() for x in given):
        return call

    if isinstance(state, State) and call.slots is None:  # a pool has to be the one that changes
        state = signed_state(state)
    return replace(
        call, q=_real(call.q), k=_real(call.k), v=_real(call.v), log_decay=_real(call.log_decay),
        initial_state=state, reweight=LRPE(_real(turned.theta)) if isinstance(turned, LRPE) else turned,
    )  # fmt: skip


def signed_state(state: State) -> State:
    """A state with every sign in memory."""
    return replace(state, kv=_real(state.kv), z=_real(state.z))


def _real(x: Any) -> Any:
    return x.resolve_neg() if isinstance(x, Tensor) else x


def refuse_transforms(call: Call) -> None:
    """torch.func and forward mode would need rules of their own; without them, no silent wrong answer."""
    if _transform() is None and forward_ad._current_level < 0:
        return
    state = call.initial_state
    parts = (state.kv, state.z) if isinstance(state, State) else ()
    given = (call.q, call.k, call.v, call.log_decay, call.theta, call.key_mask, *parts)
    tensors = [x for x in given if isinstance(x, Tensor)]
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise GradientError(
            "torch.func transforms (vmap, grad, jvp) are not offered: attention has a batch axis of its own, "
            "and its gradients come from autograd (backward) or linattn.attention_vjp"
        )
    if forward_ad._current_level >= 0:
        for x in tensors:
            if x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
                raise GradientError(
                    "forward-mode derivatives are not offered; use reverse mode (backward, vjp)"
                )


BATCHED = torch._C._dispatch_key_parse("Batched")


def refuse_batches(*grads: Tensor | None) -> None:
    """Many gradients at once come as one tensor with an axis that no backend sees."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    for grad in grads:
        if grad is not None and (torch._C._dispatch_keys(grad).has(BATCHED) or wrapped(grad)):
            raise GradientError(
                "gradients in batches (is_grads_batched, vectorize=True, vmap) are not offered: take them "
                "one by one"
            )


def is_plain(call: Call) -> bool:
    """Ordinary tensors and no mode that watches ops: then a backend may run without going through one."""
    if _modes():
        return False
    return type(call.q) in PLAIN and type(call.k) in PLAIN and type(call.v) in PLAIN


def watched() -> bool:
    """Whether a transform or a mode sees every op: then a call may not be what its arguments look like."""
    return _transform() is not None or forward_ad._current_level >= 0 or _modes() > 0
