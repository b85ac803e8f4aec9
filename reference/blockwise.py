"""Lightning Attention: the same attention in blocks, quadratic inside them and recurrent between them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Unpack

import numpy as np

from .heads import Head, Options, each_head
from .recurrence import advance

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import NDArray

    from .heads import State

    Array = NDArray[np.float64]


def blockwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    *,
    block: int = 64,
    **options: Unpack[Options],
) -> tuple[Float[Array, "b n h e"], State]:
    r"""Outputs, and the state after the last token: equal to `attention`, if causal, for any block size.

    A block of m tokens, counted from 0, meets the state $X$ of all blocks before it:

    $$ o_i = \underbrace{\textstyle\sum_{j \le i} \Lambda_{ij}\, (q_i \cdot k_j)\, v_j}_{\text{intra}}
           + \underbrace{\lambda_0 \cdots \lambda_i\; q_i^T X}_{\text{inter}}, \qquad
       X \leftarrow \lambda_0 \cdots \lambda_{m-1}\, X + \sum_j \Lambda_{j,m}\, k_j v_j^T $$

    Intra is quadratic, but only in m; inter and the new state are products of matrices with m rows. So n
    tokens cost about n (m + 2 d) e multiplications, and the state can stay in fast memory throughout.

    A cosine of the distance is a product of features of twice the width, since
    $\cos(a - b) = \cos a \cos b + \sin a \sin b$: q and k become $[x \cos a, x \sin a]$, with angles that are
    never larger than a block is long.

    Source: Lightning Attention-2, algorithm 1 (Qin et al. 2024, https://arxiv.org/abs/2401.04658).
    """
    if not options.get("causal", True):
        raise ValueError("blocks are causal: the state holds only what came before")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    return each_head(lambda head: _blocks(head, block), q, k, v, **options)


def _blocks(head: Head, block: int) -> tuple[Float[Array, "n e"], Float[Array, "f e"]]:
    n = len(head.q)
    log_decay = head.token_log_decay()
    state = head.state
    o = np.zeros((n, head.v.shape[1]))
    # A token that forgets all before it (-inf) begins a block, so decays inside a block are finite.
    resets = np.flatnonzero(log_decay == -np.inf).tolist()
    for start, stop in pairwise(sorted({*range(0, n, block), *resets, n})):
        rows = slice(start, stop)
        q, k, v, g = head.scale * head.q[rows], head.k[rows], head.v[rows], log_decay[rows]
        i = np.arange(stop - start)
        inside = _decay_inside(g)  # [m m], from token j to token i of this block
        from_state = g[0] + inside[:, 0]  # [m], from the last token before this block to token i

        seen = i[:, None] >= i
        scores = _features(q, head.theta, i) @ _features(k, head.theta, i).T
        w = np.where(seen, scores * np.exp(inside), 0.0)
        intra = np.einsum("ij,ije->ie", w, np.where(seen[..., None], v, 0.0))  # not w @ v: 0 * NaN is NaN

        if g[0] == -np.inf:
            state = np.zeros_like(state)
        inter = np.exp(from_state)[:, None] * (_features(q, head.theta, -(i + 1)) @ state)
        o[rows] = intra + inter

        to_end = np.exp(inside[-1])[:, None] * v
        angle = None if head.theta is None else head.theta * len(i)
        state = advance(state, from_state[-1], angle) + _features(k, head.theta, i[::-1]).T @ to_end
    return o, state


def _decay_inside(g: Float[Array, " m"]) -> Float[Array, "m m"]:
    """The sum of the log decays after token j, up to token i: never g[0]. 0 above the diagonal."""
    total = np.zeros((len(g), len(g)))
    for j in range(len(g)):
        total[j + 1 :, j] = np.cumsum(g[j + 1 :])
    return total


def _features(
    x: Float[Array, "m d"], theta: Float[Array, " d"] | None, steps: Int[np.ndarray, " m"]
) -> Float[Array, "m f"]:
    """x, turned by so many steps of theta: f is d without theta, else 2d."""
    if theta is None:
        return x
    angle = steps[:, None] * theta
    return np.concatenate([x * np.cos(angle), x * np.sin(angle)], axis=1)
