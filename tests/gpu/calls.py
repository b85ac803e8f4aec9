"""Calls on CUDA tensors, and their results bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import linattn
from linattn import LRPE, Cosine, registry

HEADS, D = 4, 64
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
needs_cupy = pytest.mark.skipif(
    registry.get("cupy").unavailable() is not None, reason="CuPy finds no CUDA device"
)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "head": lambda: {"log_decay": -torch.rand(HEADS, device="cuda")},
    "token": lambda: {"log_decay": -torch.rand(2, 512, HEADS, device="cuda")},
    "lrpe": lambda: {
        "log_decay": -torch.rand(HEADS, device="cuda"),
        "reweight": LRPE(torch.rand(HEADS, D, device="cuda")),
        "feature_map": "silu",
    },
    "cosformer": lambda: {"reweight": Cosine(512), "feature_map": "relu", "normalize": True},
    "both ways": lambda: {"log_decay": -torch.rand(HEADS, device="cuda"), "causal": False},
    "no way": lambda: {
        "reweight": Cosine(512), "feature_map": "relu", "normalize": True, "causal": False
    },
}  # fmt: skip


def drawn(*shape: int, dtype: Any = torch.bfloat16, count: int = 3, seed: int = 0) -> list[Any]:
    """Normal tensors [2 512 H D], or of another shape."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = shape or (2, 512, HEADS, D)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(count)]


def both(q: Any, k: Any, v: Any, do: Any, backend: str = "triton", **options: Any) -> tuple[Any, ...]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = linattn.attention(*leaves, backend=backend, **options)
    return (o.detach(), *torch.autograd.grad(o, leaves, do))


def same(got: Any, want: Any) -> None:
    """Assert the same bits in every tensor."""
    for mine, other in zip(got, want, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other), (mine.float() - other.float()).abs().max()


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Raises where the host waits for the GPU."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of `run`, and what it returned: memory that every replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
