"""Gradients outside of compilers: one autograd node, without the cost of passing through a custom op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from linattn import registry, route
from linattn.arrays import accumulate_dtype, dtype_name, table
from linattn.backends import Saved
from linattn.checks import Call
from linattn.errors import StateError
from linattn.known import Known
from linattn.problem import Problem
from linattn.reweight import LRPE
from linattn.state import State
from linattn.surroundings import refuse_batches

Tensor = torch.Tensor
Optional = Tensor | None


def options_of(call: Call | Problem, key: str) -> tuple[Any, ...]:
    """The options of a call in the order in which the custom ops take them."""
    return (
        call.max_len, call.feature_map or "", call.normalize, call.eps, call.causal, call.scale,
        call.return_state, call.precision, call.batch_invariant, key,
    )  # fmt: skip


def tables_of(call: Call) -> tuple[Optional, Optional]:
    """Decays and angles as tensors: tables from the host come beside q, in the accumulation dtype."""

    def beside(x: Any) -> Optional:
        if x is None or isinstance(x, Tensor):
            return x
        return table(x, call.q, accumulate_dtype(dtype_name(call.q)))  # type: ignore[no-any-return]

    return beside(call.log_decay), beside(call.theta)


class Attention(torch.autograd.Function):
    """o and the final state's parts, with the backend's own backward pass behind them."""

    @staticmethod
    def forward(ctx: Any, known: Known, call: Call, *inputs: Optional) -> Any:
        problem, kept = known.problem, None
        masks = (call.key_mask, call.lengths, call.cu_seqlens)
        if known.direct is not None and not problem.normalize:
            o, state = known.direct(problem, *inputs[:5], *masks, call.initial_state)
        else:
            o, state, kept = route.forward_keeping(problem, known.backend, call)
        ctx.set_materialize_grads(False)
        ctx.known = known
        ctx.save_for_backward(*inputs, *masks, o if problem.normalize else None, kept)
        if state is None:
            return o
        return (o, state.kv, state.length) if state.z is None else (o, state.kv, state.length, state.z)

    @staticmethod
    def backward(
        ctx: Any, do: Optional, dkv: Optional = None, dlength: Any = None, dz: Optional = None
    ) -> Any:
        q, k, v, decay, theta, kv, z, key_mask, lengths, cu_seqlens, o, kept = ctx.saved_tensors
        problem: Problem = ctx.known.problem
        if do is None and dkv is None and dz is None:
            return (None,) * 9
        refuse_batches(do, dkv, dz)
        wants = ctx.needs_input_grad[5], ctx.needs_input_grad[6]
        if torch.is_grad_enabled():  # somebody differentiates again: the op has the sentence for that
            grads = torch.ops.linattn.attention_backward(
                do, dkv, dz, o, *wants, q, k, v, decay, theta, key_mask, lengths, cu_seqlens, kv, z,
                *options_of(problem, registry.key_of(ctx.known.backend)),
            )  # fmt: skip
        else:
            do = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do.resolve_neg()
            state = None if kv is None else State(kv, z, kv.new_zeros(kv.shape[:1], dtype=torch.int64))
            decays, angles = (route.beside(x, q, problem.accumulate) for x in (decay, theta))
            saved = Saved(q, k, v, decays, angles, key_mask, lengths, cu_seqlens, state, o, *wants, kept)
            found = route.backward(problem, ctx.known.backend, saved, do, dstate_of(problem, q, dkv, dz))
            grads = found.q, found.k, found.v, found.log_decay, found.theta, found.kv, found.z
        needed = ctx.needs_input_grad[2:]
        inputs = (q, k, v, decay, theta, kv, z)
        out = [
            None
            if x is None or grad is None or not need
            else grad
            if grad.dtype == x.dtype
            else grad.to(x.dtype)
            for grad, x, need in zip(grads, inputs, needed, strict=True)
        ]
        return None, None, *out


def dstate_of(problem: Problem, like: Tensor, dkv: Optional, dz: Optional) -> State | None:
    """The gradient of the returned state, with zeros for a part that nothing depends on."""
    if dkv is None and dz is None:
        return None
    acc = getattr(torch, problem.accumulate)
    shape = (problem.sequences, problem.heads, problem.f)
    dkv = like.new_zeros(*shape, problem.e, dtype=acc) if dkv is None else dkv.resolve_neg()
    if problem.normalize:
        dz = like.new_zeros(shape, dtype=acc) if dz is None else dz.resolve_neg()
    return State(dkv, dz if problem.normalize else None, dkv.new_zeros(shape[:1], dtype=torch.int64))


def differentiable(known: Known, call: Call) -> tuple[Tensor, State | None]:
    """A call that autograd records: o, and the final state if it is asked for.

    Raises StateError for a state of inference mode.
    """
    problem = known.problem
    decay, theta = tables_of(call)
    if theta is not None and isinstance(call.reweight, LRPE) and theta is not call.reweight.theta:
        call = replace(call, reweight=LRPE(theta))
    state = call.initial_state
    parts = (None, None) if state is None else (state.kv, state.z)
    if any(x is not None and x.is_inference() for x in parts):
        raise StateError(
            "initial_state was made in inference mode and cannot be kept for gradients outside of it: use "
            "torch.no_grad(), or a copy of it"
        )
    if decay is not call.log_decay:
        call = replace(call, log_decay=decay)
    out = Attention.apply(  # type: ignore[no-untyped-call]
        known, call, call.q, call.k, call.v, decay, theta, *parts
    )
    if not call.return_state:
        return out, None
    o, kv, length, *z = out
    return o, State(kv, z[0] if z else None, length, problem.feature_map, problem.reweight, problem.d)
