"""CuPy arrays, and torch tensors on CUDA when it is named, by CUDA kernels that are compiled at first use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from linattn.arrays import Array, written
from linattn.backends import Gradients, Inputs, Saved
from linattn.problem import Problem
from linattn.state import State

if TYPE_CHECKING:
    from linattn.backends.cupy.launch import Runner

OLDEST = 70


class CupyBackend:
    """Forward, backward and decode in CUDA C++.

    runner: what starts kernels, and on what they find their arrays; a GPU, unless tests say otherwise.
    """

    name = "cupy"

    def __init__(self, *, runner: Runner | None = None, arrays: Mapping[str, bool] | None = None) -> None:
        self.given = runner
        self.arrays = {"cupy": True, "torch": False} if arrays is None else arrays

    @functools.cached_property
    def runner(self) -> Runner:
        return _module("gpu").Gpu() if self.given is None else self.given

    def unavailable(self) -> str | None:
        if self.given is not None:
            return None
        return _module("gpu").unavailable()  # type: ignore[no-any-return]

    def unsupported(self, problem: Problem) -> str | None:
        if self.given is None:
            if not problem.device.startswith("cuda"):
                return f"takes arrays on CUDA devices, got {problem.device}"
            capability, room = _module("gpu").facts(problem.device)
            if capability < OLDEST:
                return f"needs compute capability 7.0, {problem.device} has {capability / 10:.1f}"
        else:
            room = self.given.room(None)
        return _module("launch").too_large(problem, room)  # type: ignore[no-any-return]

    def describe(self, problem: Problem) -> str:
        """Which of its kernels compute a call that it takes."""
        capability = self.given.capability(None) if self.given else _module("gpu").facts(problem.device)[0]
        return _module("hopper").describe(problem, capability)  # type: ignore[no-any-return]

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
        x = Inputs(q, k, v, log_decay, theta, key_mask, lengths, cu_seqlens, state)
        with self.runner.on(problem.device):
            o, final, _ = _module("forward").run(problem, self.runner, x, keep=False)
        return o, final

    def forward_keeping(self, problem: Problem, saved: Saved) -> tuple[Array, State | None, Array]:
        with self.runner.on(problem.device):
            return _module("forward").run(problem, self.runner, saved, keep=True)  # type: ignore[no-any-return]

    def forward_in_pool(self, problem: Problem, saved: Saved, slots: Array) -> Array:
        assert saved.state is not None
        with self.runner.on(problem.device):
            o = _module("forward").in_pool(problem, self.runner, saved, slots)
        written(saved.state.kv, saved.state.z, saved.state.length)
        return o

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        with self.runner.on(problem.device):
            return _module("backward").backward(problem, self.runner, saved, do, dstate)  # type: ignore[no-any-return]

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
        with self.runner.on(problem.device):
            o = _module("decode").decode_step(problem, self.runner, q, k, v, log_decay, theta, state, slots)
        written(state.kv, state.z, state.length)
        return o


@functools.cache
def _module(name: str) -> Any:
    """A module of this backend; `import linattn` needs none of them."""
    return importlib.import_module(f"linattn.backends.cupy.{name}")


backend = CupyBackend()
