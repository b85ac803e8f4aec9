"""Decay schedules: how fast each head of each layer forgets.

Every function returns the natural log of each head's factor per token, float64 [h], all <= 0. What papers and
released code call a slope or a rate is the same number with the other sign. Heads and layers count from 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def alibi(heads: int) -> Float[Array, " h"]:
    r"""The slopes of ALiBi, as log decays.

    $$ \ln \lambda_h = -2^{-8 (h + 1) / H} $$

    for a power of two H. Else, with P the next power of two below H: the slopes for P heads, then every other
    slope for 2P heads (the first, the third, ...) until there are H.

    Source: Press et al. 2022, https://arxiv.org/abs/2108.12409, and its released code for other H.
    """
    heads = _count("heads", heads)
    below = 1 << (heads.bit_length() - 1)
    if below == heads:
        return -(2.0 ** (-8.0 * np.arange(1, heads + 1) / heads))
    return np.concatenate([alibi(below), alibi(2 * below)[::2][: heads - below]])


def transnormer(heads: int, layer: int, layers: int, schedule: str = "released") -> Float[Array, " h"]:
    r"""TransNormerLLM: early layers forget quickly, the last hardly at all.

    $$ \text{released:}\quad \ln \lambda_{hl} = -\mathrm{slope}_h \left(1 - \frac{l}{L - 1} + 10^{-5}\right)
       \quad \text{with the slopes of } \texttt{alibi} $$
    $$ \text{paper:}\quad \ln \lambda_{hl} = -\frac{8 (h + 1)}{H} \left(1 - \frac{l}{L}\right) $$

    The two differ widely: of 8 heads in the first layer, the last forgets with a rate of 0.0039 or of 8.
    Released checkpoints need the first. One layer (L = 1) counts as the first of many, where the released
    code divides by zero.

    Source: Qin et al. 2023, https://arxiv.org/abs/2307.14995, and the checkpoints' `modeling_transnormer.py`.
    """
    heads, layer, layers = _place(heads, layer, layers)
    if schedule == "released":
        return alibi(heads) * (1.0 - layer / max(layers - 1, 1) + 1e-5)
    if schedule == "paper":
        return -8.0 * np.arange(1, heads + 1) / heads * (1.0 - layer / layers)
    raise ValueError(f'schedule must be "released" or "paper", got {schedule!r}')


def minimax(heads: int, layer: int, layers: int) -> Float[Array, " h"]:
    r"""MiniMax-01: as TransNormerLLM's released schedule, with one formula for every H.

    $$ \ln \lambda_{hl} = -2^{-8 (h + 1) / H} \left(1 - \frac{l}{L - 1 + 10^{-5}} + 10^{-5}\right) $$

    Source: `MiniMaxLightningAttention` of Hugging Face transformers.
    """
    heads, layer, layers = _place(heads, layer, layers)
    slopes = 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
    return -slopes * (1.0 - layer / (layers - 1 + 1e-5) + 1e-5)


def fla(heads: int, layer: int, layers: int) -> Float[Array, " h"]:
    r"""flash-linear-attention's `lightning_attn`: head 0 never forgets.

    $$ \ln \lambda_{hl} = -\frac{8 h}{H} \left(1 - \frac{l}{L}\right) $$

    Source: `chunk_lightning_attn` of flash-linear-attention; the paper's formula, but with heads from 0.
    """
    heads, layer, layers = _place(heads, layer, layers)
    return 0.0 - 8.0 * np.arange(heads) / heads * (1.0 - layer / layers)


def _place(heads: int, layer: int, layers: int) -> tuple[int, int, int]:
    heads, layers = _count("heads", heads), _count("layers", layers)
    if not isinstance(layer, int | np.integer) or not 0 <= layer < layers:
        raise ValueError(f"layer must be a whole number from 0 to layers - 1 = {layers - 1}, got {layer!r}")
    return heads, int(layer), layers


def _count(name: str, value: int) -> int:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)
