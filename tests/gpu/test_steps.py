"""Decoding steps in few kernels: those of the plain modules, in graphs, on any stream, without races."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from linattn import tolerance
from linattn.backends.triton import rows
from linattn.models import TransNormerConfig, TransNormerLM, decoding
from linattn.nn import SimpleRMSNorm
from tests.gpu.calls import captured, drawn, same

pytestmark = pytest.mark.gpu

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def exact(x: Any, weights: Any, eps: Any, gate: Any, residual: Any) -> tuple[Any, Any]:
    """The result in float64, and the sum of its terms' absolute values."""
    wide = x.double()
    r = 1.0 if eps is None else torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    z = wide * r * (1.0 if gate is None else gate.double())
    made = [z @ w.double().T for w in weights]
    sizes = [abs(z) @ abs(w.double()).T for w in weights]
    y, size = made[0], sizes[0]
    if len(weights) > 1:
        y, size = y * made[1], sizes[0] * abs(made[1]) + sizes[1] * abs(made[0])
    if residual is not None:
        y, size = y + residual.double(), size + abs(residual.double())
    return y, size


def check(dtype: Any, b: int, n: int, k: int, **options: Any) -> None:
    """One product of every kind within its bound: sums of k terms in float32, roundings to the dtype."""
    wide, other = drawn(b, 4 * k, dtype=dtype, count=2)
    x, gate = wide[:, :k], other[:, 3 * k :]
    weights = [(w.float() / k**0.5).to(dtype) for w in drawn(n, k, dtype=dtype, count=2, seed=1)]
    (residual,) = drawn(b, n, dtype=dtype, count=1, seed=2)
    for eps, g, two, r in (
        (None, None, False, None),
        (EPS, None, False, None),
        (EPS, gate, False, residual),
        (EPS, None, True, None),
        (None, None, False, residual),
    ):
        given = tuple(weights[: 1 + two])
        got = rows.products(x, given, eps=eps, gate=g, residual=r)
        want, size = exact(x, given, eps, g, r)
        unit = tolerance.UNIT[str(dtype).removeprefix("torch.")]
        # a sum of k terms adds at most log2(k) + k / 128 times in a row; the norm and products round as often
        room = (k / 128 + 32) * tolerance.UNIT["float32"] * size + unit * abs(want)
        if g is not None and rows.shape(b, n, k, two).block:  # the gated row is rounded before the product
            room += unit * size
        over = (abs(got.double() - want) - room - tolerance.SUBNORMAL["float16"]).max()
        assert got.dtype == dtype and float(over) <= 0, (eps, g is not None, two, r is not None, float(over))


@pytest.mark.parametrize("b", [1, 2, 4, 5, 33, 128])
def test_products(b: int, dtype: Any) -> None:
    for n, k in ((1, 16), (100, 272), (1024, 2816), (4096, 1024)):
        check(dtype, b, n, k)


@pytest.mark.parametrize("k", [2560, 4096, 8192, 11008])
def test_wide_rows(k: int) -> None:
    for b in (1, 4):
        check(torch.bfloat16, b, 130, k)


def test_a_row_knows_no_other(dtype: Any) -> None:
    for b in (4, 20):
        x, gate = drawn(b, 64, dtype=dtype, count=2)
        (w,) = drawn(50, 64, dtype=dtype, count=1)
        want = rows.products(x, (w,), eps=EPS, gate=gate)
        wrong = x.clone()
        wrong[1, 3] = float("nan")
        got = rows.products(wrong, (w,), eps=EPS, gate=gate)
        others = torch.arange(b, device="cuda") != 1
        same([got[others]], [want[others]])
        assert got[1].isnan().all()


def built(dtype: Any, layers: int = 3, width: int = 128, heads: int = 2) -> Any:
    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=256, embed_dim=width, hidden_dim=width, num_heads=heads, num_layers=layers,
        glu_dim=3 * width, linear_use_lrpe_list=tuple(int(i % 2 == 0) for i in range(layers)),
    )  # fmt: skip
    model = TransNormerLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=width**-0.5)
    return model.to("cuda", dtype).eval()


def fuse(model: Any, on: bool) -> None:
    for part in model.modules():
        if isinstance(part, SimpleRMSNorm):
            part.fused = on


def walked(model: Any, ids: Any) -> tuple[Any, Any]:
    states = model.initial_states(len(ids))
    return torch.stack([model.step(column, states) for column in ids.T], 1), states


@pytest.mark.parametrize("b", [1, 4, 5, 64])
def test_steps_are_the_modules(b: int, dtype: Any) -> None:
    model = built(dtype)
    ids = torch.randint(0, 256, (b, 24), device="cuda")
    assert decoding.runs(model.layers[0], model.embed(ids[:, 0]))
    got, states = walked(model, ids)
    whole = model(ids)
    fuse(model, False)
    assert not decoding.runs(model.layers[0], model.embed(ids[:, 0]))
    plain, others = walked(model, ids)
    exactly, _ = walked(model.double(), ids)
    # each is off by roundings to the dtype, the fused one by fewer
    off = [float((y.double() - exactly).norm()) for y in (got, plain, whole)]
    assert off[0] <= max(off[1:]), off
    for mine, other in zip(states, others, strict=True):
        assert torch.equal(mine.length, other.length)


@pytest.mark.parametrize("layers, width, heads", [(1, 16, 1), (1, 64, 1), (4, 256, 2)])
def test_no_race(layers: int, width: int, heads: int) -> None:
    model = built(torch.bfloat16, layers, width, heads)
    ids = torch.randint(0, 256, (1, 600), device="cuda")
    want, _ = walked(model, ids)
    with mock.patch.object(decoding, "PROGRAMMATIC", (99, 0)):  # each kernel after the end of the one before
        unchained, _ = walked(model, ids)
    same([want], [unchained])
    # in a graph, replayed without a pause
    states = model.initial_states(1)
    token, out = ids[:, 0].clone(), torch.empty_like(want)
    graph, logits = captured(lambda: model.step(token, states))
    for state in states:
        state.kv.zero_()
        state.length.zero_()
    for i in range(ids.shape[1]):
        token.copy_(ids[:, i])
        graph.replay()
        out[:, i] = logits
    same([out], [want])


def test_on_another_stream_and_without_waiting() -> None:
    model, ids = built(torch.bfloat16), torch.randint(0, 256, (2, 50), device="cuda")
    want, _ = walked(model, ids)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            got, _ = walked(model, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    same([got], [want])


def test_states_that_were_just_written() -> None:
    model, ids = built(torch.bfloat16), torch.randint(0, 256, (2, 30), device="cuda")
    states = model.initial_states(2)
    for column in ids.T:
        model.step(column, states)
    order = torch.tensor([1, 0], device="cuda")
    want = model.step(ids[:, 0], [state.select(order) for state in states])
    for _ in range(20):
        moved = [state.select(order) for state in states]
        same([model.step(ids[:, 0], moved)], [want])
