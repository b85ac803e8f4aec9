"""What only a GPU shows: compilers, graphs, streams, other devices, and calls that come again."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch

import linattn
from linattn import LRPE, State, route, testing, tolerance
from tests.gpu.calls import HEADS, D, both, captured, drawn, needs_two, same, without_waiting
from tests.triton import pooled

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_under_torch_compile(options: dict[str, Any], compiler: str) -> None:
    def run(q: Any, k: Any, v: Any) -> Any:
        return linattn.attention(q, k, v, backend="triton", **options) * 1.0

    torch.compiler.reset()  # the compiler counts how often one function is compiled, whatever it closes over
    x = [part.requires_grad_() for part in drawn()]
    (do,) = drawn(count=1, seed=1)
    with mock.patch.object(route, "keeps", lambda backend: False):  # as compiled: denominators formed again
        want = run(*x)
    got = torch.compile(run, fullgraph=True, backend=compiler)(*x)
    same([got], [want])
    same(torch.autograd.grad(got, x, do), torch.autograd.grad(want, x, do))


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_in_a_cuda_graph(options: dict[str, Any], gradients: bool) -> None:
    x = drawn(count=4)

    def run() -> Any:
        if gradients:
            return both(*x, **options)
        return (linattn.attention(*x[:3], backend="triton", **options),)

    graph, result = captured(run)
    for seed in (1, 2):
        for mine, fresh in zip(x, drawn(count=4, seed=seed), strict=True):
            mine.copy_(fresh)
        graph.replay()
        replayed = [part.clone() for part in result]
        same(replayed, run())


def test_a_decode_step_in_a_cuda_graph() -> None:
    q, k, v = drawn(8, HEADS, D)
    g = -torch.rand(HEADS, device="cuda")
    reweight = LRPE(torch.rand(HEADS, D, device="cuda"))
    state = State.zeros(q, 8, HEADS, D, D, reweight=reweight)
    slots = torch.tensor([3, 0, -1, 1, 7, 6, 5, 4], device="cuda")

    def run() -> Any:
        return linattn.decode_step(
            q, k, v, state, slots=slots, log_decay=g, reweight=reweight, backend="triton"
        )

    graph, o = captured(run)
    for part in (state.kv, state.length):
        part.zero_()
    other = state.clone()
    for seed in range(5):
        for mine, fresh in zip((q, k, v), drawn(8, HEADS, D, seed=seed), strict=True):
            mine.copy_(fresh)
        graph.replay()
        want = linattn.decode_step(
            q, k, v, other, slots=slots, log_decay=g, reweight=reweight, backend="triton"
        )
        same((o, state.kv, state.length), (want, other.kv, other.length))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_nothing_waits_for_the_gpu(name: str, options: dict[str, Any]) -> None:
    x = drawn(count=4)
    pool = State.zeros(x[0], 3, HEADS, D, D)
    cu = torch.tensor([0, 7, 7, 512], device="cuda")
    slots = torch.tensor([1, -1, 0], device="cuda")
    g = -torch.rand(HEADS, device="cuda")

    def run() -> None:
        both(*x, backend=name, **options)
        packed = [part[:1] for part in x[:3]]
        linattn.attention(*packed, cu_seqlens=cu, log_decay=g, backend=name)
        linattn.attention(*packed, cu_seqlens=cu, initial_state=pool, slots=slots, log_decay=g, backend=name)
        tokens = [part[0, :3] for part in x[:3]]
        linattn.decode_step(*tokens, pool, slots=slots, log_decay=g, backend=name)

    run()
    with without_waiting():
        for _ in range(4):
            run()


def test_nothing_waits_where_tables_come_from_the_host() -> None:
    q = torch.randn(2, 300, 4, 32, device="cuda", requires_grad=True)
    decay = -torch.rand(2, 300, 4, device="cuda")
    cu = torch.tensor([0, 7, 7, 300], device="cuda")

    def run() -> None:
        linattn.attention(q, q, q, log_decay=linattn.decay.alibi(4)).sum().backward()
        linattn.attention(q, q, q, log_decay=decay, normalize=True, feature_map="relu").sum().backward()
        linattn.attention(q[:1], q[:1], q[:1], cu_seqlens=cu).sum().backward()

    for _ in range(2):  # the first call brings the table of decays to the device
        run()
    with without_waiting():
        run()


def test_on_several_streams(options: dict[str, Any]) -> None:
    inputs = [drawn(count=4, seed=seed) for seed in range(4)]
    want = [both(*x, **options) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(both(*x, **options))
        torch.cuda.synchronize()
        for mine, right in zip(got, want, strict=True):
            same(mine, right)


def test_called_again_with_other_tensors(options: dict[str, Any]) -> None:
    """What is remembered of a call is about its shapes: not about addresses, aliases or alignment."""
    q, k, v, do = drawn(count=4)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view_as(q).copy_(q)
    assert odd.data_ptr() % 16
    calls = [(q, k, v), (q, q, q), (q.clone(), k.clone(), v), (k, q, k), (odd, k, v), (q, k, v)]
    want = [[part.clone() for part in both(*x, do, **options)] for x in calls]
    for order in (calls, calls[::-1], calls * 2):
        for x in order:
            place = next(i for i, other in enumerate(calls) if other is x)
            same(both(*x, do, **options), want[place])
    for x, right in zip(calls, want, strict=True):
        other = linattn.attention(*x, backend="torch", **options)
        # two computations of one thing, each within 2^-8 of its size: nowhere is one of them another tensor's
        error = (right[0].float() - other.float()).norm() / other.float().norm()
        assert error < 2 * tolerance.SLACK * tolerance.UNIT["bfloat16"]


def test_one_kernel_for_any_length_and_batch() -> None:
    """A compiled kernel knows nothing of the call that it was compiled for."""
    of = testing.BackendSubject("triton")
    sizes = [(512, 4, 2), (33, 1, 1), (1, 2, 3), (160, 16, 2), (16, 1, 16), (129, 3, 1)]
    for state, (n, batch, heads) in itertools.product((False, True), sizes):
        for dtype, reweight in (("bfloat16", None), ("float32", "lrpe")):
            case = testing.Case(
                n=n, batch=batch, heads=heads, d=16, e=16, decay="head", reweight=reweight, state=state,
                dtype=dtype, rates=(0.0, 0.01, 1.0),
            )  # fmt: skip
            testing.properties.matches_the_reference(of, case)
            if n < 200:
                testing.properties.gradients_match_the_reference(of, case)


@pytest.mark.parametrize("name", ["plain", "per head", "per token, lrpe", "packed", "lengths"])
def test_a_pool_changes_in_place_and_nowhere_else(name: str) -> None:
    for dtype, slots in ((torch.int64, [3, -1, 0]), (torch.int32, [4, 2, 1])):
        for _ in range(4):  # from the third time on it is replayed
            pooled.check(name, "triton", "cuda", slots, dtype)


def test_autograd_sees_what_kernels_wrote() -> None:
    pooled.check_that_autograd_sees_it("triton", "cuda")


def test_under_autocast() -> None:
    q, k, v = drawn(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        o = linattn.attention(q, k, v, backend="triton")
    assert o.dtype == torch.bfloat16
    same([o], [linattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="triton")])


@needs_two
def test_on_another_device_than_the_current_one(options: dict[str, Any]) -> None:
    x = drawn(count=4)
    moved = {
        name: value.to("cuda:1") if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if isinstance(options.get("reweight"), LRPE):
        moved["reweight"] = LRPE(options["reweight"].theta.to("cuda:1"))
    got = both(*(part.to("cuda:1") for part in x), **moved)
    assert torch.cuda.current_device() == 0
    assert all(part.device.index == 1 for part in got)
    same([part.to("cuda:0") for part in got], both(*x, **options))


def test_refusals_and_where_auto_goes() -> None:
    def asked(d: int, dtype: Any, device: str) -> Any:
        x = torch.zeros(1, 2, 1, d, dtype=dtype, device=device)
        found = linattn.explain(x, x, x)
        with pytest.raises(linattn.errors.UnsupportedError, match="triton"):
            linattn.attention(x, x, x, backend="triton")
        assert linattn.attention(x, x, x).shape == x.shape
        return found

    for d, dtype, device, says in (
        (257, torch.float32, "cuda", "up to 256, got 257"),
        (16, torch.float64, "cuda", "float64"),
        (16, torch.float32, "cpu", "CUDA tensors, got cpu"),
    ):
        found = asked(d, dtype, device)
        assert says in found.reasons["triton"]
        assert found.chosen == "torch"
    x = torch.zeros(1, 2, 1, 256, device="cuda")
    assert linattn.explain(x, x, x).chosen == "triton"
