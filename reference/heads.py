"""Cut a call into heads: one head of one sequence is a few plain matrices.

Letters in shapes: b batch, s sequences, n query positions, m key positions, h heads, d key features, e value
features, f features of the state (d, or 2d where pairs are reweighted by their distance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np

from .features import feature

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    State = tuple[Float[Array, "s h f e"], Float[Array, "s h f"] | None]  # kv; z, to normalise


class Options(TypedDict, total=False):
    """The keywords that every function of this package shares. All are optional.

    log_decay: [H] or [B, N, H], natural logarithms, at most 0; -inf forgets all. theta: [H, D], radians per
    position; cosFormer has pi / (2 max_len) everywhere. feature_map: None, "relu", "silu" or "elu+1".
    normalize: divide by the sum of the weights, or by eps where that is larger; False. eps: 1e-6. causal:
    True. scale: 1, as neither paper scales. key_mask: [B, M], False where key and value count as zero;
    position and decay stay. lengths: [B], tokens from there on do not exist. cu_seqlens: [S + 1] with B =
    1, sequence s is from cu_seqlens[s] to cu_seqlens[s + 1]. initial_state: one for each sequence.
    """

    log_decay: Float[Array, " h"] | Float[Array, "b n h"] | None  # natural log, <= 0; -inf: forget all
    theta: Float[Array, "h d"] | None  # radians per position; cosFormer: pi / (2 max_len) everywhere
    feature_map: str | None  # None, "relu", "silu" or "elu+1"
    normalize: bool  # divide by the sum of the weights; False
    eps: float  # the least sum of weights to divide by; 1e-6
    causal: bool  # True
    scale: float  # 1: neither paper scales
    key_mask: Bool[np.ndarray, "b m"] | None  # False: key and value count as zero, position and decay stay
    lengths: Int[np.ndarray, " b"] | None  # tokens at and after it do not exist
    cu_seqlens: Int[np.ndarray, " s+1"] | None  # b = 1; sequence s is from cu_seqlens[s] to cu_seqlens[s + 1]
    initial_state: State | None  # one for each sequence


@dataclass(frozen=True)
class Head:
    """One head of one sequence.

    Where weights are normalised, v ends with a column of ones and the state with z: the sum of the weights is
    then the last column of the output, and needs no formula of its own.
    """

    place: tuple[int, int, int]  # sequence, batch row, head
    row: slice  # its positions in the batch row
    q: Float[Array, "n d"]  # phi(q)
    k: Float[Array, "m d"]  # phi(k), 0 where masked
    v: Float[Array, "m e"]  # 0 where masked
    mask: Bool[np.ndarray, " m"]
    log_decay: Float[Array, ""] | Float[Array, " n"]  # one for the head, or one for each token
    theta: Float[Array, " d"] | None
    state: Float[Array, "f e"]  # what came before; rows of C, then (reweighted) rows of S
    scale: float
    causal: bool
    eps: float | None  # None: not normalised

    def token_log_decay(self) -> Float[Array, " n"]:
        """The log decay of every token."""
        return np.broadcast_to(self.log_decay, len(self.q))

    def normalized(self, total: Float[Array, "n e"]) -> Float[Array, "n e"]:
        """Divide the sums of values by the sum of weights, or by eps where that is larger."""
        return total if self.eps is None else total[:, :-1] / np.maximum(total[:, -1:], self.eps)


def cut(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    *,
    log_decay: Float[Array, " h"] | Float[Array, "b n h"] | None = None,
    theta: Float[Array, "h d"] | None = None,
    feature_map: str | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    causal: bool = True,
    scale: float = 1.0,
    key_mask: Bool[np.ndarray, "b m"] | None = None,
    lengths: Int[np.ndarray, " b"] | None = None,
    cu_seqlens: Int[np.ndarray, " s+1"] | None = None,
    initial_state: State | None = None,
) -> list[Head]:
    """All heads of a call, each alone: none can reach another sequence, or what is past its length."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, n, heads, d = q.shape
    m = k.shape[1]
    decay = np.zeros(heads) if log_decay is None else np.asarray(log_decay, np.float64)
    _refuse(causal, n == m, decay, initial_state, normalize, batch, lengths, cu_seqlens)
    angles = None if theta is None else np.broadcast_to(np.asarray(theta, np.float64), (heads, d))
    mask = np.ones((batch, m), bool) if key_mask is None else np.asarray(key_mask, bool)
    if cu_seqlens is not None:
        rows = [(0, slice(int(start), int(stop))) for start, stop in pairwise(cu_seqlens)]
    else:
        stops = [max(n, m)] * batch if lengths is None else [int(stop) for stop in lengths]
        rows = [(b, slice(0, stop)) for b, stop in enumerate(stops)]
    f, e = d if theta is None else 2 * d, v.shape[3] + normalize
    state = with_z(initial_state, (len(rows), heads, f, e), normalize)

    def one(s: int, b: int, row: slice, h: int) -> Head:
        seen = mask[b, row]
        log_decay = decay[h] if decay.ndim == 1 else decay[b, row, h]
        if not (log_decay <= 0).all():
            raise ValueError("log_decay must be <= 0: the natural log of a factor in [0, 1]")
        key, value = (np.where(seen[:, None], x[b, row, h], 0.0) for x in (k, v))
        return Head(
            place=(s, b, h),
            row=row,
            q=feature(q[b, row, h], feature_map),
            k=np.where(seen[:, None], feature(key, feature_map), 0.0),
            v=np.pad(value, ((0, 0), (0, int(normalize))), constant_values=1.0),
            mask=seen,
            log_decay=log_decay,
            theta=None if angles is None else angles[h],
            state=state[s, h],
            scale=scale,
            causal=causal,
            eps=eps if normalize else None,
        )

    return [one(s, b, row, h) for s, (b, row) in enumerate(rows) for h in range(heads)]


def each_head(
    compute: Callable[[Head], tuple[Float[Array, "n e"], Float[Array, "f e"]]],
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    **options: Unpack[Options],
) -> tuple[Float[Array, "b n h e"], State]:
    """Compute every head alone, and put outputs and states back together. Outputs past a length are 0."""
    o = np.zeros((*np.shape(q)[:3], np.shape(v)[3]))
    state = np.zeros(state_shape(q, v, **options))
    for head in cut(q, k, v, **options):
        s, b, h = head.place
        total, state[s, h] = compute(head)
        o[b, head.row, h] = head.normalized(total)
    return o, without_z(state, options.get("normalize", False))


def state_shape(
    q: Float[Array, "b n h d"], v: Float[Array, "b m h e"], **options: Unpack[Options]
) -> tuple[int, int, int, int]:
    """[s h f e] of all heads' states, where e counts the column of the normaliser."""
    (batch, _, heads, d), e, packed = np.shape(q), np.shape(v)[3], options.get("cu_seqlens")
    sequences = batch if packed is None else len(packed) - 1
    return sequences, heads, d if options.get("theta") is None else 2 * d, e + options.get("normalize", False)


def with_z(state: State | None, shape: tuple[int, int, int, int], normalize: bool) -> Float[Array, "s h f e"]:
    """(kv, z) as one array of this shape: zeros for None, z in the last column if there is a normaliser."""
    joined = np.zeros(shape)
    if state is None:
        return joined
    values = joined[..., :-1] if normalize else joined
    kv, z = state
    if np.shape(kv) != values.shape or (z is not None and (not normalize or np.shape(z) != shape[:3])):
        expected = f"kv {values.shape} and z {shape[:3] if normalize else None}"
        raise ValueError(
            f"a state must be {expected}, got {np.shape(kv)} and {z if z is None else np.shape(z)}"
        )
    values[...] = kv
    if z is not None:
        joined[..., -1] = z
    return joined


def without_z(joined: Float[Array, "s h f e"], normalize: bool) -> State:
    """The (kv, z) of one array; z is None where nothing is normalised."""
    return (joined[..., :-1], joined[..., -1]) if normalize else (joined, None)


def _refuse(
    causal: bool,
    same_length: bool,
    decay: Float[Array, " h"] | Float[Array, "b n h"],
    state: State | None,
    normalize: bool,
    batch: int,
    lengths: Int[np.ndarray, " b"] | None,
    cu_seqlens: Int[np.ndarray, " s+1"] | None,
) -> None:
    """Raise ValueError for a call without a meaning."""
    if (causal or cu_seqlens is not None) and not same_length:
        raise ValueError("q and k must have the same length where the call is causal or packed")
    if not causal and (decay.ndim != 1 or state is not None):
        raise ValueError("without causal=True there is no state, and log_decay is one number for each head")
    if state is not None and (state[1] is not None) != normalize:
        raise ValueError("initial_state must hold z, the sums of weights, exactly where normalize=True")
    if cu_seqlens is not None and (batch != 1 or lengths is not None):
        raise ValueError("cu_seqlens takes a batch of 1, and no lengths")
