"""The public calls: one signature, checked once, routed to a backend."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from linattn import route
from linattn.arrays import kind_of
from linattn.checked import checked, device_of
from linattn.checks import Call
from linattn.errors import ArgumentTypeError
from linattn.registry import BackendLike
from linattn.reweight import Cosine
from linattn.signatures import known_keywords, unknown
from linattn.state import Reweight, State

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from linattn.arrays import Array


@known_keywords
def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    *,
    log_decay: Float[Array, " h"] | Float[Array, "b n h"] | None = None,
    reweight: Reweight = None,
    feature_map: str | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    causal: bool = True,
    scale: float = 1.0,
    key_mask: Bool[Array, "b m"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    cu_seqlens: Int[Array, " s+1"] | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    slots: Int[Array, " s"] | None = None,
    precision: str = "ieee",
    check: bool = False,
    batch_invariant: bool = False,
    backend: BackendLike = "auto",
) -> Any:
    """Linear attention: weigh every pair of positions, then sum the values.

        w[i, j] = scale · Σ_d φ(q)[i, d] φ(k)[j, d] cos(θ[h, d] (i - j)) Π_{j < t <= i} λ_t
        o[i] = Σ_{j <= i} w[i, j] v[j]              (every j, and decay λ^|i - j|, with causal=False)

    q, k [B, N, H, D] and v [B, N, H, E] (M keys and values instead of N if not causal) -> o [B, N, H, E], in
    the kind, device and dtype of q; `(o, State)` with return_state=True. Sums are float32 (float64 for
    float64).

    log_decay: natural logarithm of the factor per token, <= 0; [H], or [B, N, H] if causal. -inf forgets all.
    reweight: None, `Cosine(max_len)` or `LRPE(theta)`. feature_map: None, "relu", "silu" or "elu+1".
    normalize: divide by the sum of the weights, not below eps. scale: 1 by default, neither paper scales.
    key_mask: True = attend; masked keys are dropped, their positions and decays still count.
    lengths: right-padded rows, tokens from there on do not exist. cu_seqlens: sequences back to back, B = 1.
    initial_state, return_state: the memory before and after the call. slots: initial_state is a pool,
    sequence s works on row slots[s] in place (-1: padding, outputs 0); for inference.
    precision: "tf32" lets float32 products use it. check: read values on a device too (synchronises).
    batch_invariant: the same plan, and so the same bits, for every batch size.
    backend: "auto", a name, names in order, or a Backend; an explicit one never falls back.

    Raises a class of `linattn.errors`: ArgumentTypeError, ShapeError, DtypeError, DeviceError, OptionError,
    ValueRangeError (values on the host), StateError, UnknownBackendError, UnsupportedError.
    Sources: Qin et al. 2022 (cosFormer), 2023 (TransNormerLLM), 2024 (Lightning Attention-2,
    arXiv:2401.04658).
    """
    call = Call(
        q, k, v, log_decay, reweight, feature_map, normalize, eps, causal, scale, key_mask, lengths,
        cu_seqlens, initial_state, return_state, slots, precision, batch_invariant,
    )  # fmt: skip
    o, state = _run(call, check, backend)
    return (o, state) if return_state else o


def _run(call: Call, check: bool, backend: BackendLike) -> tuple[Any, State | None]:
    if kind_of(call.q) == "torch":
        out: tuple[Any, State | None] = route.torch_calls().run(call, check, backend)
        return out
    with device_of(call.q):
        known = checked(call, check, backend)
        if known.direct is not None:
            return known.direct(  # type: ignore[no-any-return]
                known.problem, call.q, call.k, call.v, call.log_decay, call.theta, call.key_mask,
                call.lengths, call.cu_seqlens, call.initial_state,
            )  # fmt: skip
        return route.forward(known.problem, known.backend, call)


@known_keywords
def cosformer_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    *,
    causal: bool = False,
    max_len: int | None = None,
    eps: float = 1e-6,
    key_mask: Bool[Array, "b m"] | None = None,
    **keywords: Any,
) -> Any:
    """cosFormer: relu features, weights cos(π/2 · (i - j) / max_len), each row divided by its sum.

    Shapes, errors and the further keywords are `attention`'s. max_len=None takes the longer length of the
    call, as the released module does; give it to stream, pack or keep a state.

    Source: Qin et al. 2022, https://arxiv.org/abs/2202.08791, section 3.3; `CosformerAttention.forward`.
    """
    _refuse_fixed("cosformer_attention", keywords, ("feature_map", "reweight", "normalize"))
    return attention(
        q, k, v, feature_map="relu", reweight=Cosine(max_len), normalize=True, eps=eps, causal=causal,
        key_mask=key_mask, **keywords,
    )  # fmt: skip


@known_keywords
def lightning_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float[Array, " h"] | Float[Array, "b n h"] | None,
    **keywords: Any,
) -> Any:
    """Lightning Attention's sum: o[i] = Σ_{j <= i} λ^(i - j) (q[i] · k[j]) v[j]; no feature map, scale or
    divisor.

    Shapes, errors and the further keywords are `attention`'s. log_decay is ln λ: minus the paper's "slope".

    Source: Qin et al. 2024, Lightning Attention-2, https://arxiv.org/abs/2401.04658, section 3.
    """
    _refuse_fixed("lightning_attention", keywords, ("log_decay", "causal"))
    return attention(q, k, v, log_decay=log_decay, causal=True, **keywords)


def _refuse_fixed(function: str, keywords: dict[str, Any], fixed: tuple[str, ...]) -> None:
    for name in keywords:
        if name in fixed:
            raise ArgumentTypeError(f"{function} fixes {name}; use linattn.attention to choose it")
        if name not in _ATTENTION:
            raise ArgumentTypeError(unknown(function, name, list(_ATTENTION)))


_ATTENTION = tuple(inspect.signature(attention).parameters)
