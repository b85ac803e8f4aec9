"""Calls on rows of a pool, bit for bit what calls on the rows themselves give; nothing else changes.

Run as a program with TRITON_INTERPRET=1, where every call is cut into segments.
"""

from __future__ import annotations

from typing import Any

import torch

import linattn
from linattn import LRPE, Cosine, State
from linattn.backends import Backend
from linattn.backends.triton import TritonBackend
from tests.triton.drawing import segmented

HEADS, D, E, POOL = 2, 20, 33, 6


def kinds(device: str) -> dict[str, dict[str, Any]]:
    """Options of calls on three sequences, by name."""

    def x(*shape: int) -> Any:
        return torch.rand(*shape, device=device)

    return {
        "plain": {},
        "per head": {"log_decay": -x(HEADS)},
        "per token, lrpe": {
            "log_decay": -x(3, 70, HEADS), "reweight": LRPE(x(HEADS, D)), "feature_map": "silu",
        },
        "packed": {"log_decay": -x(HEADS), "cu_seqlens": torch.tensor([0, 41, 41, 70], device=device)},
        "lengths": {"reweight": Cosine(500), "lengths": torch.tensor([70, 3, 0], device=device)},
        "normalized": {"reweight": Cosine(500), "normalize": True, "feature_map": "relu"},
    }  # fmt: skip


def check(name: str, backend: str | Backend, device: str, slots: list[int], dtype: torch.dtype) -> None:
    """One kind of call: outputs, named rows, padding, and rows that nobody names."""
    generator = torch.Generator(device).manual_seed(0)
    options = kinds(device)[name] | {"backend": backend}
    batch = 1 if "cu_seqlens" in options else 3

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, v = drawn(batch, 70, HEADS, D), drawn(batch, 70, HEADS, D), drawn(batch, 70, HEADS, E)
    reweight, normalize = options.get("reweight"), options.get("normalize", False)
    pool = State.zeros(
        q, POOL, HEADS, D, E, reweight=reweight, normalize=normalize, feature_map=options.get("feature_map")
    )
    for part in (pool.kv, pool.z):
        if part is not None:
            part.copy_(torch.rand(part.shape, generator=generator, device=device))
    pool.length += torch.arange(POOL, device=device)
    pool.kv[POOL - 1] = torch.nan
    before, named = pool.clone(), torch.tensor(slots, device=device)
    real = named >= 0
    rows = before.select(named.clamp(min=0))
    if (~real).any():  # what padding would compute is not looked at
        rows.kv[~real] = 0
    want, after = linattn.attention(q, k, v, initial_state=rows, return_state=True, **options)
    got = linattn.attention(q, k, v, initial_state=pool, slots=named.to(dtype), **options)

    borders = options.get("cu_seqlens")
    for s, slot in enumerate(slots):
        mine, other = (
            (x[0, borders[s] : borders[s + 1]] if borders is not None else x[s]) for x in (got, want)
        )
        assert torch.equal(mine, other if slot >= 0 else torch.zeros_like(other)), (name, s)
        for part in ("kv", "z", "length"):
            if slot >= 0 and getattr(pool, part) is not None:
                assert torch.equal(getattr(pool, part)[slot], getattr(after, part)[s]), (name, s, part)
    for row in sorted(set(range(POOL)) - set(slots)):
        for mine, other in ((pool.kv, before.kv), (pool.length, before.length)):
            assert torch.equal(mine[row].nan_to_num(7), other[row].nan_to_num(7)), (name, row)


def check_that_autograd_sees_it(backend: str | Backend, device: str) -> None:
    """A graph that kept a state refuses to go on when a kernel has written over it."""
    y = torch.rand(2, 20, HEADS, D, device=device)
    steps = (
        lambda pool: linattn.attention(
            y, y, y, initial_state=pool, slots=torch.tensor([0, 1], device=device), backend=backend
        ),
        lambda pool: linattn.decode_step(y[:, 0], y[:, 0], y[:, 0], pool, backend=backend),
    )
    for change in steps:
        pool, q = State.zeros(y, 2, HEADS, D, D), y.clone().requires_grad_()
        o = linattn.attention(q, y, y, initial_state=pool, backend=backend)
        with torch.no_grad():
            change(pool)
        try:
            torch.autograd.grad(o.sum(), q)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), error
        else:
            raise AssertionError("a gradient of a state that is no more")


def main() -> None:
    backend = TritonBackend(interpreted=True)
    check_that_autograd_sees_it(backend, "cpu")
    with segmented(32, 16):
        for name in kinds("cpu"):
            check(name, backend, "cpu", [3, -1, 0], torch.int64)
            check(name, backend, "cpu", [4, 2, 1], torch.int32)


if __name__ == "__main__":
    main()
