"""Tapes without a GPU: interpreted kernels behind the interface of compiled ones, started from addresses.

Run as a program with TRITON_INTERPRET=1. Every call is made four times with new arrays: worked out, worked
out and recorded, and played twice; each result must have the bits of a call that no tape has seen.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import linattn
from linattn import registry
from linattn.backends.triton import TritonBackend, launcher

Tensor = torch.Tensor
live: dict[int, Tensor] = {}


def seen(x: Tensor | None) -> Tensor | None:
    """Remember where a tensor lies, as kernels are only told addresses."""
    if x is not None:
        live[x.data_ptr()] = x.detach()
    return x


class Compiled:
    """An interpreted kernel that is started as a compiled one is."""

    function = packed_metadata = None

    def __init__(self, jit: Any, pointers: tuple[int, ...]) -> None:
        self.jit, self.pointers = jit, pointers

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *flat: self.start(grid[0], flat)

    def run(self, programs: int, y: int, z: int, stream: Any, *rest: Any) -> None:
        self.start(programs, rest[5:])

    def start(self, programs: int, flat: tuple[Any, ...]) -> None:
        given = [live[x] if i in self.pointers else x for i, x in enumerate(flat)]
        self.jit[(programs,)](*given)


class Jit:
    """Compiles to `Compiled`."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit

    def __getitem__(self, grid: tuple[int]) -> Any:
        def start(*arguments: Any, num_warps: int, num_stages: int) -> Compiled:
            self.jit[grid](*arguments)
            return Compiled(self.jit, tuple(i for i, x in enumerate(arguments) if isinstance(x, Tensor)))

        return start


def aligned(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    x = torch.randn(*shape, dtype=dtype)
    assert x.data_ptr() % 16 == 0
    seen(x)
    return x.requires_grad_(grad)


def calls() -> dict[str, dict[str, Any]]:
    """Kinds of calls, as functions of fresh arrays."""
    decay, theta = -torch.rand(2), torch.rand(2, 16)
    borders = torch.tensor([0, 20, 20, 50])
    return {
        "plain": {},
        "decay": {"log_decay": decay},
        "cosformer": {"feature_map": "relu", "reweight": linattn.Cosine(90), "normalize": True},
        "cosformer, not causal": {
            "feature_map": "relu", "reweight": linattn.Cosine(90), "normalize": True, "causal": False,
        },
        "lrpe": {"log_decay": decay, "reweight": linattn.LRPE(theta), "feature_map": "silu"},
        "packed": {"cu_seqlens": borders, "log_decay": decay, "return_state": True},
        "lengths": {"lengths": torch.tensor([31]), "normalize": True, "feature_map": "elu+1"},
    }  # fmt: skip


def results(keywords: dict[str, Any], inputs: list[Tensor], do: Tensor, backend: str) -> list[Tensor]:
    """o, the state and the gradients of one call."""
    with torch.no_grad():
        alone = linattn.attention(*inputs, backend=backend, **keywords)
    out = linattn.attention(*inputs, backend=backend, **keywords)
    o, state = out if keywords.get("return_state") else (out, None)
    grads = torch.autograd.grad(o, inputs, do)
    first = alone[0] if keywords.get("return_state") else alone
    return [first, o.detach(), *grads, *([] if state is None else [state.kv.detach(), state.length])]


@contextlib.contextmanager
def untaped() -> Iterator[None]:
    """Every pass is worked out."""
    from linattn.backends.triton import backward, launch

    with contextlib.ExitStack() as stack:
        for module in (launch, backward):
            stack.enter_context(
                mock.patch.object(module, "repeatable", lambda name, owner, inputs, work: work())
            )
        yield


def check_passes() -> int:
    """Every kind of call, forward and backward; returns how often a tape was played."""
    played = 0
    play = launcher.Tape.play

    def counted(self: launcher.Tape, inputs: Any) -> Any:
        nonlocal played
        found = play(self, inputs)
        played += found is not None
        return found

    with mock.patch.object(launcher.Tape, "play", counted):
        for name, keywords in calls().items():
            for x in keywords.values():
                seen(x.theta if isinstance(x, linattn.LRPE) else x if isinstance(x, Tensor) else None)
            for turn in range(4):
                inputs = [aligned(1, 50, 2, 16, grad=True) for _ in range(3)]
                do = aligned(1, 50, 2, 16)
                got = results(keywords, inputs, do, "triton")
                with untaped():
                    want = results(keywords, inputs, do, "untaped")
                for i, (a, b) in enumerate(itertools.zip_longest(got, want)):
                    assert torch.equal(a, b), (
                        f"{name}, call {turn}: result {i} differs by {(a - b).abs().max()}"
                    )
    return played


def main() -> None:
    from linattn.backends.triton import backward, decode, starts

    backend, untaped = TritonBackend(interpreted=True), TritonBackend(interpreted=True)
    untaped.name = "untaped"
    registry.known().update(triton=backend, untaped=untaped)
    places = [
        (starts, "product"), (starts, "scan"), (backward, "denominator_gradient"),
        (backward, "suffix_sums"), (backward, "crossing"), (decode, "start"),
    ]  # fmt: skip
    for module, name in places:
        known = getattr(module, name)
        known.jit = Jit(known.jit)
    make = {"empty": torch.empty, "zeros": torch.zeros, "ones": torch.ones}

    def made(name: str) -> Any:
        def build(*shape: Any, **how: Any) -> Tensor:
            x: Tensor = make[name](*shape, **how)
            if name == "empty" and x.is_floating_point():
                x.fill_(float("nan"))
            seen(x)
            return x

        return build

    with (
        mock.patch.object(torch, "empty", made("empty")),
        mock.patch.object(torch, "zeros", made("zeros")),
        mock.patch.object(torch, "ones", made("ones")),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
    ):
        played = check_passes()
    assert played >= 20, f"tapes were played {played} times only"
    print(f"played {played}")


if __name__ == "__main__":
    main()
