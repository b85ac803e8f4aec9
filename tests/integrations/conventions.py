"""flash-linear-attention's plain functions beside the calls that equal them; a process of its own.

Importing that library leaves tuners behind that other tests would find. Prints {check: traceback or null}.
"""

from __future__ import annotations

import importlib
import json
import traceback
import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch

import linattn
from linattn import decay

B, N, H, D, E = 2, 64, 3, 8, 5


def fla(name: str) -> Any:
    """One of its modules; they say at length that there is no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"fla.ops.{name}")


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal(shape)).float() for shape in shapes]


def qkv() -> list[torch.Tensor]:
    return drawn((B, N, H, D), (B, N, H, D), (B, N, H, E))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Sums of N D products in float32, in another order."""
    allowed = 100 * torch.finfo(torch.float32).eps * want.abs().max()
    assert got.shape == want.shape and want.abs().max() > 0.1
    assert (got - want).abs().max() <= allowed, f"{(got - want).abs().max()} > {allowed}"


def simple_gla() -> None:
    for scale in (None, 1.0):
        q, k, v = qkv()
        g, (start,) = -torch.rand(B, N, H), drawn((B, H, D, E))
        want, after = fla("simple_gla.naive").naive_recurrent_simple_gla(
            q, k, v, g, scale=scale, initial_state=start, output_final_state=True
        )
        state = linattn.State(start, None, torch.zeros(B, dtype=torch.int64), d=D)
        o, final = linattn.attention(
            q, k, v, log_decay=g, scale=D**-0.5 if scale is None else scale, initial_state=state,
            return_state=True,
        )  # fmt: skip
        close(o, want)
        close(final.kv, after)


def lightning_attn() -> None:
    """Its decays, which it hands to a kernel for GPUs."""
    chunk = fla("lightning_attn.chunk")
    for layer in (0, 3):
        with mock.patch.object(chunk, "chunk_simple_gla") as kernel:
            chunk.chunk_lightning_attn(*qkv(), layer_idx=layer, num_layers=5)
        g = kernel.call_args.kwargs["g_gamma"].double().numpy()
        assert abs(g - decay.fla(H, layer, 5)).max() <= 4 * np.finfo(np.float32).eps * 8


def retention() -> None:
    q, k, v = qkv()
    want = fla("retention.naive").naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    log_decay = np.log1p(-(2.0 ** (-5 - np.arange(H))))
    close(linattn.attention(q, k, v, log_decay=log_decay, scale=D**-0.5), want)


def linear_attn() -> None:
    for normalize in (False, True):
        q, k, v = (x.abs() if normalize else x for x in qkv())
        want = fla("linear_attn.naive").naive_chunk_linear_attn(q, k, v, normalize=normalize)
        close(linattn.attention(q, k, v, normalize=normalize, scale=D**-0.5), want)


CHECKS = {check.__name__: check for check in (simple_gla, lightning_attn, retention, linear_attn)}


def outcome(check: Any) -> str | None:
    try:
        check()
    except AssertionError:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    print(json.dumps({name: outcome(check) for name, check in CHECKS.items()}))
