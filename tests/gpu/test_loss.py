"""The fused cross entropy on a GPU: within its bound at every width, its gradients, its memory."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from linattn import tolerance
from linattn.backends.triton import loss as kernels
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM
from linattn.nn import linear_cross_entropy
from linattn.nn import loss as module
from tests.gpu.calls import captured, needs_two, same, without_waiting
from tests.triton.scored import IGNORED, compare, exact, given, through_products, turned

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 7, 100, 1000, 4096, 50257, 64000, 128001)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


def operands(t: int, e: int, v: int, dtype: Any, seed: int = 0) -> Any:
    """x, weight and labels, a seventh of them asking nothing."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, weight = (torch.randn(n, e, generator=generator, device="cuda").to(dtype) for n in (t, v))
    labels = torch.randint(0, v, (t,), generator=generator, device="cuda")
    return x, weight / e**0.5, labels.masked_fill(torch.arange(t, device="cuda") % 7 == 3, IGNORED)


def both(x: Any, weight: Any, labels: Any, run: Any = linear_cross_entropy, **options: Any) -> Any:
    """The loss, and the gradients of a third of it."""
    leaves = [part.detach().requires_grad_() for part in (x, weight)]
    total = run(*leaves, labels, **options)
    return total.detach(), *torch.autograd.grad(total / 3, leaves)


def alike(got: Any, want: Any, dtype: Any) -> None:
    """Assert equal but for roundings to a dtype, or for float32 arithmetic in another order."""
    unit = tolerance.UNIT[str(dtype).removeprefix("torch.")]
    for mine, other in zip(got, want, strict=True):
        assert mine.dtype == other.dtype
        room = tolerance.SLACK * max(unit, 16 * tolerance.UNIT["float32"])
        assert (mine - other).norm() <= room * other.norm()


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_within_the_bound(width: int, dtype: Any) -> None:
    for rows in (1, 21, 403):
        logits, labels = given(width, dtype, device="cuda", rows=rows)
        losses, slopes = turned(kernels, logits, labels)
        compare(losses, slopes, logits, labels, kernels.shape(width).block)
        alone, _ = turned(kernels, logits, labels, gradient=False)
        same([alone], [losses])


@pytest.mark.parametrize("width", [7, 1000, 64000, 128001])
def test_a_row_keeps_its_bits_in_any_chunk(width: int, dtype: Any) -> None:
    logits, labels = given(width, dtype, device="cuda", rows=60)
    losses, slopes = turned(kernels, logits, labels)
    for size in (1, 7, 59):
        for start in (0, 30):
            part = slice(start, start + size)
            same(turned(kernels, logits[part], labels[part]), (losses[part], slopes[part]))
    same(turned(kernels, logits, labels), (losses, slopes))


@pytest.mark.parametrize("e", [5, 64, 1024])
@pytest.mark.parametrize("width", [7, 1000, 64000, 128001])
def test_gradients_within_the_bound(width: int, e: int, dtype: Any) -> None:
    x, weight, labels = operands(300, e, width, dtype)
    logits = torch.mm(x, weight.T, out=kernels.room(300, width, x))  # the very ones, where rows are whole
    losses, slopes = exact(logits, labels)
    block = kernels.shape(width).block
    bounds = through_products(x, weight, labels, slopes, block, logits)
    total, *got = both(x, weight, labels)
    assert abs(total.double() - losses.sum()) <= 300 * tolerance.UNIT["float32"] * losses.sum()
    for mine, (want, room) in zip(got, bounds.values(), strict=True):
        assert mine.dtype == dtype
        assert bool((abs(3 * mine.double() - want) <= room).all())


def test_chunks_are_the_whole(dtype: Any) -> None:
    """A product of other shapes may add up in another order: its logits are off by one rounding."""
    x, weight, labels = operands(1000, 64, 1000, dtype)
    want = both(x, weight, labels)
    for chunk in (1, 300, 512, 2000):
        alike(both(x, weight, labels, chunk=chunk), want, dtype)


def test_the_kernel_is_what_runs(dtype: Any) -> None:
    x, weight, labels = operands(100, 16, 50, dtype)
    with mock.patch.object(kernels, "turned", wraps=kernels.turned) as turns:
        both(x, weight, labels, chunk=40)
        assert turns.call_count == 3
        both(x.double(), weight.double(), labels)
        with torch.no_grad():
            linear_cross_entropy(x, weight, labels)
        assert turns.call_count == 4


def test_a_gpu_without_kernels_has_operations(dtype: Any) -> None:
    x, weight, labels = operands(100, 16, 1000, dtype)
    want = both(x, weight, labels, chunk=40)
    for name in ("_compiles_for", "_mixes"):
        with mock.patch.object(module, name, lambda device: False):
            alike(both(x, weight, labels, chunk=40), want, dtype)
    with mock.patch.object(module, "MIXED_SUM", False):
        alike(both(x, weight, labels, chunk=40), want, dtype)


def test_labels_out_of_range_are_nan_and_read_nothing(dtype: Any) -> None:
    x, weight, labels = operands(100, 16, 1000, dtype)
    for parts in ((x, weight), (x.double(), weight.double())):
        _, want, _ = both(*parts, labels)
        for wrong in (-1, 1000, 1 << 50):
            changed = labels.clone()
            changed[50] = wrong
            total, dx, dw = both(*parts, changed)
            others = torch.arange(100, device="cuda") != 50
            same([dx[others]], [want[others]])
            assert total.isnan() and dx[50].isnan().all() and dw.isnan().all()


def test_nothing_asked_leaves_no_trace() -> None:
    x, weight, labels = operands(100, 16, 1000, torch.bfloat16)
    want = both(x, weight, labels, chunk=40)
    x[labels == IGNORED] = torch.nan
    same(both(x, weight, labels, chunk=40), want)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(lower: Any) -> None:
    x, weight, labels = operands(300, 64, 1000, torch.float32)
    with torch.autocast("cuda", lower):
        got = both(x, weight, labels, chunk=100)
    assert [part.dtype for part in got] == [torch.float32] * 3
    want = both(x.to(lower), weight.to(lower), labels, chunk=100)
    same(got[:1], want[:1])
    alike(got, [part.float() for part in want], lower)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_under_torch_compile(compiler: str, dtype: Any) -> None:
    x, weight, labels = operands(300, 64, 1000, dtype)
    torch.compiler.reset()
    run = torch.compile(linear_cross_entropy, fullgraph=True, backend=compiler)
    got, want = both(x, weight, labels, run, chunk=100), both(x, weight, labels, chunk=100)
    same(got[:1], want[:1])
    alike(got, want, dtype)  # a compiler may round the last product elsewhere


def test_in_a_cuda_graph(dtype: Any) -> None:
    x, weight, labels = operands(300, 64, 1000, dtype)
    graph, result = captured(lambda: both(x, weight, labels, chunk=128))
    for part, fresh in zip((x, weight, labels), operands(300, 64, 1000, dtype, seed=1), strict=True):
        part.copy_(fresh)
    graph.replay()
    same([part.clone() for part in result], both(x, weight, labels, chunk=128))


def test_nothing_waits_for_the_gpu() -> None:
    x, weight, labels = operands(300, 64, 1000, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float64):
        parts = x.to(dtype), weight.to(dtype), labels
        both(*parts, chunk=128)
        with without_waiting():
            both(*parts, chunk=128)


def test_the_memory_of_one_chunk() -> None:
    t, e, v, chunk = 8192, 64, 64000, 512
    x, weight, labels = operands(t, e, v, torch.bfloat16)
    both(x[:100], weight, labels[:100])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(x, weight, labels, chunk=chunk)
    used = torch.cuda.max_memory_allocated() - before
    # gradients of x before and after they are multiplied, of weight in float32 and bfloat16; a chunk's logits
    needed = 2 * 2 * t * e + 6 * v * e + 2 * chunk * v
    assert used <= 1.25 * needed, (used, needed)


@pytest.mark.parametrize("lower", [False, True], ids=["float32", "autocast"])
def test_a_model_trains_alike_with_and_without_chunks(lower: bool) -> None:
    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=1000, decoder_embed_dim=64, hidden_dim=64, decoder_layers=2, decoder_attention_heads=2,
        glu_dim=96, linear_use_lrpe_list=[1, 0], tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    model = TransNormerForCausalLM(config).cuda().train()
    ids = torch.randint(3, 1000, (2, 100), device="cuda")
    results = []
    for chunk in (None, 64):
        model.loss_chunk = chunk
        with torch.autocast("cuda", torch.bfloat16, enabled=lower):
            loss = model(ids, labels=ids).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, [model.lm_head.weight])))
    alike(*results, torch.bfloat16 if lower else torch.float32)


@needs_two
def test_on_another_device_than_the_current_one() -> None:
    parts = operands(100, 16, 1000, torch.bfloat16)
    got = both(*(part.to("cuda:1") for part in parts), chunk=40)
    assert torch.cuda.current_device() == 0
    same([part.to("cuda:0") for part in got], both(*parts, chunk=40))
