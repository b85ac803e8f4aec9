"""torch tensors on any device, by the blockwise algorithm."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

from linattn.arrays import Array, namespace
from linattn.backends import Gradients, Saved, blockwise
from linattn.problem import Problem
from linattn.state import State


class _MatmulSetting:
    """A process-wide setting of torch's matrix products, held at what running calls need.

    Calls that need the same value share it; one that needs another waits; the last one puts the user's back.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.users = 0
        self.value = self.before = ""

    @contextlib.contextmanager
    def held(self, setting: Any, value: str) -> Iterator[None]:
        with self.changed:
            while self.users and self.value != value:
                self.changed.wait()
            if not self.users:
                self.before, self.value = setting.fp32_precision, value
                if self.before != value:
                    setting.fp32_precision = "none"
                    if setting.fp32_precision == self.before:  # the user's is that of torch.backends, or none
                        self.before = "none"
                    setting.fp32_precision = value
            self.users += 1
        try:
            yield
        finally:
            with self.changed:
                self.users -= 1
                if not self.users:
                    if self.before != value:
                        setting.fp32_precision = self.before
                    self.changed.notify_all()


_SETTINGS = {"cpu": _MatmulSetting(), "cuda": _MatmulSetting()}


@contextlib.contextmanager
def _arithmetic(problem: Problem) -> Iterator[None]:
    """No gradients, no autocast, and float32 products in float32 unless the call asks for tf32.

    Autocast has lowered q, k and v before they come here; sums and states stay in the accumulation dtype.
    """
    torch = namespace("torch")
    where = problem.device.partition(":")[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(where):
            stack.enter_context(torch.autocast(where, enabled=False))
        if problem.accumulate == "float32" and where in _SETTINGS:
            cuda = where == "cuda"
            setting = torch.backends.cuda.matmul if cuda else torch.backends.mkldnn.matmul
            value = "tf32" if cuda and problem.precision == "tf32" else "ieee"
            stack.enter_context(_SETTINGS[where].held(setting, value))
        yield


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
        with _arithmetic(problem):
            inputs = Saved(q, k, v, log_decay, theta, key_mask, lengths, cu_seqlens, state)
            return blockwise.forward(problem, inputs)

    def backward(self, problem: Problem, saved: Saved, do: Array, dstate: State | None) -> Gradients:
        with _arithmetic(problem):
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
        with _arithmetic(problem):
            return blockwise.decode_step(problem, q, k, v, log_decay, theta, state, slots)


backend = TorchBackend()
