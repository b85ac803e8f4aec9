"""One token at a time: constant memory and time, the state changed in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn import route
from linattn.arrays import Array, kind_of
from linattn.checked import checked, device_of
from linattn.checks import Call, check_one_kind
from linattn.errors import ArgumentTypeError, ShapeError
from linattn.registry import BackendLike
from linattn.signatures import known_keywords
from linattn.state import Reweight, State, check_dense

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@known_keywords
def decode_step(
    q: Float[Array, "b h d"],
    k: Float[Array, "b h d"],
    v: Float[Array, "b h e"],
    state: State,
    *,
    log_decay: Float[Array, " h"] | Float[Array, "b h"] | None = None,
    reweight: Reweight = None,
    feature_map: str | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    slots: Int[Array, " b"] | None = None,
    precision: str = "ieee",
    check: bool = False,
    backend: BackendLike = "auto",
) -> Float[Array, "b h e"]:
    """One token of each sequence: the state advances by one, the new pair is added, the query reads it.

        C, S <- λ R(θ) (C, S);  C += φ(k) vᵀ;  o = scale · φ(q)ᵀ C

    q, k [B, H, D], v [B, H, E] -> o [B, H, E] in q's dtype. kv, z and length of `state` change in place
    (NumPy arrays must be writable; kv and z that have gradients are replaced by copies without). log_decay is
    [H] or [B, H]. With slots [B], row b works on state row slots[b]; -1 is padding: its output is 0 and no
    row changes; rows that are not named keep their bits. A slot named twice is refused on the host and
    undefined on a device. The other options are `attention`'s.

    Raises what `attention` raises, and GradientError if grad mode is on and an input requires grad.
    Source: TransNormerLLM, arXiv:2307.14995, "robust inference"; extended to reweighting.
    """
    rows = Call(
        q, k, v, log_decay, reweight, feature_map, normalize, eps, scale=scale, initial_state=state,
        slots=slots, precision=precision,
    )  # fmt: skip
    if kind_of(q) == "torch":
        return route.torch_calls().decode(rows, state, check, backend)
    with device_of(q):
        known = checked(rows, check, backend, whole=of_one_token)
        if known.direct is not None and kind_of(q) == "cupy":
            return known.direct(known.problem, q, k, v, log_decay, rows.theta, state, slots)
        route.check_writable(state, "state")
        return route.decode(known.problem, known.backend, of_one_token(rows), state)


def of_one_token(rows: Call) -> Call:
    """The call of one token that a step is: q, k, v and decays per row get its axis.

    Raises for arrays that have no place for it.
    """
    q, k, v, log_decay = rows.q, rows.k, rows.v, rows.log_decay
    _check_ranks(q, k, v, rows.initial_state, log_decay)
    if log_decay is not None and log_decay.ndim == 2:
        log_decay = log_decay[:, None]
    return Call(
        q[:, None], k[:, None], v[:, None], log_decay, rows.reweight, rows.feature_map, rows.normalize,
        rows.eps, scale=rows.scale, initial_state=rows.initial_state, slots=rows.slots,
        precision=rows.precision,
    )  # fmt: skip


def _check_ranks(q: Any, k: Any, v: Any, state: Any, log_decay: Any) -> None:
    for name, x, letters in (("q", q, "B, H, D"), ("k", k, "B, H, D"), ("v", v, "B, H, E")):
        if kind_of(x) is None:
            raise ArgumentTypeError(f"{name} must be a NumPy, torch or CuPy array, got {type(x).__name__}")
        check_dense(name, x)
        if x.ndim != 3:
            raise ShapeError(f"decode_step: {name} must have shape [{letters}], got {tuple(x.shape)}")
    check_one_kind(q, k, v)
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
        raise ShapeError(
            f"decode_step: q, k and v must share B, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        )
    if not isinstance(state, State):
        raise ArgumentTypeError(
            f"state must be a linattn.State, got {type(state).__name__}; start with State.zeros"
        )
    if log_decay is not None:
        if kind_of(log_decay) is None:
            raise ArgumentTypeError(f"log_decay must be an array, got {type(log_decay).__name__}")
        if tuple(log_decay.shape) not in ((q.shape[1],), (q.shape[0], q.shape[1])):
            wanted = f"[H] = ({q.shape[1]},) or [B, H] = {(q.shape[0], q.shape[1])}"
            raise ShapeError(f"decode_step: log_decay must have shape {wanted}, got {tuple(log_decay.shape)}")
