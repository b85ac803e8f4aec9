"""What the library would launch for a call, on tensors that do not exist; and those launches compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import linattn
from linattn import Cosine, State
from linattn.backends import Saved
from linattn.backends.triton import backward, launch, plan
from linattn.backends.triton.launcher import Launcher
from linattn.checks import Call, problem_of

MULTIPROCESSORS = 132
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.bool: "*i1",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and the values that it is compiled for."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def flags(self) -> dict[str, Any]:
        return dict(self.constants)

    def __str__(self) -> str:
        said = (f"{name}={value}" for name, value in self.constants if name.isupper() and value)
        return f"{self.kernel.__name__}({', '.join(said)})"


def launch_of(kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """Types and values as Triton specializes them: 1 is a constant, and so is being a multiple of 16."""
    options = tuple(sorted((name, named.pop(name)) for name in ("num_warps", "num_stages") if name in named))
    values = dict(zip(kernel.arg_names, given, strict=False)) | named
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        kind = "constexpr"
        free = not (parameter.is_constexpr or parameter.do_not_specialize)
        if isinstance(value, torch.Tensor) and not parameter.is_constexpr:
            kind = POINTERS[value.dtype]
            aligned += [name]
        elif isinstance(value, float) and not parameter.is_constexpr:
            kind = "fp32"
        elif not parameter.is_constexpr and not (free and value == 1):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [name] if free and value % 16 == 0 else []
        if kind == "constexpr":
            constants.append((name, value))
        signature.append((name, kind))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


class Recorder:
    """In place of a kernel: takes note, and runs nothing."""

    def __init__(self, kernel: Any, seen: dict[Launch, Any]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        def run(*given: Any, **named: Any) -> None:
            self.seen[launch_of(self.kernel, given, named)] = None

        return run


@contextlib.contextmanager
def recorded() -> Iterator[dict[Launch, Any]]:
    """Launches inside go into the dictionary that this yields, each with the keys under which it is kept."""
    seen: dict[Launch, Any] = {}

    def note(
        self: Launcher,
        programs: int,
        key: Any,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> None:
        one = launch_of(self.jit, (*arguments, *constants), options)
        seen[one] = [*(seen.get(one) or []), (self.jit.__name__, key)]

    with contextlib.ExitStack() as stack:
        for module in (launch, backward):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(mock.patch.object(module, name, Recorder(value, seen)))
        stack.enter_context(mock.patch.object(Launcher, "__call__", note))
        stack.enter_context(mock.patch.object(plan, "blocks", lambda *of, device="": plan.shipped(*of[:5])))
        stack.enter_context(mock.patch.object(launch, "multiprocessors", lambda device: MULTIPROCESSORS))
        yield seen


def launches(*sizes: int, **options: Any) -> list[Launch]:
    """Every different launch of `attention` on tensors of these shapes, and of its backward pass."""
    return list(kept(*sizes, **options))


def kept(
    b: int = 2, h: int = 4, n: int = 256, d: int = 64, e: int = 64, m: int | None = None, *,
    dtype: str = "bfloat16", decay: str | None = None, reweight: str | None = None, gradients: bool = True,
    state: bool = False, **options: Any,
) -> dict[Launch, Any]:  # fmt: skip
    """The same, each with the keys under which it is kept."""
    with recorded() as seen:

        def x(*shape: int, of: str = "float32") -> Any:
            return torch.empty(shape, dtype=getattr(torch, of), device="meta")

        q, k = x(b, n, h, d, of=dtype), x(b, m or n, h, d, of=dtype)
        v, do = x(b, m or n, h, e, of=dtype), x(b, n, h, e, of=dtype)
        log_decay = None if decay is None else x(h) if decay == "head" else x(b, n, h)
        theta = x(h, d) if reweight == "lrpe" else None
        angles: Any = Cosine(n) if reweight == "cosine" else linattn.LRPE(theta) if reweight else None
        for name, kind in (("key_mask", "bool"), ("lengths", "int64"), ("cu_seqlens", "int64")):
            if options.pop(name, False):
                shape = {"key_mask": (b, m or n), "lengths": (b,), "cu_seqlens": (4,)}[name]
                options[name] = x(*shape, of=kind)
        rows = 3 if options.get("cu_seqlens") is not None else b
        features = 2 * d if reweight else d
        memory = State(
            x(rows, h, features, e), x(rows, h, features) if options.get("normalize") else None,
            x(rows, of="int64"),
        )  # fmt: skip
        call = Call(
            q, k, v, log_decay, angles, initial_state=memory if state else None, return_state=state, **options
        )
        problem = problem_of(call, needs_grad=gradients)
        saved = Saved(
            q,
            k,
            v,
            log_decay,
            theta,
            call.key_mask,
            call.lengths,
            call.cu_seqlens,
            memory if state else None,
            do,
        )
        launch.forward(problem, saved)
        if gradients:
            backward.backward(problem, saved, do, memory if state else None)
        if gradients and problem.normalize:  # outside a compiler, with denominators that are kept
            *_, denominators = launch.forward_keeping(problem, saved)
            saved = dataclasses.replace(saved, kept=denominators)
            backward.backward(problem, saved, do, memory if state else None)
    return seen


def compiled(one: Launch, capability: int) -> Any:
    """A launch compiled for a GPU that need not be here."""
    names = [name for name, _ in one.signature]
    places = {(names.index(name),): value for name, value in one.constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in one.aligned}
    source = ASTSource(fn=one.kernel, signature=dict(one.signature), constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(one.options))


def spilled(binary: Any) -> int:
    """Bytes of each thread's local memory: what did not fit into registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (found,) = re.findall(r"STACK:(\d+)", said)
    return int(found)
