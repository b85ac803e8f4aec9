"""The weight of every pair of positions: the definition of linear attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np

from .heads import Head, Options, cut

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def weights(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], **options: Unpack[Options]
) -> Float[Array, "b h n m"]:
    r"""How much of value j enters output i, before any normalisation.

    $$ w_{ij} = \mathrm{scale} \cdot \Lambda_{ij} \sum_d \phi(q)_{id}\, \phi(k)_{jd} \cos(\theta_d (i - j)) $$
    $$ \Lambda_{ij} = \prod_{j < t \le i} \lambda_t \text{ (causal, 0 for } j > i\text{)}, \qquad
       \Lambda_{ij} = \lambda^{|i - j|} \text{ (not causal)}, \qquad \lambda = e^{\text{log decay}} $$

    Positions count from 0 in every sequence, for queries and keys alike. Weights between two sequences are 0.
    What acts on outputs only (normalize, eps, initial_state) may be given and changes nothing.

    Source: the cosine is cosFormer's (Qin et al. 2022, https://arxiv.org/abs/2202.08791) with one angle
    $\pi / 2M$, and LRPE's (Qin et al. 2023, https://arxiv.org/abs/2307.14995) with one per head and channel;
    $\Lambda$ is Lightning Attention's (Qin et al. 2024, https://arxiv.org/abs/2401.04658).
    """
    batch, n, heads, _ = np.shape(q)
    m = np.shape(k)[1]
    w = np.zeros((batch, heads, n, m))
    options["initial_state"] = None
    for head in cut(q, k, np.zeros((batch, m, heads, 0)), **options):
        _, b, h = head.place
        w[b, h, head.row, head.row] = pair_weights(head)[0]
    return w


def pair_weights(head: Head) -> tuple[Float[Array, "n m"], Bool[np.ndarray, "n m"]]:
    """The weights of one head, and which pairs are seen at all.

    Sums must select the seen pairs: a weight of 0 does not keep a NaN or an infinite value out of a sum.
    """
    log_decay = log_lambda(head)
    lag = _lag(head)
    seen = (log_decay > -np.inf) & ((lag >= 0) | (not head.causal))
    w = np.zeros(lag.shape)
    for i, j in enumerate(seen):  # j: a boolean mask over the keys that query i sees
        cosine = 1.0 if head.theta is None else np.cos(lag[i, j, None] * head.theta)
        w[i, j] = head.scale * np.exp(log_decay[i, j]) * (head.q[i] * head.k[j] * cosine).sum(axis=1)
    return w, seen


def log_lambda(head: Head) -> Float[Array, "n m"]:
    """The log of Lambda for every pair; what it says of a causal head's future has no meaning."""
    lag = abs(_lag(head))
    if np.ndim(head.log_decay) == 0:
        return np.where(lag == 0, 0.0, head.log_decay * np.maximum(lag, 1))  # never -inf * 0
    total = np.zeros(lag.shape)
    for j in range(len(head.k)):  # summed anew for each j: a difference of longer sums may be -inf - (-inf)
        total[j + 1 :, j] = np.cumsum(head.log_decay[j + 1 :], dtype=np.longdouble)  # equal steps round alike
    return total


def _lag(head: Head) -> Float[Array, "n m"]:
    return np.arange(float(len(head.q)))[:, None] - np.arange(float(len(head.k)))
