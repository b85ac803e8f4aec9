"""Layers that keep less, on a GPU: beside plain modules, in float32 and half, in graphs, computed again."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from linattn import tolerance
from linattn.errors import GradientError
from linattn.models.transnormer_lm import TransNormerConfig, TransNormerLayer
from linattn.nn import SimpleRMSNorm
from linattn.nn import fused as maps
from linattn.nn.fused import gated, normed, product
from linattn.nn.norm import kernels
from tests.gpu.calls import captured, drawn, needs_two, same, without_waiting
from tests.triton.interpreted_fused import kept

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTH, HIDDEN, GLU, ROWS = 96, 128, 160, 140


def a_layer(dtype: Any = torch.float32, *, fused: bool = True, device: str = "cuda") -> Any:
    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=7, embed_dim=WIDTH, hidden_dim=HIDDEN, num_heads=2, num_layers=3, glu_dim=GLU
    )
    layer = TransNormerLayer(config, 1).to(device, dtype)
    layer.norm.fused = layer.token_mixer.norm.fused = fused
    return layer


def run(layer: Any, x: Any) -> Any:
    return layer(x, None, False, None, None, None)[0]


def results(layer: Any, x: Any, how: Any = run) -> list[Any]:
    """The output and the gradients of x and of every weight."""
    leaf = x.detach().requires_grad_()
    y = how(layer, leaf)
    slope = (torch.arange(y.numel(), device=y.device) % 5 - 2).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], slope)]


def rows(dtype: Any = torch.float32) -> Any:
    return drawn(2, ROWS // 2, WIDTH, dtype=dtype, count=1)[0]


def no_worse(got: Any, plain: Any, exact: Any, dtype: Any) -> None:
    """Assert errors no larger than those of plain modules, up to the bound's own slack."""
    u = tolerance.UNIT[str(dtype).removeprefix("torch.")]
    for i, (mine, other, want) in enumerate(zip(got, plain, exact, strict=True)):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        size = want.norm()
        error, theirs = (mine.double() - want).norm(), (other.double() - want).norm()
        assert error <= tolerance.SLACK * (theirs + u * size), (i, float(error / size), float(theirs / size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_beside_plain_modules(dtype: Any) -> None:
    layer, x = a_layer(dtype), rows(dtype)
    plain = results(a_layer(dtype, fused=False), x)
    exact = results(copy.deepcopy(layer).double(), x.double())
    with mock.patch.object(maps, "_apply", wraps=maps._apply) as nodes:
        got = results(layer, x)
    assert nodes.call_count == 4
    no_worse(got, plain, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_under_autocast(dtype: Any) -> None:
    layer, x = a_layer(), rows()
    exact = results(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cuda", dtype):
        plain = results(a_layer(fused=False), x)
        with mock.patch.object(maps, "_apply", wraps=maps._apply) as nodes:
            got = results(layer, x)
    assert nodes.call_count == 4
    no_worse(got, plain, exact, dtype)

    def alone(layer: Any, x: Any) -> Any:
        with torch.autocast("cuda", dtype):
            return run(layer, x)

    same(results(layer, x, alone), got)  # the backward pass out of autocast


def test_sizes_of_a_product() -> None:
    numbers = torch.randn(3, 10_001, device="cuda")
    glu = kernels("glu")
    for dtype in DTYPES:
        for size, first in ((1, 0), (16, 0), (17, 0), (2048, 0), (4096, 1), (9999, 2), (10_000, 0), (0, 0)):
            a, b, dp = numbers.to(dtype)[:, first : first + size]
            for again in (None, dtype):
                da, db, p = glu.backward(a, b, dp, again)
                same([da, db], [dp * b, dp * a])
                assert p is None if again is None else torch.equal(p, a * b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_with_gaps(dtype: Any) -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(HIDDEN, WIDTH).to("cuda", dtype), SimpleRMSNorm()
    wide = drawn(2, 70, 4 * HIDDEN, dtype=dtype, count=1)[0]
    parts = [part.detach() for part in wide.chunk(4, -1)[1:3]]
    dy = drawn(2, 70, WIDTH, dtype=dtype, count=1)[0]

    def of(run: Any, *parts: Any) -> list[Any]:
        leaves = [part.detach().requires_grad_() for part in parts]
        return list(torch.autograd.grad(run(*leaves), [*leaves, *linear.parameters()], dy))

    for run, count in (
        (lambda o, u: gated(norm, linear, o, u), 2),
        (lambda a, b: product(linear, a, b), 2),
        (lambda x: normed(norm, (linear,), x)[1], 1),
    ):
        got, want = of(run, *parts[:count]), of(run, *(part.contiguous() for part in parts[:count]))
        assert all(part.is_contiguous() for part in got)
        no_worse(got, want, [part.double() for part in want], dtype)


def test_in_a_cuda_graph() -> None:
    layer, x = a_layer(torch.bfloat16), rows(torch.bfloat16)
    graph, result = captured(lambda: tuple(results(layer, x)))
    x.copy_(torch.randn_like(x))
    graph.replay()
    same([part.clone() for part in result], results(layer, x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lowered", [False, True], ids=["float32", "autocast"])
def test_computed_again(reentrant: bool, lowered: bool) -> None:
    layer, x = a_layer(), rows()

    def trained(how: Any) -> list[Any]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=lowered):
            y = how(layer, leaf)
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(part.grad.clone() for part in layer.parameters())]

    same(trained(lambda f, x: checkpoint(run, f, x, use_reentrant=reentrant)), trained(run))


def test_nothing_waits_for_the_gpu() -> None:
    layer, x = a_layer(torch.bfloat16), rows(torch.bfloat16)
    results(layer, x)
    with without_waiting():
        results(layer, x)


@pytest.mark.parametrize("lowered", [False, True], ids=["bfloat16", "autocast"])
def test_bytes_kept(lowered: bool) -> None:
    wide = 4 if lowered else 2  # bytes of a number of the residual stream; products are 2
    dtype = torch.float32 if lowered else torch.bfloat16
    found = []
    for fused in (True, False):
        layer, x = a_layer(dtype, fused=fused), rows(dtype).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=lowered):
            found.append(kept(lambda layer=layer, x=x: run(layer, x), list(layer.parameters())))
    # x twice, q k v u and o, l1 and l2; besides them only tables of a few numbers
    floor = ROWS * (2 * wide * WIDTH + 2 * (5 * HIDDEN + 2 * GLU))
    assert floor <= found[0] < floor + 4096
    assert found[1] - found[0] >= ROWS * 2 * (2 * WIDTH + HIDDEN + GLU)


def test_without_gradients_and_twice() -> None:
    layer, x = a_layer(), rows()
    with mock.patch.object(maps, "_apply", side_effect=AssertionError):
        with torch.no_grad():
            quiet = run(layer, x)
        with torch.inference_mode():
            same([run(layer, x)], [quiet])
    same([run(layer, x).detach()], [quiet])
    linear, leaf = nn.Linear(WIDTH, 3, device="cuda"), x.requires_grad_()
    y = normed(layer.norm, (linear,), leaf)[1]
    (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(GradientError, match=r"SimpleRMSNorm\(fused=False\)"):
        dx.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler: str) -> None:
    layer, x = a_layer(torch.bfloat16), rows(torch.bfloat16)
    want, exact = results(layer, x), results(copy.deepcopy(layer).double(), x.double())
    torch.compiler.reset()
    compiled = torch.compile(run, backend=compiler)
    with mock.patch.object(maps, "_apply", side_effect=AssertionError):
        no_worse(results(layer, x, compiled), want, exact, torch.bfloat16)


def test_frozen_weights_and_hooks() -> None:
    for change, count in (
        (lambda layer: layer.channel_mixer.requires_grad_(False), 4),
        (lambda layer: layer.token_mixer.out_proj.register_forward_hook(lambda *of: None), 3),
        (lambda layer: layer.channel_mixer.register_forward_hook(lambda *of: None), 2),
    ):
        layer, x = a_layer(), rows().requires_grad_()
        plain, exact = a_layer(fused=False), a_layer(torch.float64)
        change(layer)
        grads = []
        with mock.patch.object(maps, "_apply", wraps=maps._apply) as nodes:
            for module in (layer, plain, exact):
                leaves = [x.to(module.token_mixer.out_proj.weight.dtype), *module.token_mixer.parameters()]
                grads.append(torch.autograd.grad(run(module, leaves[0]).square().sum(), leaves))
        assert nodes.call_count == count
        no_worse(*grads, torch.float32)


@needs_two
def test_on_another_device_than_the_current_one() -> None:
    x = rows()
    got = results(a_layer(device="cuda:1"), x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    same([part.to("cuda:0") for part in got], results(a_layer(), x))
