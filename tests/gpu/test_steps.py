"""Decoding steps in few kernels: those of the plain modules, in graphs, on any stream, without races."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from linattn import tolerance
from linattn.backends.triton import rows, rows_shape
from linattn.models import TransNormerConfig, TransNormerLM, decoding
from linattn.nn import SimpleRMSNorm
from tests.gpu.calls import captured, drawn, same, without_waiting
from tests.triton.mapped import exact

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
        if (
            g is not None and rows_shape.shape(b, n, k, two, True).block
        ):  # the gated row is rounded before the product
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
    model.graphs = False  # tests/gpu/test_replay.py has them
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


@pytest.mark.parametrize("b", [5, 20, 64])
def test_parts_are_waited_for(b: int) -> None:
    """Programs add up what others have left, in one order: the same bits with and without early starts."""
    width, inner = 512, 1536
    for n, k, two, gated in ((4 * width, width, False, False), (width, width, False, True),
                             (inner, width, True, False), (width, inner, False, False)):  # fmt: skip
        assert rows_shape.shape(b, n, k, two, gated).parts > 1
    model = built(torch.bfloat16, 3, width, 4)
    layers = model._layers()
    given = torch.randn(100, b, width, device="cuda").bfloat16()

    def walk() -> Any:
        states = model.initial_states(b)
        return torch.stack([list(decoding.steps(layers, states, x))[-1] for x in given])

    want = walk()
    with mock.patch.object(decoding, "PROGRAMMATIC", (99, 0)):
        unchained = walk()
    same([want], [unchained])
    states, x = model.initial_states(b), given[0].clone()
    graph, last = captured(lambda: list(decoding.steps(layers, states, x))[-1])
    for state in states:
        state.kv.zero_()
        state.length.zero_()
    replayed = []
    for row in given:
        x.copy_(row)
        graph.replay()
        replayed.append(last.clone())
    same([torch.stack(replayed)], [want])
    # two at once, each with counters of its own
    streams, both = [torch.cuda.Stream() for _ in range(2)], [model.initial_states(b) for _ in range(2)]
    found: list[Any] = [[], []]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for row in given:
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(list(decoding.steps(layers, both[i], row))[-1])
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    same([torch.stack(parts) for parts in found], [want, want])


def test_in_a_graph_that_is_replayed_again_and_again() -> None:
    model, ids = built(torch.bfloat16, 1, 16, 1), torch.randint(0, 256, (1,), device="cuda")
    states, others = model.initial_states(1), model.initial_states(1)
    graph, logits = captured(lambda: model.step(ids, states))
    for state in states:
        state.kv.zero_()
        state.length.zero_()
    replayed, walked_through = [], []
    for _ in range(2000):
        graph.replay()
        replayed.append(logits.clone())
        walked_through.append(model.step(ids, others))
    same([torch.stack(replayed)], [torch.stack(walked_through)])
    assert states[0].length.item() == others[0].length.item() == 2000


def test_two_models_on_two_streams() -> None:
    models = [built(torch.bfloat16, 3, 128, 2), built(torch.bfloat16, 2, 64, 1)]
    ids = torch.randint(0, 256, (2, 60), device="cuda")
    want = [walked(model, ids)[0] for model in models]
    streams, states = [torch.cuda.Stream() for _ in models], [model.initial_states(2) for model in models]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got: list[Any] = [[], []]
    for column in ids.T:
        for i, model in enumerate(models):
            with torch.cuda.stream(streams[i]):
                got[i].append(model.step(column, states[i]))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    same([torch.stack(parts, 1) for parts in got], want)


@pytest.mark.parametrize("b", [1, 5])
def test_the_released_model_steps_in_the_same_way(b: int, dtype: Any) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from linattn.models.transnormer import TransNormerConfig as Released
    from linattn.models.transnormer import TransNormerForCausalLM

    small, ids = built(dtype), torch.randint(0, 256, (b, 20), device="cuda")
    config = Released(
        vocab_size=256, decoder_embed_dim=128, hidden_dim=128, decoder_attention_heads=2, decoder_layers=3,
        glu_dim=384, linear_use_lrpe_list=[1, 0, 1],
    )  # fmt: skip
    model = TransNormerForCausalLM(config).to("cuda", dtype).eval()
    model.graphs = False
    names = model.state_dict().keys()
    weights = small.state_dict()
    model.load_state_dict({name: weights[name.removeprefix("model.")] for name in names})
    _, states = small(ids[:, :4], return_states=True)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    for i in range(4, 20):
        got = model(ids[:, i : i + 1], past_key_values=cache).logits[:, 0]
        same([got], [small.step(ids[:, i], states)])
    for mine, other in zip(cache.states, states, strict=True):
        same([mine.kv, mine.length], [other.kv, other.length])


def test_heads_wider_than_the_kernels_take() -> None:
    model, ids = built(torch.bfloat16, 2, 544, 2), torch.randint(0, 256, (2, 12), device="cuda")
    assert decoding.runs(model.layers[0], model.embed(ids[:, 0]))
    got, _ = walked(model, ids)
    fuse(model, False)
    plain, _ = walked(model, ids)
    exactly, _ = walked(model.double(), ids)
    assert (got.double() - exactly).norm() <= tolerance.SLACK * (plain.double() - exactly).norm()


def test_rows_lie_anywhere(dtype: Any) -> None:
    for b in (1, 3, 5):
        x, gate = drawn(b, 64, dtype=dtype, count=2)
        places = range(3) if b <= rows.FEW else (2,)  # the norm in front may sum in another order
        (residual,), (w,) = drawn(b, 50, dtype=dtype, count=1), drawn(50, 64, dtype=dtype, count=1, seed=1)
        want = rows.products(x, (w,), eps=EPS, gate=gate, residual=residual)
        for place in places:
            given = [x, gate, residual]
            part = given[place]
            odd = torch.empty(part.numel() + 1, dtype=dtype, device="cuda")[1:].view(part.shape).copy_(part)
            for other in (odd, part.T.contiguous().T, torch.stack([part, part], -1)[..., 0]):
                given[place] = other
                got = rows.products(given[0], (w,), eps=EPS, gate=given[1], residual=given[2])
                same([got], [want])


def test_decays_that_changed_in_place() -> None:
    model, ids = built(torch.bfloat16), torch.randint(0, 256, (1, 8), device="cuda")
    walked(model, ids)
    for layer in model.layers:
        layer.token_mixer.log_decay.mul_(2)
    got, _ = walked(model, ids)
    for layer in model.layers:
        layer.token_mixer._rounded = None
    same([walked(model, ids)[0]], [got])


def test_on_another_stream_and_without_waiting() -> None:
    model, ids = built(torch.bfloat16), torch.randint(0, 256, (2, 50), device="cuda")
    want, _ = walked(model, ids)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with without_waiting(), torch.cuda.stream(side):
        got, _ = walked(model, ids)
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
