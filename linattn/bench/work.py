"""The calls that are timed: the library's, and the two computations it stands beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import linattn
from linattn.bench.cases import HEADS, WIDTH, Figure
from linattn.errors import OptionError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

Work = Callable[[], Any]


def inputs(n: int, count: int) -> list[Float[np.ndarray, "1 n h d"]]:
    """The same standard normal q, k, v (and gradient of o) for everyone who is given this length."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, n, HEADS, WIDTH), dtype=np.float32) for _ in range(count)]


def prepare(figure: Figure) -> Work:
    """Make the inputs of a figure; return the call, which keeps nothing from one time to the next.

    The peers get arrays that are contiguous in the layout they work in, [B, H, N, D].

    Raises OptionError for a backward pass of NumPy: its gradients are another call.
    """
    arrays = inputs(figure.n, 4 if figure.backward else 3)
    if figure.implementation == "numpy":
        if figure.backward:
            raise OptionError(f"forward and backward are timed together for torch only, got {figure.label}")
        return _forward(figure, arrays)
    import torch

    if figure.implementation in ("softmax", "released cosFormer"):
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    tensors = [torch.from_numpy(x) for x in arrays]
    if not figure.backward:
        return _forward(figure, tensors)
    leaves, do = tensors[:3], tensors[3]
    for leaf in leaves:
        leaf.requires_grad_()
    forward = _forward(figure, leaves)
    return lambda: torch.autograd.grad(forward(), leaves, do)


def _forward(figure: Figure, arrays: list[Any]) -> Work:
    q, k, v = arrays[:3]
    if figure.implementation == "softmax":
        import torch

        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    if figure.implementation == "released cosFormer":
        return lambda: released_cosformer(q, k, v)
    if figure.call == "cosformer":
        return lambda: linattn.cosformer_attention(q, k, v, causal=True)
    decay = linattn.decay.alibi(HEADS) if figure.call == "decay" else None
    return lambda: linattn.attention(q, k, v, log_decay=decay)


def released_cosformer(
    q: Float[torch.Tensor, "b h n d"],
    k: Float[torch.Tensor, "b h n d"],
    v: Float[torch.Tensor, "b h n e"],
    eps: float = 1e-6,
) -> Float[torch.Tensor, "b h n e"]:
    """Causal cosFormer as the released module computes it: one state of 2D x E for every position, summed up.

    Restated from its formulas, in its order: features [x sin, x cos], the outer product of every key with
    its value (an array of N·2D·E per head), the running sum of those (another), read by the queries; the
    divisor by the running sum of the keys. max_len is the length of the call.

    Source: Qin et al. 2022, https://arxiv.org/abs/2202.08791, and the causal branch of
    `CosformerAttention.forward` of the authors' released code.
    """
    import torch

    n = q.shape[2]
    angle = math.pi / 2 / n * torch.arange(1, n + 1, dtype=q.dtype)[:, None]  # [n 1]
    sin, cos = angle.sin(), angle.cos()
    fq, fk = (torch.cat((x.relu() * sin, x.relu() * cos), -1) for x in (q, k))  # [b h n 2d]
    states = torch.einsum("bhnf,bhne->bhnfe", fk, v).cumsum(2)
    sums = torch.einsum("bhnf,bhnfe->bhne", fq, states)
    divisor = torch.einsum("bhnf,bhnf->bhn", fq, fk.cumsum(2)).clamp_min(eps)
    return sums / divisor[..., None]
