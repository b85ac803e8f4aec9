"""What TransNormerLLM's paper says of Lightning Attention and of its norm, measured.

Source: arXiv:2307.14995: Lightning Attention takes half the time of plain operations, and a quarter of their
memory at 8192 tokens; the norm and the gate make the model 20 % faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import linattn
from linattn.bench.gpu_measure import STEPS, Cuda, captured
from linattn.bench.systems import OURS, Judge, Row, Task, Verdict, faster, memory, peak_of, timed
from linattn.nn import SimpleRMSNorm

LIGHTNING, QUADRATIC = "linattn.lightning_attention", "(Q Kᵀ ∘ decay) V in torch"
FORWARD, BOTH = "attention", "attention, forward + backward"
GRAPH = f"{BOTH}, in a CUDA graph"  # at the shortest length, where Python takes longer than the GPU
LENGTHS = 2048, 8192, 16384
HEADS, WIDTH = 8, 128
PLAIN = f"{OURS}, norms and gates not fused"
SPEED = "claim: 2 x"  # and a quarter of the memory
NORM = "claim: 1.2 x"
ROWS = 32768  # tokens that a norm is given


def dtype_of(device: torch.device) -> torch.dtype:
    """The dtype that is measured on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def tasks(device: torch.device, divide: int = 1, *, width: int) -> Iterator[Task]:
    """Rows of attention alone, and of the norm and the gate alone, rows of `width`."""
    whats: dict[int, tuple[str, ...]] = dict.fromkeys(LENGTHS, (FORWARD, BOTH))
    if device.type == "cuda":
        whats[LENGTHS[0]] += (GRAPH,)
    for n in LENGTHS:
        for what in whats[n]:
            for who in (LIGHTNING, QUADRATIC):
                run = functools.partial(
                    attention, device, n // divide, who, backward=what != FORWARD, graph=what == GRAPH
                )
                yield Task(Row(what, who, 1, n // divide, claim=SPEED), run)
    for what in ("norm", "norm and gate"):
        for fused in (True, False):
            run = functools.partial(norm, device, ROWS // divide, width, gated=what != "norm", fused=fused)
            who = f"SimpleRMSNorm, {'fused' if fused else 'plain'}"
            note = "no kernel here: torch's operations" if fused and device.type == "cpu" else ""
            row = Row(f"{what}, forward + backward", who, 1, ROWS // divide, note=note, claim=NORM)
            yield Task(row, run)


def attention(
    device: torch.device, n: int, who: str, *, backward: bool, graph: bool = False
) -> dict[str, Any]:
    """One sequence, decay per head; what the plain sum multiplies by is made beforehand, and not counted."""
    log_decay = torch.tensor(linattn.decay.alibi(HEADS), dtype=torch.float32, device=device)
    plain = who == QUADRATIC
    shape = (1, HEADS, n, WIDTH) if plain else (1, n, HEADS, WIDTH)  # each as it likes it best
    q, k, v = (
        torch.randn(shape, device=device, dtype=dtype_of(device)).requires_grad_(backward) for _ in range(3)
    )
    if plain:
        weights = decays(log_decay, n, q.dtype)
        run = functools.partial(quadratic, q, k, v, weights)
    else:
        run = functools.partial(linattn.lightning_attention, q, k, v, log_decay)
    return cost(run, (q, k, v), device, backward=backward, graph=graph)


def decays(log_decay: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    """λ^(i − j) where j is not after i, else 0: [h n n]."""
    position = torch.arange(n, device=log_decay.device)
    lag = position[:, None] - position
    return torch.stack([torch.exp(x * lag.clamp(min=0)).tril_().to(dtype) for x in log_decay])


def quadratic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum as it is written, q, k, v [b h n d], weights [h n n]."""
    return (q @ k.mT * weights) @ v


def norm(device: torch.device, rows: int, width: int, *, gated: bool, fused: bool) -> dict[str, Any]:
    """SimpleRMSNorm, or that times a gate, of a layer's rows; forward and backward."""
    layer = SimpleRMSNorm(fused=fused)
    x, u = (torch.randn(1, rows, width, device=device, dtype=dtype_of(device)) for _ in range(2))
    given = tuple(one.requires_grad_() for one in ((x, u) if gated else (x,)))
    run = functools.partial(layer.gated if gated else layer, *given)
    return cost(run, given, device, backward=True)


def cost(
    run: Callable[[], torch.Tensor],
    given: tuple[torch.Tensor, ...],
    device: torch.device,
    *,
    backward: bool,
    graph: bool = False,
) -> dict[str, Any]:
    """Time, on CUDA the device's with a cold cache; memory: what is given, and the most held beside.

    graph: the time is that of one of `STEPS` calls in a CUDA graph, the first with a cold cache.
    """
    do = torch.randn_like(run()) if backward else None

    def work() -> tuple[Any, ...]:
        o = run()
        return (o.detach(), *torch.autograd.grad(o, given, do)) if backward else (o,)

    if device.type == "cpu":
        return {"seconds": timed(work, device), "peak": peak_of(device)}
    clock = Cuda()
    held = [*given] if do is None else [*given, do]
    own = sum(x.numel() * x.element_size() for x in held)
    peak = own + clock.peak_bytes(work)
    if graph:
        calls, _ = captured(work, STEPS)
        return {"peak": peak, "seconds": clock.milliseconds(lambda: (calls.replay(),)) / STEPS / 1e3}
    return {"peak": peak, "seconds": clock.milliseconds(work) / 1e3}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Whether the claims hold, where their rows are there."""
    judge = Judge(rows)
    for n in LENGTHS:
        for what in (FORWARD, BOTH, GRAPH):
            ours, peer = (judge.at.get((what, who, 1, n)) for who in (LIGHTNING, QUADRATIC))
            claim = f"{what.replace('attention', 'Lightning Attention')}, N = {n}"
            judge(f"{claim}: 2 times as fast as plain", [ours], faster, " times", peers=(peer,), least=2)
            if n >= 8192:
                required = f"{claim}: 1/4 of the memory"
                judge(required, [ours], memory, " of it", peers=(peer,), most=0.25)
    fused, plain = (judge.at.get(("training", who, 4, 8192)) for who in (OURS, PLAIN))
    judge("norm and gate fused: 20 % more tokens per second", [fused, plain], faster, " times", least=1.2)
    return judge.found
