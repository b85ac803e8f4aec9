"""The fused norm on a GPU: within its bound at every width, alone, in a layer, compiled, in a graph."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from linattn import tolerance
from linattn.errors import GradientError
from linattn.nn import GatedLinearAttention, SimpleRMSNorm
from linattn.nn import norm as module
from tests.gpu.calls import captured, drawn, needs_two, same, without_waiting
from tests.triton.normed import EPS, compare, computed, given

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 3, 64, 100, 1000, 2049, 2560, 4096, 12288, 16384, 20000)
NORM, PLAIN = SimpleRMSNorm(), SimpleRMSNorm(fused=False)


def normed(x: Any, u: Any = None) -> Any:
    return NORM(x) if u is None else NORM.gated(x, u)


def both(x: Any, u: Any, dy: Any, run: Any = normed) -> dict[str, Any]:
    """The output and the gradients, by their names."""
    leaves = [part.detach().requires_grad_() for part in ((x,) if u is None else (x, u))]
    y = run(*leaves)
    names = ("y", "dx") if u is None else ("y", "dx", "du")
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("width", WIDTHS)
def test_within_the_bound(width: int, dtype: Any) -> None:
    for rows in (1, 21, 403):
        x, u, dy = given(width, dtype, device="cuda", rows=rows)
        for gate in (None, u):
            compare(both(x, gate, dy), x, gate, dy)


@pytest.mark.parametrize("width", WIDTHS)
def test_y_again_and_a_gradient_from_elsewhere(width: int, dtype: Any) -> None:
    for half in {dtype, torch.bfloat16}:  # what a linear map asks for, alone and under autocast
        x, u, dy = given(width, dtype, device="cuda", rows=403)
        slope, more = dy.to(half), u.flip(0)
        for gate, other in ((None, None), (None, more), (u, None)):
            got = computed(module.kernels(), x, gate, slope, more=other, dtype=half)
            compare(got, x, gate, slope, more=other, dtype=half)
        wide = torch.stack([more, more], 1)[:, 0]  # rows with gaps
        got = computed(module.kernels(), x, None, slope, more=wide, dtype=half)
        compare(got, x, None, slope, more=more, dtype=half)


def test_the_kernels_are_what_runs(dtype: Any) -> None:
    x, u, dy = given(100, dtype, device="cuda")
    kernels = module.kernels()
    with (
        mock.patch.object(kernels, "forward", wraps=kernels.forward) as forward,
        mock.patch.object(kernels, "backward", wraps=kernels.backward) as backward,
    ):
        for gate in (None, u):
            both(x, gate, dy)
        with torch.no_grad():
            normed(x)
        assert (forward.call_count, backward.call_count) == (3, 2)
        both(x, u, dy, PLAIN.gated)
        both(x.double(), u.double(), dy.double())
        assert (forward.call_count, backward.call_count) == (3, 2)
        both(x, u.double(), dy.double())  # the norm alone
        assert (forward.call_count, backward.call_count) == (4, 3)


def test_plain_is_the_formula_of_torch(dtype: Any) -> None:
    x, u, _ = given(2560, dtype, device="cuda")
    wide = x.float()
    want = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(dtype)
    same([PLAIN(x), PLAIN.gated(x, u)], [want, u * want])


@pytest.mark.parametrize("width", [40, 64, 2560])
def test_any_layout(width: int, dtype: Any) -> None:
    rows = torch.randn(2, 6, 4 * width, device="cuda").to(dtype)
    x, u, dy, _ = rows.chunk(4, -1)
    odd = [torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].view(x.shape) for _ in range(2)]
    odd[0].copy_(x)
    odd[1].copy_(u)
    for parts in (
        (x, u, dy),
        tuple(part.mT.contiguous().mT for part in (x, u, dy)),
        tuple(torch.stack([part, part], -1)[..., 0] for part in (x, u, dy)),
        (odd[0], u, dy),
        (x, odd[1], dy),
    ):
        # another layout may be read in other pieces, and so summed in another order
        compare(both(*parts), x, u, dy)
    one = torch.ones((), dtype=dtype, device="cuda").expand(x.shape)
    compare(both(x, None, one), x, None, one)
    assert NORM(x[:0]).shape == (0, 6, width)


def test_rows_more_than_2_31_numbers_apart() -> None:
    x, u, dy = given(64, torch.bfloat16, device="cuda", rows=3)
    buffer = torch.empty((1 << 31) + (1 << 16), dtype=torch.bfloat16, device="cuda")
    far = []
    for i, part in enumerate((x, u, dy)):
        view = buffer.as_strided((3, 64), (1 << 30, 1), i << 12)
        far.append(view.copy_(part))
    compare(both(*far), x, u, dy)


def test_not_finite_numbers_stay_in_their_row() -> None:
    for width in (5, 300, 20000):
        right = given(width, torch.bfloat16, device="cuda", rows=11)
        for place in range(3):
            for bad in (float("nan"), float("inf")):
                wrong = [part.clone() for part in right]
                wrong[place][4, 2] = bad
                want, got = both(*right), both(*wrong)
                others = torch.arange(11, device="cuda") != 4
                same([part[others] for part in got.values()], [part[others] for part in want.values()])
                assert not all(part[4].isfinite().all() for part in got.values())


def test_a_row_keeps_its_bits_in_any_batch(dtype: Any) -> None:
    x, u, dy = given(100, dtype, device="cuda", rows=90)
    whole = both(x, u, dy)
    for n in (0, 20, 89):
        rows = slice(n, n + 1)
        same(both(x[rows], u[rows], dy[rows]).values(), [part[rows] for part in whole.values()])
    same(both(x, u, dy).values(), whole.values())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("gated", [False, True])
def test_under_torch_compile(compiler: str, gated: bool, dtype: Any) -> None:
    x, u, dy = drawn(21, 1000, dtype=dtype)
    gate = u if gated else None
    torch.compiler.reset()
    compiled = torch.compile(normed, fullgraph=True, backend=compiler)
    with mock.patch.object(module, "_fused", side_effect=AssertionError("compilers fuse torch's operations")):
        got = both(x, gate, dy, compiled)
    for name, want in both(x, gate, dy).items():
        allowed = tolerance.SLACK * tolerance.UNIT[str(dtype).removeprefix("torch.")]
        assert got[name].dtype == dtype
        assert (got[name].double() - want.double()).norm() <= allowed * want.double().norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_under_autocast(compiled: bool) -> None:
    torch.manual_seed(0)
    mixer = GatedLinearAttention(96, 128, 2).cuda()
    torch.compiler.reset()
    run = torch.compile(mixer, fullgraph=True, backend="aot_eager") if compiled else mixer
    (x,) = drawn(2, 70, 96, dtype=torch.float32, count=1)
    results = []
    for fused in (True, False):
        mixer.norm.fused = fused
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = run(leaf)
        assert y.dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [leaf, mixer.qkvu_proj.weight])))
    for fused, other in zip(*results, strict=True):
        assert fused.dtype == other.dtype
        # both round a few times to bfloat16
        assert (fused - other).norm() <= tolerance.SLACK * tolerance.UNIT["bfloat16"] * other.norm()


def test_under_autocast(dtype: Any) -> None:
    x, u, dy = given(100, dtype, device="cuda")
    want = both(x, u, dy)
    with torch.autocast("cuda", torch.bfloat16):
        same(both(x, u, dy).values(), want.values())


def test_in_a_cuda_graph(dtype: Any) -> None:
    x, u, dy = given(1000, dtype, device="cuda")
    graph, result = captured(lambda: tuple(both(x, u, dy).values()))
    for part, fresh in zip((x, u, dy), given(1000, dtype, device="cuda", seed=1), strict=True):
        part.copy_(fresh)
    graph.replay()
    same([part.clone() for part in result], both(x, u, dy).values())


def test_nothing_waits_for_the_gpu() -> None:
    x, u, dy = given(1000, torch.bfloat16, device="cuda")
    both(x, u, dy)
    with without_waiting():
        both(x, u, dy)


def test_a_gpu_without_kernels_has_the_formula(dtype: Any) -> None:
    x, u, dy = given(100, dtype, device="cuda")
    with mock.patch.object(module, "_compiles_for", lambda device: False):
        same(both(x, u, dy).values(), both(x, u, dy, PLAIN.gated).values())
        same([NORM(x)], [PLAIN(x)])


def test_other_derivatives() -> None:
    x, u, _ = given(10, torch.float32, device="cuda")
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(NORM.gated(leaf, u).square().sum(), leaf, create_graph=True)
    with pytest.raises(GradientError, match=r"SimpleRMSNorm\(fused=False\)"):
        dx.sum().backward()
    # transforms see operations of torch
    same([torch.func.vmap(NORM)(x)], [PLAIN(x)])
    grads = [torch.func.grad(lambda x, norm=norm: norm(x).square().sum())(x) for norm in (NORM, PLAIN)]
    same(grads[:1], grads[1:])


@needs_two
def test_on_another_device_than_the_current_one() -> None:
    x, u, dy = given(100, torch.bfloat16, device="cuda")
    got = both(*(part.to("cuda:1") for part in (x, u, dy)))
    assert torch.cuda.current_device() == 0
    same([part.to("cuda:0") for part in got.values()], both(x, u, dy).values())
