"""The same attention, one token at a time: linear in the length, with a state of fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np

from .heads import Head, Options, each_head

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

    from .heads import State

    Array = NDArray[np.float64]


def recurrent(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    **options: Unpack[Options],
) -> tuple[Float[Array, "b n h e"], State]:
    r"""Outputs, and the state after the last token: equal to `attention`, for causal calls.

    For every token: move the state on by one position, add the token, and read.

    $$ (C, S) \leftarrow \lambda_t\, (\cos\theta\, C - \sin\theta\, S,\; \sin\theta\, C + \cos\theta\, S) $$
    $$ C \leftarrow C + \phi(k_t) v_t^T, \qquad o_t = \mathrm{scale} \cdot \phi(q_t)^T C $$

    Normalised, the sum of the weights is read from a state of its own, in which every value is 1. Without
    theta there is no S. No number depends on the absolute position, so nothing grows with the length.

    Source: the robust inference of TransNormerLLM (Qin et al. 2023, https://arxiv.org/abs/2307.14995), with
    the positions turned into the state instead of into q and k.
    """
    if not options.get("causal", True):
        raise ValueError("the recurrence is causal: it never sees the future")
    return each_head(_recurrence, q, k, v, **options)


def _recurrence(head: Head) -> tuple[Float[Array, "n e"], Float[Array, "f e"]]:
    state = head.state
    d = head.q.shape[1]
    o = np.zeros((len(head.q), head.v.shape[1]))
    for t, log_decay in enumerate(head.token_log_decay()):
        state = advance(state, log_decay, head.theta)
        state[:d] += np.outer(head.k[t], head.v[t])
        o[t] = head.scale * head.q[t] @ state[:d]
    return o, state


def advance(
    state: Float[Array, "f e"], log_decay: Float[Array, ""], angle: Float[Array, " d"] | None
) -> Float[Array, "f e"]:
    """A new state: the old one turned by an angle and decayed; nothing at all if the log decay is -inf."""
    if log_decay == -np.inf:
        return np.zeros_like(state)  # selected away: 0 * NaN would be NaN
    decay = float(np.exp(log_decay))
    if angle is None:
        return decay * state
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    C, S = np.split(state, 2)
    return decay * np.concatenate([c * C - s * S, s * C + c * S])
