"""Gradients for arrays without autograd, and the table that says which backend would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from linattn import registry, route
from linattn.arrays import Array, dtype_name, kind_of, zeros_like_kind
from linattn.checked import checked, device_of
from linattn.checks import Call, problem_of
from linattn.errors import ArgumentTypeError, DtypeError, ShapeError, StateError
from linattn.problem import Problem
from linattn.registry import BackendLike
from linattn.signatures import known_keywords
from linattn.state import State, check_dense, check_parts
from linattn.values import check_values

if TYPE_CHECKING:
    from jaxtyping import Float

Vjp = Callable[..., dict[str, Any]]


def _call(q: Array, k: Array, v: Array, keywords: dict[str, Any]) -> tuple[Call, bool, BackendLike]:
    keywords = dict(keywords)
    check, backend = keywords.pop("check", False), keywords.pop("backend", "auto")
    known = Call.__dataclass_fields__
    for name in keywords:
        if name not in known:
            raise ArgumentTypeError(f"attention has no keyword {name!r}")
    call = Call(q, k, v, **keywords)
    if kind_of(q) == "torch":
        from linattn import surroundings

        call = surroundings.signed(surroundings.lowered(call))
    return call, check, backend


@known_keywords
def attention_vjp(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h e"], **keywords: Any
) -> tuple[Any, Vjp]:
    """Run `attention` and return (out, vjp): out as `attention` returns it, vjp for its gradients.

    `vjp(do, dstate=None)` takes do [B, N, H, E], and for a returned state a State of gradients (its length is
    not read). It returns a dict: q, k, v in their dtypes; log_decay, theta (with LRPE) and initial_state (a
    State of kv and z) where the call has them, in the accumulation dtype.

    Keywords and errors are `attention`'s, without slots.
    Source: `linattn.reference.gradients`, derived there; without angles and normaliser it is Lightning
    Attention-2's backward pass, algorithm 2, arXiv:2401.04658.
    """
    call, check, backend = _call(q, k, v, keywords)
    if kind_of(q) == "torch":
        from linattn import surroundings

        surroundings.refuse_transforms(call)
    with device_of(q):
        known = checked(call, check, backend, needs_grad=True)
        problem, chosen = known.problem, known.backend
        o, state, kept = route.forward_keeping(problem, chosen, call)
    saved = route.saved_of(problem, call, call.initial_state, o if problem.normalize else None, kept)

    def vjp(do: Array | None, dstate: State | None = None) -> dict[str, Any]:
        given = zeros_like_kind(o, tuple(o.shape), problem.dtype) if do is None else do
        _check_gradients(problem, o, given, dstate)
        if problem.kind == "torch":  # as the call's own arrays
            given = given.resolve_neg()
            dstate = None if dstate is None else surroundings.signed_state(dstate)
        with device_of(q):
            grads = route.backward(problem, chosen, saved, given, dstate)
        result = {"q": grads.q, "k": grads.k, "v": grads.v}
        if grads.log_decay is not None:
            result["log_decay"] = grads.log_decay
        if grads.theta is not None:
            result["theta"] = grads.theta
        if call.initial_state is not None:
            result["initial_state"] = replace(call.initial_state, kv=grads.kv, z=grads.z)
        return result

    return ((o, state) if problem.return_state else o), vjp


def _check_gradients(problem: Problem, o: Array, do: Array, dstate: State | None) -> None:
    if kind_of(do) != problem.kind:
        raise ArgumentTypeError(
            f"do must be a {problem.kind} array as o is, got {kind_of(do) or type(do).__name__}"
        )
    check_dense("do", do)
    if tuple(do.shape) != tuple(o.shape):
        raise ShapeError(f"do must have o's shape {tuple(o.shape)}, got {tuple(do.shape)}")
    if not dtype_name(do).startswith(("float", "bfloat")):
        raise DtypeError(f"do must be floating point, got {dtype_name(do)}")
    if dstate is None:
        return
    if not problem.return_state:
        raise StateError("dstate is the gradient of a returned state, but the call had return_state=False")
    check_parts(dstate, "dstate")
    if kind_of(dstate.kv) != problem.kind:
        raise ArgumentTypeError(f"dstate must hold {problem.kind} arrays, got {kind_of(dstate.kv)}")
    if dtype_name(dstate.kv) != problem.accumulate:
        raise DtypeError(f"dstate must be {problem.accumulate}, got {dtype_name(dstate.kv)}")
    shape = (problem.sequences, problem.heads, problem.f, problem.e)
    if tuple(dstate.kv.shape) != shape or (dstate.z is None) == problem.normalize:
        raise StateError(
            f"dstate must have the returned state's kv {shape}" + (" and z" if problem.normalize else "")
        )


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why each other candidate would not; prints as a table.

    problem: the call. chosen: the backend's name; None if no candidate takes the call. reasons: by name, the
    sentence with which a backend refuses the call, or None. kernels: by name, which of its kernels a backend
    would take, where it says so.
    """

    problem: Problem
    chosen: str | None
    reasons: dict[str, str | None]
    kernels: dict[str, str] = field(default_factory=dict)  # of backends that say which of theirs they take

    def __str__(self) -> str:
        width = max(map(len, self.reasons), default=0)
        lines = [f"call: {self.problem}"]
        for name, why in self.reasons.items():
            word = (
                "runs" if name == self.chosen else (why or "could run, but comes later or wants to be named")
            )
            if why is None and name in self.kernels:
                word += f": {self.kernels[name]}"
            lines.append(f"  {name:<{width}}  {word}")
        return "\n".join(lines)


@known_keywords
def explain(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h e"], **keywords: Any
) -> Explanation:
    """Return which backend would run `attention(q, k, v, ...)`, and one sentence for each that would not.

    Every known backend is listed; with an explicit `backend` only those. Keywords and errors are
    `attention`'s, but a call that no backend takes is explained instead of raised.
    """
    call, check, backend = _call(q, k, v, keywords)
    needs_grad = False
    if kind_of(q) == "torch":
        from linattn import surroundings

        needs_grad = surroundings.wants_grad(call)
    problem = problem_of(call, needs_grad=needs_grad)
    check_values(call, device_too=check)
    return explain_problem(problem, backend)


def explain_problem(problem: Problem, backend: BackendLike = "auto") -> Explanation:
    """The same decision for a problem without arrays."""
    key = registry.requested(backend)
    candidates = registry.names_of(key, problem.kind)
    listed = list(registry.known()) if key == "auto" else candidates
    reasons = {registry.get(name).name: registry.reason(registry.get(name), problem) for name in listed}
    chosen = next((name for name in candidates if registry.reason(registry.get(name), problem) is None), None)
    kernels = {}
    for name in listed:
        one = registry.get(name)
        if reasons[one.name] is None and (describe := getattr(one, "describe", None)) is not None:
            kernels[one.name] = describe(problem)
    return Explanation(problem, None if chosen is None else registry.get(chosen).name, reasons, kernels)
