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
from linattn import prepared, registry
from linattn.backends.triton import TritonBackend, launcher
from tests.triton.drawing import carried, segmented

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


def aligned(*shape: int, turned: bool = False, grad: bool = False) -> Tensor:
    x = torch.randn(*shape)
    assert x.data_ptr() % 16 == 0
    seen(x)
    return (x.transpose(1, 2) if turned else x).requires_grad_(grad)


def calls() -> dict[str, dict[str, Any]]:
    """Kinds of calls, as functions of fresh arrays."""
    decay, theta = -torch.rand(2), torch.rand(2, 16)
    borders = torch.tensor([0, 20, 20, 50])
    return {
        "plain": {},
        "decay": {"log_decay": decay},
        "turned": {"log_decay": decay},
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
    from linattn.backends.triton import backward, decode, launch

    with contextlib.ExitStack() as stack:
        for module in (launch, backward, decode):
            stack.enter_context(
                mock.patch.object(module, "repeatable", lambda name, owner, inputs, work: work())
            )
        yield


def check_passes() -> int:
    """Every kind of call, forward and backward; returns how often a tape was played."""
    with counted() as played:
        for name, keywords in calls().items():
            for x in keywords.values():
                seen(x.theta if isinstance(x, linattn.LRPE) else x if isinstance(x, Tensor) else None)
            for turn in range(4):
                inputs = [aligned(1, 50, 2, 16, grad=True) for _ in range(3)]
                if name == "turned":
                    inputs = [aligned(1, 2, 50, 16, turned=True, grad=True) for _ in range(3)]
                do = aligned(1, 50, 2, 16)
                got = results(keywords, inputs, do, "triton")
                with untaped():
                    want = results(keywords, inputs, do, "untaped")
                for i, (a, b) in enumerate(itertools.zip_longest(got, want)):
                    assert torch.equal(a, b), (
                        f"{name}, call {turn}: result {i} differs by {(a - b).abs().max()}"
                    )
    return len(played)


def check_steps() -> int:
    """Steps with and without slots, on new arrays and states; returns how often a tape was played."""
    decay = -torch.rand(2)
    seen(decay)
    with counted() as played, torch.no_grad(), mock.patch.object(prepared, "_on_host", lambda call: False):
        for named in (False, True):
            for turn in range(5):
                q, k, v = (aligned(3, 2, 16) for _ in range(3))
                slots = seen(torch.tensor([turn % 4, -1, (turn + 2) % 4])) if named else None
                pools = [linattn.State.zeros(q, 4 if named else 3, 2, 16, 16) for _ in range(2)]
                start = torch.randn_like(pools[0].kv)
                for pool in pools:
                    pool.kv.copy_(start)
                    seen(pool.kv)
                    seen(pool.length)
                how: dict[str, Any] = {"log_decay": decay, "slots": slots}
                got = linattn.decode_step(q, k, v, pools[0], backend="triton", **how)
                with untaped():
                    want = linattn.decode_step(q, k, v, pools[1], backend="untaped", **how)
                assert torch.equal(got, want), f"slots {named}, step {turn}"
                for part in ("kv", "length"):
                    after = [getattr(pool, part) for pool in pools]
                    assert torch.equal(*after), f"slots {named}, step {turn}: {part}"
    return len(played)


@contextlib.contextmanager
def counted() -> Iterator[list[launcher.Tape]]:
    """The tapes that are played inside."""
    played: list[launcher.Tape] = []
    play = launcher.Tape.play

    def counting(self: launcher.Tape, inputs: Any) -> Any:
        found = play(self, inputs)
        if found is not None:
            played.append(self)
        return found

    with mock.patch.object(launcher.Tape, "play", counting):
        yield played


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
    names = ("empty", "empty_strided", "empty_like", "zeros", "ones")
    make = {name: getattr(torch, name) for name in names}

    def made(name: str) -> Any:
        def build(*shape: Any, **how: Any) -> Tensor:
            x: Tensor = make[name](*shape, **how)
            if name.startswith("empty") and x.is_floating_point():
                x.fill_(float("nan"))
            seen(x)
            return x

        return build

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch, name, made(name)))
        stack.enter_context(
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True)
        )
        played = check_passes()
        with segmented(16, 16), carried() as folded:
            in_segments = check_passes()
        steps = check_steps()
    assert played >= 20, f"tapes were played {played} times only"
    assert in_segments >= 20, f"tapes of passes in segments were played {in_segments} times only"
    assert set(folded) == {False, True}, "not both ways to come by the states of segments"
    assert steps >= 6, f"tapes of steps were played {steps} times only"
    print(f"played {played}")


if __name__ == "__main__":
    main()
