"""torch tensors on any device, by the blockwise algorithm."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from linattn.arrays import Array, namespace
from linattn.backends import Gradients, Saved, blockwise
from linattn.problem import Problem
from linattn.state import State


@contextlib.contextmanager
def _float32_is_float32(problem: Problem) -> Iterator[None]:
    """Keep a process-wide setting from rounding float32 operands, unless the call asks for tf32."""
    matmul: Any = namespace("torch").backends
    settings = [matmul.cuda.matmul, matmul.mkldnn.matmul]
    wanted = "tf32" if problem.precision == "tf32" else "ieee"
    before = [setting.fp32_precision for setting in settings]
    if problem.dtype == "float64" or before == [wanted, "ieee"]:
        yield
        return
    try:
        settings[0].fp32_precision = wanted
        settings[1].fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


class TorchBackend:
    """The blockwise algorithm over torch: the fallback on every device, with every option."""

    name = "torch"
    arrays = {"torch": True}  # noqa: RUF012 (a constant)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed: pip install torch"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        if problem.batch_invariant and problem.packed and problem.device != "cpu":
            return "batch_invariant with cu_seqlens needs the lengths on the host; pad, and give lengths"
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
        torch = namespace("torch")
        with torch.no_grad(), _float32_is_float32(problem):
            inputs = Saved(q, k, v, log_decay, theta, key_mask, lengths, cu_seqlens, state)
            return blockwise.forward(problem, inputs)

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        torch = namespace("torch")
        with torch.no_grad(), _float32_is_float32(problem):
            return blockwise.backward(problem, saved, saved.o, do, dstate)

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
        torch = namespace("torch")
        with torch.no_grad(), _float32_is_float32(problem):
            return blockwise.decode_step(problem, q, k, v, log_decay, theta, state, slots)


backend = TorchBackend()
