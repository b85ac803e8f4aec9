"""CuPy arrays, and torch tensors on CUDA when it is named, by CUDA kernels that are compiled at first use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from linattn.arrays import Array, written
from linattn.backends import Gradients, Saved
from linattn.problem import Problem
from linattn.state import State, tokens_seen

if TYPE_CHECKING:
    from linattn.backends.cupy.launch import Runner

OLDEST = 70
BFLOAT16 = 80  # the compute capability that has it


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
        saved = Saved(q, k, v, log_decay, theta, key_mask, lengths, cu_seqlens, state)
        return self.forward_keeping(problem, saved, keep=False)[:2]

    def forward_keeping(
        self, problem: Problem, saved: Saved, *, keep: bool = True
    ) -> tuple[Array, State | None, Array]:
        module = _module("forward")
        call = _module("launch").call_of(problem, self.runner, saved)
        o, final, kept = module.forward(call, saved.q, saved.k, saved.v, saved.state, keep=keep)
        if final is not None:
            before = None if saved.state is None else saved.state.length
            final.length = tokens_seen(saved.q, saved.lengths, saved.cu_seqlens, before)
        return o, final, kept

    def forward_in_pool(self, problem: Problem, saved: Saved, slots: Array) -> Array:
        assert saved.state is not None
        call = _module("launch").call_of(problem, self.runner, saved)
        o = _module("forward").in_pool(call, saved.q, saved.k, saved.v, saved.state, slots)
        written(saved.state.kv, saved.state.z, saved.state.length)
        return o

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        call = _module("launch").call_of(problem, self.runner, saved)
        return _module("backward").backward(call, saved, do, dstate)  # type: ignore[no-any-return]

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
        module = _module("decode")
        call = _module("launch").call_of(problem, self.runner, Saved(q, k, v, log_decay, theta))
        o = module.decode_step(call, q, k, v, state, module.slots_of(slots))
        written(state.kv, state.z, state.length)
        return o


@functools.cache
def _module(name: str) -> Any:
    """A module of this backend; `import linattn` needs none of them."""
    return importlib.import_module(f"linattn.backends.cupy.{name}")


backend = CupyBackend()
