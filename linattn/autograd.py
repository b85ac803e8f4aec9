"""torch: custom ops, so that autograd, compilers and fake tensors see one opaque call each way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from linattn import eager, registry, route
from linattn.arrays import accumulate_dtype, dtype_name, traced
from linattn.checks import Call, problem_of, sequences_of
from linattn.decode import of_one_token
from linattn.errors import GradientError, OptionError
from linattn.known import Known, seen
from linattn.prepared import facts_of, prepared
from linattn.problem import Problem
from linattn.registry import BackendLike
from linattn.reweight import LRPE, Cosine
from linattn.state import State, check_recorded, reweight_name
from linattn.surroundings import is_plain, lowered, lowers, refuse_transforms, signed, wants_grad, watched
from linattn.values import check_values

Tensor = torch.Tensor
Optional = Tensor | None

ARRAYS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? theta, Tensor? key_mask, Tensor? lengths, "
    "Tensor? cu_seqlens, Tensor? kv, Tensor? z"
)
OPTIONS = (
    "SymInt? max_len, str feature_map, bool normalize, float eps, bool causal, float scale, "
    "bool return_state, str precision, bool batch_invariant, str backend"
)


def run(call: Call, check: bool, backend: BackendLike) -> tuple[Tensor, State | None]:
    """`attention` for torch tensors: checked here unless a compiler is tracing, then through the op if
    needed.
    """
    if traced():  # `use_backend` is read when the op runs: compilers cannot trace it
        call = lowered(call)
        _check_while_tracing(call)
        key = registry.key_of(backend)
        if call.slots is not None and call.initial_state is not None:
            return _with_slots(call, key)
        return _through_op(call, key)
    key, needs_grad, plain = registry.requested(backend), wants_grad(call), True
    facts = None if watched() else facts_of(call, key, needs_grad)
    known = seen(facts)
    if known is None or lowers(known.where):
        call, given = signed(lowered(call)), call
        refuse_transforms(call)
        if facts is None or call is not given:
            facts = facts_of(call, key, needs_grad)
        known, plain = prepared(call, key, needs_grad, facts), is_plain(call)
    if plain and (known.on_host or check is not False):
        check_values(call, device_too=check)
    if not plain and call.slots is None:
        return _through_op(call, registry.key_of(known.backend))
    if needs_grad and call.slots is None:
        return eager.differentiable(known, call)
    if known.direct is not None:
        out: tuple[Tensor, State | None] = known.direct(
            known.problem, call.q, call.k, call.v, call.log_decay, call.theta, call.key_mask, call.lengths,
            call.cu_seqlens, call.initial_state,
        )  # fmt: skip
        return out
    return route.forward(known.problem, known.backend, call)


def _check_while_tracing(call: Call) -> None:
    """What the op cannot see: facts that a state has recorded, and the None of `Cosine()`."""
    state = call.initial_state
    unfixed = isinstance(call.reweight, Cosine) and call.reweight.max_len is None
    if unfixed and (state is not None or call.return_state or call.cu_seqlens is not None):
        raise OptionError(
            "Cosine() takes max_len from the length of the call, so it cannot be used with a state or "
            "cu_seqlens: outputs would depend on how the text was cut. Give Cosine(max_len)."
        )
    if state is not None:
        name = reweight_name(call.reweight)
        check_recorded(state, "initial_state", call.feature_map, name, call.q.shape[3])


def _with_slots(call: Call, key: str) -> tuple[Tensor, State | None]:
    """`slots` while compiling: gather, call and write-back where a compiler can see them."""
    from linattn.slots import Slots

    assert call.initial_state is not None and call.slots is not None
    if not torch.is_grad_enabled():
        call.initial_state.cut()
    rows = Slots(call.slots, call.initial_state)
    inner = replace(call, initial_state=rows.read(call.initial_state), slots=None, return_state=True)
    o, final = _through_op(inner, key)
    assert final is not None
    rows.write(call.initial_state, final)
    return rows.without_padding(o, call.cu_seqlens), final if call.return_state else None


def _through_op(call: Call, key: str) -> tuple[Tensor, State | None]:
    state = call.initial_state
    decay, theta = eager.tables_of(call)
    kv, z, length = (None, None, None) if state is None else (state.kv, state.z, state.length)
    o, new_kv, new_z = torch.ops.linattn.attention(
        call.q, call.k, call.v, decay, theta, call.key_mask, call.lengths, call.cu_seqlens, kv, z,
        *eager.options_of(call, key),
    )  # fmt: skip
    if not call.return_state:
        return o, None
    seen = _tokens(call) if length is None else _tokens(call) + length
    name = None if call.reweight is None else "cosine" if isinstance(call.reweight, Cosine) else "lrpe"
    final_z = new_z if call.normalize else None
    return o, State(new_kv, final_z, seen, call.feature_map, name, call.q.shape[3])


def _tokens(call: Call) -> Any:
    if call.cu_seqlens is not None:
        cu = call.cu_seqlens.to(torch.int64)
        return cu[1:] - cu[:-1]
    if call.lengths is not None:
        return call.lengths.to(torch.int64, copy=True)
    return torch.full((call.q.shape[0],), call.q.shape[1], dtype=torch.int64, device=call.q.device)


def _call(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Call, str]:
    """The call that an op's arguments stand for, and the key of its backend."""
    q, k, v, decay, theta, key_mask, lengths, cu_seqlens, kv, z = arrays
    max_len, feature_map, normalize, eps, causal, scale, return_state, precision, invariant, backend = options
    reweight: Any = None
    if theta is not None:
        reweight = LRPE(theta)
    elif max_len is not None:
        reweight = Cosine(max_len)
    state = None
    if kv is not None:
        state = State(kv, z, torch.zeros(kv.shape[:1], dtype=torch.int64, device=kv.device))
    call = Call(
        q, k, v, decay, reweight, feature_map or None, normalize, eps, causal, scale, key_mask, lengths,
        cu_seqlens, state, return_state, None, precision, invariant,
    )  # fmt: skip
    return signed(call), backend


@torch.library.custom_op(
    "linattn::attention",
    mutates_args=(),
    schema=f"({ARRAYS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _attention(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, key = _call(args[:10], args[10:])
    problem = problem_of(call)
    chosen = registry.choose(problem, registry.requested(key))
    o, state = route.forward(problem, chosen, call)
    parts = (None, None) if state is None else (state.kv, state.z)
    kv, z = (_nothing(problem, o) if x is None else x.contiguous() for x in parts)
    return o.contiguous(), kv, z


def _nothing(problem: Problem, like: Tensor) -> Tensor:
    """What an op returns in place of a tensor that the call does not have."""
    return like.new_empty(0, dtype=getattr(torch, problem.accumulate))


@_attention.register_fake
def _attention_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, key = _call(args[:10], args[10:])
    problem = problem_of(call)
    registry.choose(problem, registry.requested(key))
    b, n, h, _ = call.q.shape
    e = call.v.shape[3]
    o = call.q.new_empty(b, n, h, e)
    acc = getattr(torch, problem.accumulate)
    kv = z = None
    if call.return_state:
        s = sequences_of(call) if call.cu_seqlens is not None else b
        kv = o.new_empty(s, h, problem.f, e, dtype=acc)
        z = o.new_empty(s, h, problem.f, dtype=acc) if problem.normalize else None
    kv, z = (_nothing(problem, o) if x is None else x for x in (kv, z))
    return o, kv, z


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = inputs[10:]
    ctx.save_for_backward(*inputs[:10], output[0] if inputs[12] else None)


def _backward(ctx: Any, do: Optional, dkv: Optional, dz: Optional) -> tuple[Any, ...]:
    *arrays, o = ctx.saved_tensors
    none = [None] * len(ctx.options)
    if do is None and dkv is None and dz is None:
        return (*[None] * 10, *none)
    if not ctx.options[6]:
        dkv = dz = None
    wants = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    grads = torch.ops.linattn.attention_backward(do, dkv, dz, o, *wants, *arrays, *ctx.options)
    q, k, v, decay, theta, kv, z = grads
    masks = (None, None, None)
    wanted = (wants[0], wants[1], arrays[8] is not None, arrays[9] is not None)
    present = [grad if want else None for want, grad in zip(wanted, (decay, theta, kv, z), strict=True)]
    return (q, k, v, present[0], present[1], *masks, present[2], present[3], *none)


_attention.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "linattn::attention_backward",
    mutates_args=(),
    schema=f"(Tensor? do, Tensor? dkv, Tensor? dz, Tensor? o, bool want_log_decay, bool want_theta, "
    f"{ARRAYS}, {OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(*args: Any) -> tuple[Tensor, ...]:
    do, dkv, dz, o, *wants = args[:6]
    call, key = _call(args[6:16], args[16:])
    problem = problem_of(call, needs_grad=True)
    chosen = registry.choose(problem, registry.requested(key))
    saved = route.saved_of(problem, call, call.initial_state, o)
    saved = replace(saved, want_log_decay=wants[0], want_theta=wants[1])
    do = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3]) if do is None else do.resolve_neg()
    grads = route.backward(problem, chosen, saved, do, eager.dstate_of(problem, call.q, dkv, dz))

    def like(grad: Optional, x: Optional) -> Tensor:
        return _nothing(problem, call.q) if grad is None or x is None else grad.to(x.dtype).contiguous()

    state = call.initial_state
    return (
        like(grads.q, call.q),
        like(grads.k, call.k),
        like(grads.v, call.v),
        like(grads.log_decay, call.log_decay),
        like(grads.theta, args[10]),
        like(grads.kv, None if state is None else state.kv),
        like(grads.z, None if state is None else state.z),
    )


@_attention_backward.register_fake
def _attention_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    nothing = args[6].new_empty(0, dtype=getattr(torch, accumulate_dtype(dtype_name(args[6]))))

    def like(x: Optional) -> Tensor:
        return nothing.clone() if x is None else x.new_empty(x.shape)

    q, k, v, decay, theta, kv, z = (args[i] for i in (6, 7, 8, 9, 10, 14, 15))
    decay, theta = decay if args[4] else None, theta if args[5] else None
    return like(q), like(k), like(v), like(decay), like(theta), like(kv), like(z)


def _no_setup(ctx: Any, inputs: Any, output: Any) -> None:
    """Nothing is kept: there is no second derivative."""


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise GradientError(
        "double backward is not offered: gradients of linattn.attention cannot be differentiated again"
    )


_attention_backward.register_autograd(_no_double_backward, setup_context=_no_setup)


@torch.library.custom_op(
    "linattn::decode_step",
    mutates_args=("kv", "z", "length"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!)? z, Tensor(c!) length, "
    "Tensor? log_decay, Tensor? theta, Tensor? slots, SymInt? max_len, str feature_map, bool normalize, "
    "float eps, float scale, str precision, str backend) -> Tensor",
)
def _decode(*args: Any) -> Tensor:
    call, state, key = _decode_call(args)
    problem = problem_of(call)
    chosen = registry.choose(problem, registry.requested(key))
    return route.decode(problem, chosen, call, state).contiguous()  # type: ignore[no-any-return]


@_decode.register_fake
def _decode_fake(*args: Any) -> Tensor:
    call, _, key = _decode_call(args)
    registry.choose(problem_of(call), registry.requested(key))
    return call.q.new_empty(call.q.shape[0], call.q.shape[2], call.v.shape[3])  # type: ignore[no-any-return]


def _decode_call(args: tuple[Any, ...]) -> tuple[Call, State, str]:
    (
        q,
        k,
        v,
        kv,
        z,
        length,
        decay,
        theta,
        slots,
        max_len,
        feature_map,
        normalize,
        eps,
        scale,
        precision,
        key,
    ) = args
    reweight: Any = LRPE(theta) if theta is not None else None if max_len is None else Cosine(max_len)
    state = State(kv, z, length)
    call = Call(
        q[:, None], k[:, None], v[:, None], log_decay=decay, reweight=reweight,
        feature_map=feature_map or None, normalize=normalize, eps=eps, scale=scale,
        initial_state=state, slots=slots, precision=precision,
    )  # fmt: skip
    return signed(call), state, key


def decode(rows: Call, state: State, check: bool, backend: BackendLike) -> Tensor:
    """`decode_step` for torch tensors; q, k, v as they came, without an axis of one token."""
    tracing = traced()
    if not (tracing or watched() or wants_grad(rows)):
        known = seen(facts_of(rows, registry.requested(backend), False, step=True))
        if known is not None and known.writable and not lowers(known.where) and _may_change(state):
            return _step(known, rows, state, check)
    call = of_one_token(rows)
    narrow = lowered(call) if tracing else signed(lowered(call))
    if narrow is not call:
        call, decay = narrow, narrow.log_decay
        rows = replace(
            rows, q=call.q[:, 0], k=call.k[:, 0], v=call.v[:, 0], reweight=call.reweight,
            log_decay=decay[:, 0] if decay is not None and decay.ndim == 3 else decay,
        )  # fmt: skip
    if wants_grad(call):
        raise GradientError(
            "decode_step changes the state in place, so no gradient passes through it: use torch.no_grad(), "
            "or attention with initial_state and return_state"
        )
    if tracing:
        _check_while_tracing(call)
        return _decode_through_op(call, state, registry.key_of(backend))
    refuse_transforms(call)
    if not is_plain(call):
        return _decode_through_op(call, state, registry.key_of(backend))
    key = registry.requested(backend)
    known = prepared(call, key, False, facts_of(rows, key, False, step=True), step=True)
    if known.on_host or check is not False:
        check_values(call, device_too=check)
    route.check_writable(state, "state")
    known.writable = True
    return _stepped(known, call, rows, state)


def _may_change(state: State) -> bool:
    """Whether inference mode, which is no fact of a tensor, lets every part change in place."""
    kept = state.kv.is_inference() or state.length.is_inference()
    return torch.is_inference_mode_enabled() or not (kept or (state.z is not None and state.z.is_inference()))


def _step(known: Known, rows: Call, state: State, check: bool) -> Tensor:
    """A step like one before it: only values are looked at, where they lie on the host."""
    o: Tensor
    if known.direct is not None and check is False and not known.on_host:
        state.cut()
        o = known.direct(known.problem, rows.q, rows.k, rows.v, rows.log_decay, rows.theta, state, rows.slots)
        return o
    call = of_one_token(rows)
    if known.on_host or check is not False:
        check_values(call, device_too=check)
    return _stepped(known, call, rows, state)


def _stepped(known: Known, call: Call, rows: Call, state: State) -> Tensor:
    state.cut()  # else gradients would pass what changes here as if nothing had
    o: Tensor = route.decode(known.problem, known.backend, call, state, (rows.q, rows.k, rows.v))
    return o


def _decode_through_op(call: Call, state: State, key: str) -> Tensor:
    decay, theta = eager.tables_of(call)
    if isinstance(call.reweight, Cosine) and call.reweight.max_len is None:
        raise OptionError(
            "Cosine() takes max_len from the length of the call, so it cannot be used with a state"
        )
    state.cut()
    return torch.ops.linattn.decode_step(  # type: ignore[no-any-return]
        call.q[:, 0], call.k[:, 0], call.v[:, 0], state.kv, state.z, state.length, decay, theta, call.slots,
        call.max_len, call.feature_map or "", call.normalize, call.eps, call.scale, call.precision, key,
    )  # fmt: skip
