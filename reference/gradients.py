"""The gradients of linear attention in closed form: a second recurrence, backwards in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from .features import feature_slope
from .heads import Head, Options, cut, state_shape, with_z, without_z
from .recurrence import advance
from .weights import log_lambda, pair_weights

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

    from .heads import State

    Array = NDArray[np.float64]


@dataclass
class _Gradient:
    """Of one head; q and k after their feature map, v and the state with the column of the normaliser."""

    q: Float[Array, "n d"]
    k: Float[Array, "m d"]
    v: Float[Array, "m e"]
    log_decay: Float[Array, " n"]  # of every token; only its sum where the decay is the head's
    theta: Float[Array, " d"]
    state: Float[Array, "f e"]


def gradients(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h e"],
    do: Float[Array, "b n h e"],
    dstate: State | None = None,
    **options: Unpack[Options],
) -> dict[str, Any]:
    r"""Gradients of $\langle do, o \rangle + \langle dstate, state \rangle$, by the name of the argument.

    "q", "k" and "v" always; "log_decay" and "theta" where they are given, in their own shape; "initial_state"
    where it is given, as (kv, z). A token that does not exist, and a masked key and value, have gradient 0.

    Causal: $(dC, dS)$, the gradients of the state, are found from the last token to the first:

    $$ dC_t = \mathrm{scale}\, \phi(q_t) do_t^T
            + \lambda_{t+1} (\cos\theta\, dC_{t+1} + \sin\theta\, dS_{t+1}) $$
    $$ dS_t = \lambda_{t+1} (\cos\theta\, dS_{t+1} - \sin\theta\, dC_{t+1}) $$
    $$ d\phi(q_t) = \mathrm{scale}\, C_t do_t, \qquad d\phi(k_t) = dC_t v_t, \qquad dv_t = dC_t^T \phi(k_t) $$
    $$ d\ln\lambda_t = \langle dC_t, \bar C_t \rangle + \langle dS_t, S_t \rangle, \qquad
       d\theta = \sum_t \sum_e (dS_t \circ \bar C_t - dC_t \circ S_t) $$

    with $\bar C_t = C_t - \phi(k_t) v_t^T$, the state before the token is added. Where $\lambda_t = 0$, no
    gradient passes, and $d\ln\lambda_t = 0$. Not causal: the derivatives of the weights, pair by pair.

    Normalised, $o = num / \max(den, \epsilon)$: $dnum = do / \max(den, \epsilon)$ and, if $den > \epsilon$,
    $dden = -(do \cdot o) / den$, else 0. Then num and den are one sum, over values with a 1 beside them.

    Source: derived here; without theta and normaliser also in Lightning Attention-2, algorithm 2 (Qin et al.
    2024, https://arxiv.org/abs/2401.04658).
    """
    given = {"q": q, "k": k, "v": v, "log_decay": options.get("log_decay"), "theta": options.get("theta")}
    out: dict[str, Any] = {name: np.zeros(np.shape(x)) for name, x in given.items() if x is not None}
    e, feature_map, normalize = np.shape(v)[3], options.get("feature_map"), options.get("normalize", False)
    if dstate is not None and not options.get("causal", True):
        raise ValueError("without causal=True there is no state, so dstate must be None")
    dlast = with_z(dstate, state_shape(q, v, **options), normalize)
    dfirst = np.zeros_like(dlast)
    for head in cut(q, k, v, **options):
        s, b, h = head.place
        at = (b, head.row, h)
        do_here = np.asarray(do, np.float64)[at]
        grad = _causal(head, do_here, dlast[s, h]) if head.causal else _pairs(head, do_here)
        slope_q, slope_k = (feature_slope(np.asarray(x, np.float64)[at], feature_map) for x in (q, k))
        out["q"][at] = grad.q * slope_q
        out["k"][at] = np.where(head.mask[:, None], grad.k * slope_k, 0.0)
        out["v"][at] = np.where(head.mask[:, None], grad.v[:, :e], 0.0)
        if "log_decay" in out:
            if out["log_decay"].ndim == 1:
                out["log_decay"][h] += grad.log_decay.sum()
            else:
                out["log_decay"][at] = grad.log_decay
        if "theta" in out:
            out["theta"][h] += grad.theta
        dfirst[s, h] = grad.state
    if options.get("initial_state") is not None:
        out["initial_state"] = without_z(dfirst, normalize)
    return out


def _causal(head: Head, do: Float[Array, "n e"], dstate: Float[Array, "f e"]) -> _Gradient:
    n, d = head.q.shape
    log_decay = head.token_log_decay()
    before, after = [], []  # the state at every token, without it and with it
    state = head.state
    for t in range(n):
        before.append(advance(state, log_decay[t], head.theta))
        state = before[t].copy()
        state[:d] += np.outer(head.k[t], head.v[t])
        after.append(state)

    total = np.array([head.scale * head.q[t] @ after[t][:d] for t in range(n)]).reshape(n, head.v.shape[1])
    do = _before_normalizer(head, total, do)
    grad = _zeros(head)
    back = None if head.theta is None else -head.theta
    for t in reversed(range(n)):
        dstate = dstate.copy()
        dstate[:d] += head.scale * np.outer(head.q[t], do[t])
        grad.q[t] = head.scale * after[t][:d] @ do[t]
        grad.k[t] = dstate[:d] @ head.v[t]
        grad.v[t] = head.k[t] @ dstate[:d]
        if log_decay[t] > -np.inf:
            grad.log_decay[t] = (dstate * before[t]).sum()
            if head.theta is not None:
                grad.theta += (dstate[d:] * before[t][:d] - dstate[:d] * before[t][d:]).sum(axis=1)
        dstate = advance(dstate, log_decay[t], back)
    grad.state = dstate
    return grad


def _pairs(head: Head, do: Float[Array, "n e"]) -> _Gradient:
    w, seen = pair_weights(head)
    total = np.array([w[i, j] @ head.v[j] for i, j in enumerate(seen)]).reshape(len(w), head.v.shape[1])
    do = _before_normalizer(head, total, do)
    decay = head.scale * np.exp(np.where(seen, log_lambda(head), 0.0))
    grad = _zeros(head)
    for i, mask in enumerate(seen):
        j = np.flatnonzero(mask)
        lag = (i - j)[:, None]  # [j 1]
        dw = (head.v[j] @ do[i])[:, None]  # [j 1]
        dscore = dw * decay[i, j, None]  # [j 1]
        angle = 0.0 * lag if head.theta is None else lag * head.theta  # [j d]
        grad.q[i] = (dscore * np.cos(angle) * head.k[j]).sum(axis=0)
        grad.k[j] += dscore * np.cos(angle) * head.q[i]
        grad.v[j] += np.outer(w[i, j], do[i])
        grad.log_decay[i] = (dw * abs(lag) * w[i, j, None]).sum()
        grad.theta -= (dscore * np.sin(angle) * lag * head.q[i] * head.k[j]).sum(axis=0)
    return grad


def _before_normalizer(
    head: Head, total: Float[Array, "n e"], do: Float[Array, "n e"]
) -> Float[Array, "n e"]:
    """The gradient of the sums over values, and beside it that of the sum of weights."""
    if head.eps is None:
        return do
    weight = total[:, -1:]
    dnum = do / np.maximum(weight, head.eps)
    dden = np.where(weight > head.eps, -(dnum * head.normalized(total)).sum(axis=1, keepdims=True), 0.0)
    return np.concatenate([dnum, dden], axis=1)


def _zeros(head: Head) -> _Gradient:
    n, d = head.q.shape
    zero_q, zero_k, zero_v, zero_state = (np.zeros_like(x) for x in (head.q, head.k, head.v, head.state))
    return _Gradient(zero_q, zero_k, zero_v, np.zeros(n), np.zeros(d), zero_state)
