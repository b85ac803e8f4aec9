"""torch tensors on CUDA, by fused Triton kernels: one product for every pass."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

from linattn.arrays import Array, written
from linattn.backends import Gradients, Inputs, Saved
from linattn.problem import Problem
from linattn.state import State

WIDEST = 256
OLDEST = (8, 0)
SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))  # 99 KB of shared memory; the shipped blocks need up to 200


class TritonBackend:
    """Forward, backward and decode in Triton.

    interpreted: take CPU tensors, for kernels that Triton's interpreter runs; a check of their logic.
    """

    name = "triton"
    arrays = {"torch": True}  # noqa: RUF012 (a constant)

    def __init__(self, *, interpreted: bool = False) -> None:
        self.interpreted = interpreted

    def unavailable(self) -> str | None:
        for package in ("torch", "triton"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install 'linattn[triton]'"
        if self.interpreted:
            return None
        torch = _torch()
        if not torch.cuda.is_available():
            return "no CUDA device: torch.cuda.is_available() is False"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        on_gpu = problem.device.startswith("cuda")
        if self.interpreted:
            if on_gpu:
                return "interpreted kernels take CPU tensors"
            if problem.dtype == "bfloat16":
                return "Triton's interpreter computes bfloat16 wrongly"
        elif not on_gpu:
            return f"takes CUDA tensors, got {problem.device}"
        if problem.dtype == "float64":
            return "has no float64: its matrix products are float32 or narrower"
        if problem.d > WIDEST or problem.e > WIDEST:
            return f"takes D and E up to {WIDEST}, got {problem.d} and {problem.e}"
        if on_gpu and (capability := _capability(problem.device)) < OLDEST:
            return f"needs compute capability 8.0, {problem.device} has {capability[0]}.{capability[1]}"
        if on_gpu and capability in SMALL:
            return f"needs more shared memory than GPUs of capability {capability[0]}.{capability[1]} have"
        return None

    def forward(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        theta: Array | None,
        key_mask: Array | None,
        lengths: Array | None,
        cu_seqlens: Array | None,
        state: State | None,
    ) -> tuple[Array, State | None]:
        launch = _module("launch")
        inputs = Inputs(q, k, v, log_decay, theta, key_mask, lengths, cu_seqlens, state)
        with launch.on(problem):
            return launch.forward(problem, inputs)  # type: ignore[no-any-return]

    def forward_keeping(self, problem: Problem, saved: Saved) -> tuple[Array, State | None, Array]:
        launch = _module("launch")
        with launch.on(problem):
            return launch.forward_keeping(problem, saved)  # type: ignore[no-any-return]

    def forward_in_pool(self, problem: Problem, saved: Saved, slots: Array) -> Array:
        from linattn.backends.triton import launch

        with launch.on(problem):
            o = launch.forward_in_pool(problem, saved, slots)
        assert saved.state is not None
        written(saved.state.kv, saved.state.z, saved.state.length)
        return o

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        with _module("launch").on(problem):
            return _module("backward").backward(problem, saved, do, dstate)  # type: ignore[no-any-return]

    def decode_step(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        theta: Array | None,
        state: State,
        slots: Array | None,
    ) -> Array:
        with _module("launch").on(problem):
            o = _module("decode").decode_step(problem, q, k, v, log_decay, theta, state, slots)
        written(state.kv, state.z, state.length)
        return o


@functools.cache
def _module(name: str) -> Any:
    """A module with kernels, which needs torch and Triton; an import statement costs more on every call."""
    return importlib.import_module(f"linattn.backends.triton.{name}")


@functools.cache
def _capability(device: str) -> tuple[int, int]:
    """A device's compute capability; where there is none, `unavailable` says so."""
    cuda = _torch().cuda
    found: tuple[int, int] = cuda.get_device_capability(device) if cuda.is_available() else OLDEST
    return found


def _torch() -> Any:
    return sys.modules.get("torch") or importlib.import_module("torch")


backend = TritonBackend()
