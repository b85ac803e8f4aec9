"""Small calls of every kind, for `make sanitize-gpu`: `--compile` compiles what they need, on every core."""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import linattn
from linattn import LRPE, Cosine, State
from linattn.backends.cupy import hopper
from linattn.models import decoding
from linattn.models.transnormer_lm import TransNormerConfig, TransNormerLM
from linattn.nn import SimpleRMSNorm, linear_cross_entropy

HEADS, BATCH = 2, 2
# N D E: a short block, an odd one at full width, one that is cut into segments
SIZES = ((70, 64, 64), (33, 128, 128), (2100, 64, 64))
LONG = 1100, 128, 128  # cut into pieces by the kernel for Hopper
KINDS = 7


def drawn(*shape: int, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def kinds(n: int, d: int) -> list[dict[str, Any]]:
    """Options of calls with gradients."""
    per_head = (-torch.rand(HEADS, device="cuda")).requires_grad_()
    cosformer = {"reweight": Cosine(4096), "feature_map": "relu", "normalize": True}
    return [
        {"log_decay": per_head},
        {"log_decay": (-torch.rand(BATCH, n, HEADS, device="cuda")).requires_grad_()},
        {
            "log_decay": per_head, "reweight": LRPE(torch.rand(HEADS, d, device="cuda", requires_grad=True)),
            "feature_map": "silu",
        },
        cosformer,
        cosformer | {"causal": False},
        {"log_decay": per_head, "causal": False, "normalize": True, "feature_map": "relu"},
        {"log_decay": per_head.detach()},
    ]  # fmt: skip


def differentiated(kind: int, n: int, d: int, e: int, dtype: torch.dtype, backend: str) -> int:
    q, k = (drawn(BATCH, n, HEADS, d, dtype=dtype, grad=True) for _ in range(2))
    v = drawn(BATCH, n, HEADS, e, dtype=dtype, grad=True)
    options = kinds(n, d)
    assert len(options) == KINDS
    o = linattn.attention(q, k, v, backend=backend, **options[kind])
    o.backward(torch.randn_like(o))
    return 1


def served(dtype: torch.dtype, backend: str) -> int:
    """Packed sequences, states, a pool, a decode step, with a normaliser and without."""
    borders, slots = torch.tensor([0, 7, 7, 300], device="cuda"), torch.tensor([1, -1, 3], device="cuda")
    decay = {"log_decay": -torch.rand(HEADS, device="cuda")}
    for options in (decay, {"feature_map": "relu", "normalize": True}):
        q, k, v = (drawn(1, 300, HEADS, 64, dtype=dtype) for _ in range(3))
        name, normalize = options.get("feature_map"), "normalize" in options
        pool = State.zeros(q, 4, HEADS, 64, 64, feature_map=name, normalize=normalize)
        given: dict[str, Any] = {**options, "backend": backend}
        linattn.attention(q, k, v, cu_seqlens=borders, initial_state=pool, slots=slots, **given)
        linattn.attention(q, k, v, cu_seqlens=borders, return_state=True, **given)
        token = (drawn(3, HEADS, 64, dtype=dtype) for _ in range(3))
        linattn.decode_step(*token, pool, slots=slots, **given)
    return 6


def small(dtype: torch.dtype, width: int) -> TransNormerLM:
    config = TransNormerConfig(
        vocab_size=67, embed_dim=width, hidden_dim=width, num_heads=HEADS, num_layers=2, glu_dim=3 * width,
        linear_use_lrpe_list=(1, 0),
    )  # fmt: skip
    return TransNormerLM(config).to("cuda", dtype)


def modelled(dtype: torch.dtype, width: int) -> int:
    """A model's training step, its loss by chunks, and a token for few texts and for many."""
    model = small(dtype, width)
    ids = torch.randint(0, 67, (BATCH, 70), device="cuda")
    model(ids).float().logsumexp(-1).sum().backward()
    rows, weight = drawn(70, width, dtype=dtype, grad=True), drawn(67, width, dtype=dtype, grad=True)
    linear_cross_entropy(rows, weight, ids[0], chunk=33).backward()
    norm = SimpleRMSNorm()
    norm.gated(drawn(70, width, dtype=dtype, grad=True), rows).sum().backward()
    with torch.no_grad():
        for texts in (1, 3, 40):
            states = model.initial_states(texts)
            for _ in range(2):
                model.step(ids.flatten()[:texts], states)
    return 9


def stepped(dtype: torch.dtype, width: int) -> int:
    """Steps whose sums are cut into parts, and nothing of cuBLAS, in whose kernels racecheck sees hazards."""
    model = small(dtype, width)
    with torch.no_grad():
        for texts in (1, 3, 7, 20, 40):
            states, x = model.initial_states(texts), drawn(texts, width, dtype=dtype)
            for _ in range(2):
                decoding.last([*model.layers], states, x, graphs=False)
    return 10


def resident(layers: int) -> int:
    """Steps in one kernel for all layers, where there is one."""
    config = TransNormerConfig(
        vocab_size=67, embed_dim=1024, hidden_dim=1024, num_heads=8, num_layers=layers, glu_dim=2816,
        linear_use_lrpe_list=(1, *[0] * (layers - 1)),
    )  # fmt: skip
    model = TransNormerLM(config).to("cuda", torch.bfloat16)
    with torch.no_grad():
        states, x = model.initial_states(1), drawn(1, 1024, dtype=torch.bfloat16)
        for _ in range(2):
            decoding.last([*model.layers], states, x, graphs=False, one_kernel=True)
    return 2


def calls(backend: str, libraries: bool = True) -> list[Callable[[], int]]:
    """libraries: models too, whose linear maps are cuBLAS's."""
    found: list[Callable[[], int]] = []
    if backend == "triton":
        for dtype, size in itertools.product((torch.bfloat16, torch.float32), SIZES):
            if dtype == torch.bfloat16 or size[1] == 64:
                found += [partial(differentiated, kind, *size, dtype, backend) for kind in range(KINDS)]
        for dtype, width in itertools.product((torch.bfloat16, torch.float32), (128, 136) * libraries):
            found.append(partial(modelled, dtype, width))
        found.append(partial(stepped, torch.bfloat16, 512))
    else:
        kinds_of = {torch.bfloat16: range(KINDS), torch.float32: range(KINDS), torch.float64: (0, 2, 3)}
        for dtype, chosen in (kinds_of | {torch.float16: (1, 5)}).items():
            found += [partial(differentiated, kind, *SIZES[0], dtype, backend) for kind in chosen]
        for size, chosen in ((SIZES[1], range(KINDS)), (LONG, (3, 6))):
            found += [partial(differentiated, kind, *size, torch.bfloat16, backend) for kind in chosen]
        found.append(partial(resident, 2))
    return found + [partial(served, dtype, backend) for dtype in (torch.bfloat16, torch.float32)]


def made(backend: str, part: int, of: int, libraries: bool = True) -> int:
    """Every `of`-th call, from the one numbered `part` on."""
    torch.manual_seed(part)
    done = sum(call() for call in calls(backend, libraries)[part::of])
    torch.cuda.synchronize()
    return done


def into_zeros(launch: Callable[..., None]) -> Callable[..., None]:
    """What bulk copies write counts as never written: results are filled before."""

    def filled(*arguments: Any, out: Any, **keywords: Any) -> None:
        if isinstance(out, torch.Tensor):  # not the description of one
            out.zero_()
        launch(*arguments, out=out, **keywords)

    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="in one process for each core")
    parser.add_argument("--backend", choices=("triton", "cupy"), default="triton")
    parser.add_argument("--part", type=int, default=0, help="which part of the calls")
    parser.add_argument("--of", type=int, default=1, help="how many parts there are")
    parser.add_argument(
        "--zeros", action="store_true", help="begin results as 0: initcheck sees no bulk copies"
    )
    options = parser.parse_args()
    if options.zeros:
        hopper.launch = into_zeros(hopper.launch)
    if options.compile:
        workers = min(os.cpu_count() or 1, len(calls(options.backend)))
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            of = itertools.repeat(options.backend), range(workers), itertools.repeat(workers)
            done = sum(pool.map(made, *of))
    else:
        # cuBLAS writes by bulk copies, too
        done = made(options.backend, options.part, options.of, libraries=not options.zeros)
    print(f"{done} calls")


if __name__ == "__main__":
    main()
