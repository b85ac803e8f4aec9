"""What stands beside linattn on a GPU: flash-linear-attention, torch's softmax attention, torch's einsum."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from linattn.bench.gpu_cases import GpuCase
from linattn.bench.gpu_measure import Meter
from linattn.bench.gpu_work import Inputs, Work, cosine_tables, lrpe_tables, make, recorded
from linattn.errors import LinattnError

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 100.0  # milliseconds that one call of softmax attention may take
TRIED = 4096  # tokens from which its time at other lengths is foretold


@dataclass(frozen=True)
class Peer:
    """A computation beside ours.

    same: it is the same function of the inputs, not another attention of the same cost class.
    prepare: gives the call, or raises what `gpu_measure.failures` lists. tuned: its kernels tune themselves.
    """

    name: str
    kinds: tuple[str, ...]
    prepare: Callable[[GpuCase, Inputs], Work]
    same: bool = True
    tuned: bool = True


def peers(case: GpuCase) -> list[Peer]:
    """Who is measured beside a case; of another backend than Triton's nobody again."""
    if case.backend != "triton":
        return []
    found = [peer for peer in ALL if case.kind in peer.kinds]
    # the fused kernel is the faster one at D = 64 only, and every shape that it is tuned for takes seconds
    return [peer for peer in found if peer is not FUSED or case.d <= 64]


def check_length(case: GpuCase, peer: Peer, meter: Meter, device: str) -> None:
    """Refuse a quadratic peer where one call would take too long.

    Raises LinattnError.
    """
    if peer.same or case.n <= TRIED:
        return
    small = replace(case, n=TRIED)
    ms, _ = meter.once(peer.prepare(small, make(small, device=device)))
    expected = ms * (case.n / TRIED) ** 2
    if expected > LONGEST:
        raise LinattnError(f"about {expected:.0f} ms a call, not waited for")


def _differentiable(case: GpuCase, given: Inputs, forward: Callable[[], Any]) -> Work:
    return recorded(forward, given) if case.backward else lambda: (forward(),)


def _fla(module: str, function: str) -> Any:
    return getattr(importlib.import_module(f"fla.ops.{module}"), function)


def _decayed(function: str) -> Callable[[GpuCase, Inputs], Work]:
    """Lightning attention by one of fla's functions."""

    def prepare(case: GpuCase, given: Inputs) -> Work:
        call = _fla("simple_gla", function)
        q, k, v = given.leaves
        return _differentiable(
            case, given, lambda: call(q, k, v, g_gamma=given.decay, scale=1.0)[0]
        )  # fmt: skip

    return prepare


def _step(case: GpuCase, given: Inputs) -> Work:
    """A decode step by fla's recurrence, which returns a new state."""
    call = _fla("simple_gla", "fused_recurrent_simple_gla")
    state = given.state
    assert state is not None
    q, k, v = (x[:, None] for x in given.leaves)

    def step() -> tuple[Any, ...]:
        o, kv = call(q, k, v, g_gamma=given.decay, scale=1.0, initial_state=state.kv, output_final_state=True)
        return o[:, 0], kv

    return step


def expand(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Features [x cos, x sin], whose plain products are reweighted ones; twice as wide as q and k."""
    import torch

    def features(x: Tensor) -> Tensor:
        return torch.cat((x * cos, x * sin), -1).to(x.dtype)

    return features(q), features(k)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def _expand_relu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return expand(q.relu(), k.relu(), cos, sin)


def _cosformer(case: GpuCase, given: Inputs) -> Work:
    """Features made by one compiled kernel, then fla's normalised product."""
    call = _fla("linear_attn", "chunk_linear_attn")
    features = _compiled(_expand_relu)
    q, k, v = given.leaves
    tables = cosine_tables(case, q)

    def forward() -> Any:
        fq, fk = features(q, k, *tables)
        return call(fq, fk, v, scale=1.0, normalize=True)[0]

    return _differentiable(case, given, forward)


def _lrpe(case: GpuCase, given: Inputs) -> Work:
    """Features made by one compiled kernel, then fla's decayed product of twice the width."""
    call = _fla("simple_gla", "chunk_simple_gla")
    features = _compiled(expand)
    q, k, v = given.leaves
    assert given.theta is not None
    tables = lrpe_tables(case, given.theta)

    def forward() -> Any:
        fq, fk = features(q, k, *tables)
        return call(fq, fk, v, g_gamma=given.decay, scale=1.0)[0]

    return _differentiable(case, given, forward)


def everyone(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:  # fmt: skip
    """cosFormer without a causal mask: one sum over all keys, read by every query."""
    import torch

    fq, fk = _expand_relu(q, k, cos, sin)
    kv = torch.einsum("bnhf,bnhe->bhfe", fk, v)
    z = fk.sum(1, dtype=torch.float32).to(q.dtype)  # [b h f]
    divisor = torch.einsum("bnhf,bhf->bnh", fq, z).clamp_min(eps)
    return torch.einsum("bnhf,bhfe->bnhe", fq, kv) / divisor[..., None]


def _einsum(compiled: bool) -> Callable[[GpuCase, Inputs], Work]:
    def prepare(case: GpuCase, given: Inputs) -> Work:
        call = _compiled(everyone) if compiled else everyone
        q, k, v = given.leaves
        tables = cosine_tables(case, q)
        return lambda: (call(q, k, v, *tables),)

    return prepare


def _softmax(case: GpuCase, given: Inputs) -> Work:
    """torch's attention, the kernel that it chooses, on arrays contiguous in its layout [b h n d]."""
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    causal = case.kind != "cosformer-not-causal"
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_(case.backward) for x in given.leaves)
    do = None if given.do is None else given.do.transpose(1, 2).contiguous()
    own = replace(given, q=q, k=k, v=v, do=do)
    return _differentiable(case, own, lambda: attention(q, k, v, is_causal=causal))


FUSED = Peer("fla fused", ("forward", "forward-backward"), _decayed("fused_chunk_simple_gla"))
ALL = (
    Peer("fla chunk", ("forward", "forward-backward"), _decayed("chunk_simple_gla")),
    FUSED,
    Peer("compiled features, fla chunk", ("cosformer", "cosformer-backward"), _cosformer),
    Peer("compiled features, fla chunk", ("lrpe",), _lrpe),
    Peer("torch einsum", ("cosformer-not-causal",), _einsum(False), tuned=False),
    Peer("torch einsum, compiled", ("cosformer-not-causal",), _einsum(True), tuned=False),
    Peer("fla recurrent", ("decode",), _step),
    Peer(
        "softmax",
        (
            "forward",
            "forward-backward",
            "cosformer",
            "cosformer-backward",
            "cosformer-not-causal",
            "lrpe",
        ),
        _softmax,
        same=False,
        tuned=False,
    ),
)
