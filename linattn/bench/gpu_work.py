"""The calls that are timed on a GPU, their inputs, and the exact results of a part of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import linattn
from linattn.bench.gpu_cases import GpuCase
from linattn.registry import BackendLike

if TYPE_CHECKING:
    from torch import Tensor

Outputs = tuple[Any, ...]
"""(o,), (o, dq, dk, dv), or for a decode step (o, the state's kv)."""
Work = Callable[[], Outputs]


@dataclass(frozen=True)
class Inputs:
    """Random tensors of one case: q, k, v [b n h d] ([b h d] for a decode step), and what the kind needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor | None = None
    decay: Tensor | None = None  # [h], float32
    theta: Tensor | None = None  # [h d], float32
    state: linattn.State | None = None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make(case: GpuCase, *, device: str = "cuda", seed: int = 0) -> Inputs:
    """Draw standard normal inputs; they require grad where the case has a backward pass."""
    import torch

    random = torch.Generator(device).manual_seed(seed)
    shape = (case.b, case.h, case.d) if case.kind == "decode" else (case.b, case.n, case.h, case.d)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, dtype=getattr(torch, case.dtype), device=device)

    def table(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    q, k, v = (normal(*shape).requires_grad_(case.backward) for _ in range(3))
    do = normal(*shape) if case.backward else None
    decay = None if case.kind.startswith("cosformer") else table(linattn.decay.alibi(case.h))
    theta = table(linattn.LRPE.default_theta(case.h, case.d)) if case.kind == "lrpe" else None
    state = None
    if case.kind == "decode":
        state = linattn.State.zeros(q, case.b, case.h, case.d, case.d)
        state.kv.normal_(generator=random)
    return Inputs(q, k, v, do, decay, theta, state)


def work(case: GpuCase, given: Inputs, backend: BackendLike = "triton") -> Work:
    """The library's call; it keeps nothing from one time to the next but a decode step's state."""
    if case.kind == "decode":
        state = given.state
        assert state is not None
        return lambda: (
            linattn.decode_step(
                given.q, given.k, given.v, state, log_decay=given.decay, backend=backend
            ),
            state.kv,
        )  # fmt: skip
    if not case.backward:
        return lambda: (_forward(case, given, backend),)
    return recorded(lambda: _forward(case, given, backend), given)


def recorded(forward: Callable[[], Any], given: Inputs) -> Work:
    """A forward pass and its gradients in one."""
    import torch

    def both() -> Outputs:
        o = forward()
        return o.detach(), *torch.autograd.grad(o, given.leaves, given.do)

    return both


def _forward(case: GpuCase, given: Inputs, backend: BackendLike) -> Any:
    q, k, v = given.leaves
    if case.kind.startswith("cosformer"):
        causal = case.kind != "cosformer-not-causal"
        return linattn.cosformer_attention(q, k, v, causal=causal, backend=backend)
    reweight = None if given.theta is None else linattn.LRPE(given.theta)
    return linattn.attention(q, k, v, log_decay=given.decay, reweight=reweight, backend=backend)


def part(case: GpuCase, outputs: Outputs) -> Outputs:
    """The last sequence's first and last head of every output."""
    heads = [0, case.h - 1]
    if case.kind == "decode":
        return tuple(x[-1:, heads] for x in outputs)
    return tuple(x[-1:, :, heads] for x in outputs)


def exact(case: GpuCase, given: Inputs, *, device: str | None = None) -> Outputs:
    """`part` of the results in float64, by the torch backend; a decode step's before it is made.

    device: where it is computed; None: where the inputs are.
    """
    import torch

    def wide(x: Tensor | None) -> Any:
        return None if x is None else x.detach().to(device or x.device, torch.float64)

    heads = [0, case.h - 1]
    state = given.state
    if state is not None:
        kv = wide(state.kv[-1:, heads])
        state = linattn.State(kv, None, state.length[-1:].to(kv.device), d=case.d)
    q, k, v = (wide(x).requires_grad_(case.backward) for x in part(case, given.leaves))
    do = None if given.do is None else wide(*part(case, (given.do,)))
    decay = None if given.decay is None else wide(given.decay[heads])
    theta = None if given.theta is None else wide(given.theta[heads])
    return work(case, Inputs(q, k, v, do, decay, theta, state), "torch")()


def relative_error(found: Outputs, expected: Outputs) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ over the outputs; NaN where anything is NaN."""
    import torch

    pairs = zip(found, expected, strict=True)
    errors = [(x.to(y) - y).norm() / y.norm() for x, y in pairs]
    return float(torch.stack(errors).max())


def cosine_tables(case: GpuCase, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of cosFormer's angle at every position, [n 1 1] float32."""
    import torch

    angle = math.pi / 2 / case.n * torch.arange(case.n, dtype=torch.float64, device=like.device)
    return angle.cos().float()[:, None, None], angle.sin().float()[:, None, None]


def lrpe_tables(case: GpuCase, theta: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every feature's angle at every position, [n h d] float32."""
    import torch

    position = torch.arange(case.n, dtype=torch.float64, device=theta.device)
    angle = position[:, None, None] * theta.double()
    return angle.cos().float(), angle.sin().float()
