"""Feature maps: what is applied to queries and keys, elementwise, before they meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def feature(x: Float[Array, "*shape"], name: str | None) -> Float[Array, "*shape"]:
    r"""Apply $\phi$.

    - None: $x$
    - "relu": $\max(x, 0)$, cosFormer (Qin et al. 2022, https://arxiv.org/abs/2202.08791)
    - "silu": $x\,\sigma(x)$, TransNormerLLM (Qin et al. 2023, https://arxiv.org/abs/2307.14995)
    - "elu+1": $x + 1$ where $x > 0$, else $e^x$ (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236)
    """
    if name is None:
        return x
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "silu":
        return x * _sigmoid(x)
    if name == "elu+1":
        return np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))
    raise ValueError(f'feature_map must be None, "relu", "silu" or "elu+1", got {name!r}')


def feature_slope(x: Float[Array, "*shape"], name: str | None) -> Float[Array, "*shape"]:
    r"""The derivative $\phi'(x)$; where relu has a corner, at 0, it is 0."""
    if name is None:
        return np.ones_like(x)
    if name == "relu":
        return np.where(x > 0, 1.0, 0.0)
    if name == "silu":
        s = _sigmoid(x)
        return s + x * s * (1.0 - s)
    if name == "elu+1":
        return np.exp(np.minimum(x, 0.0))
    raise ValueError(f'feature_map must be None, "relu", "silu" or "elu+1", got {name!r}')


def _sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    small = np.exp(-abs(x))  # never overflows
    return np.where(x >= 0, 1.0, small) / (1.0 + small)
