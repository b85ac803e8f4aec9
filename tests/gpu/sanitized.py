"""Small calls of every kind, for `make sanitize-gpu`. Run alone, it compiles what they need."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import linattn
from linattn import LRPE, Cosine, State

HEADS, BATCH = 2, 2
# N D E: a short block, an odd one at full width, one that is cut into segments
SIZES = ((70, 64, 64), (33, 128, 128), (2100, 64, 64))


def drawn(*shape: int, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def kinds(n: int, d: int) -> list[dict[str, Any]]:
    """Options of calls with gradients."""
    per_head = (-torch.rand(HEADS, device="cuda")).requires_grad_()
    cosformer = {"reweight": Cosine(4096), "feature_map": "relu", "normalize": True}
    return [
        {"log_decay": per_head},
        {"log_decay": (-torch.rand(BATCH, n, HEADS, device="cuda")).requires_grad_()},
        {
            "log_decay": per_head, "reweight": LRPE(torch.rand(HEADS, d, device="cuda", requires_grad=True)),
            "feature_map": "silu",
        },
        cosformer,
        cosformer | {"causal": False},
        {"log_decay": per_head, "causal": False, "normalize": True, "feature_map": "relu"},
    ]  # fmt: skip


def differentiated(n: int, d: int, e: int, dtype: torch.dtype) -> int:
    done = 0
    for options in kinds(n, d):
        q, k = (drawn(BATCH, n, HEADS, d, dtype=dtype, grad=True) for _ in range(2))
        v = drawn(BATCH, n, HEADS, e, dtype=dtype, grad=True)
        o = linattn.attention(q, k, v, backend="triton", **options)
        o.backward(torch.randn_like(o))
        done += 1
    return done


def served(dtype: torch.dtype) -> int:
    """Packed sequences, states, a pool, a decode step, with a normaliser and without."""
    borders, slots = torch.tensor([0, 7, 7, 300], device="cuda"), torch.tensor([1, -1, 3], device="cuda")
    decay = {"log_decay": -torch.rand(HEADS, device="cuda")}
    for options in (decay, {"feature_map": "relu", "normalize": True}):
        q, k, v = (drawn(1, 300, HEADS, 64, dtype=dtype) for _ in range(3))
        name, normalize = options.get("feature_map"), "normalize" in options
        pool = State.zeros(q, 4, HEADS, 64, 64, feature_map=name, normalize=normalize)
        given: dict[str, Any] = {**options, "backend": "triton"}
        linattn.attention(q, k, v, cu_seqlens=borders, initial_state=pool, slots=slots, **given)
        linattn.attention(q, k, v, cu_seqlens=borders, return_state=True, **given)
        token = (drawn(3, HEADS, 64, dtype=dtype) for _ in range(3))
        linattn.decode_step(*token, pool, slots=slots, **given)
    return 6


def main() -> None:
    torch.manual_seed(0)
    done = 0
    for dtype, (n, d, e) in itertools.product((torch.bfloat16, torch.float32), SIZES):
        if dtype == torch.bfloat16 or d == 64:
            done += differentiated(n, d, e, dtype)
    for dtype in (torch.bfloat16, torch.float32):
        done += served(dtype)
    torch.cuda.synchronize()
    print(f"{done} calls")


if __name__ == "__main__":
    main()
