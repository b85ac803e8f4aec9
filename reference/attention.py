"""The definition of linear attention: weigh every pair, then sum the values. Slow, quadratic, float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np

from .heads import Head, Options, each_head
from .weights import log_lambda, pair_weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy.typing import NDArray

    from .heads import State

    Array = NDArray[np.float64]


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    **options: Unpack[Options],
) -> tuple[Float[Array, "b n h e"], State | None]:
    r"""Outputs, and the state after the last token (None if not causal).

    $$ o_i = \sum_j w_{ij} v_j, \qquad
       \text{normalised: } o_i = \sum_j w_{ij} v_j \Big/ \max\Big(\sum_j w_{ij}, \epsilon\Big) $$

    where $w$ is that of `weights`, and a causal sum stops at $j = i$. The state is what later tokens need to
    know of the n tokens so far, seen from the last of them:

    $$ C = \sum_j \Lambda_{jn} \cos(\theta (n - 1 - j))\, \phi(k_j) v_j^T, \qquad
       S = \sum_j \Lambda_{jn} \sin(\theta (n - 1 - j))\, \phi(k_j) v_j^T, \qquad
       \Lambda_{jn} = \prod_{j < t < n} \lambda_t $$

    as (kv, z): kv [s h f e] is C, with theta C then S along f; z [s h f] is the same with 1 for $v_j$, and
    None unless weights are normalised. Scale is not in them. A call with an initial state $(C, S)$ adds

    $$ \mathrm{scale} \cdot \lambda_0 \cdots \lambda_i \; \phi(q_i)^T
       (\cos(\theta (i + 1))\, C - \sin(\theta (i + 1))\, S) $$

    to the sum of output i, so that a sequence may be split anywhere.

    Source: cosFormer (Qin et al. 2022, https://arxiv.org/abs/2202.08791), TransNormerLLM (Qin et al. 2023,
    https://arxiv.org/abs/2307.14995) and Lightning Attention (Qin et al. 2024, https://arxiv.org/abs/2401.04658).
    """
    o, state = each_head(_definition, q, k, v, **options)
    return o, state if options.get("causal", True) else None


def _definition(head: Head) -> tuple[Float[Array, "n e"], Float[Array, "f e"]]:
    w, seen = pair_weights(head)
    o = np.zeros((len(head.q), head.v.shape[1]))
    for i, j in enumerate(seen):  # j: a boolean mask over the keys that query i sees
        o[i] = w[i, j] @ head.v[j]
    if not head.causal:
        return o, head.state
    d = head.q.shape[1]
    for i in range(len(head.q)):
        o[i] += head.scale * head.q[i] @ _initial_state_after(head, i + 1)[:d]
    return o, _final_state(head, seen[-1:])


def _initial_state_after(head: Head, tokens: int) -> Float[Array, "f e"]:
    """What is left of the initial state after so many tokens, seen from the last of them."""
    log_decay = head.token_log_decay()[:tokens].sum()
    if log_decay == -np.inf:
        return np.zeros_like(head.state)
    decay = float(np.exp(log_decay))
    if head.theta is None:
        return decay * head.state
    c, s = np.cos(head.theta * tokens)[:, None], np.sin(head.theta * tokens)[:, None]
    C, S = np.split(head.state, 2)
    return decay * np.concatenate([c * C - s * S, s * C + c * S])


def _final_state(head: Head, last: Bool[np.ndarray, "1 m"]) -> Float[Array, "f e"]:
    """The sums over all tokens that the last one sees, and what is left of the initial state."""
    n = len(head.q)
    state = _initial_state_after(head, n)
    log_decay = log_lambda(head)
    for j in np.flatnonzero(last):
        kv = np.exp(log_decay[-1, j]) * np.outer(head.k[j], head.v[j])
        if head.theta is None:
            state += kv
        else:
            angle = head.theta[:, None] * (n - 1 - j)
            state += np.concatenate([np.cos(angle) * kv, np.sin(angle) * kv])
    return state
