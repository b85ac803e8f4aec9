"""One kernel for all layers of a step: the formulas in float64, without races, in graphs, beside others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import linattn
from linattn import tolerance
from linattn.models import TransNormerConfig, TransNormerLM, decoding, persistent, replay
from tests.gpu.calls import captured, needs_cupy, needs_hopper, same, without_waiting
from tests.gpu.test_steps import fuse

pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [
    pytest.mark.gpu,
    needs_cupy,
    needs_hopper,
]

SUMS = 1e-5  # of the largest number: what sums in float32 may be off by


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def built(
    layers: int = 3, inner: int = 2816, feature_map: str | None = "silu", seed: int = 0, vocab: int = 64
) -> Any:
    torch.manual_seed(seed)
    config = TransNormerConfig(
        vocab_size=vocab, embed_dim=1024, hidden_dim=1024, num_heads=8, num_layers=layers, glu_dim=inner,
        linear_use_lrpe_list=tuple(int(i % 2 == 0) for i in range(layers)), feature_map=feature_map,
    )  # fmt: skip
    with torch.device("cuda"):
        model = TransNormerLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=1 / 32)
    model.graphs, model.one_kernel = False, True
    return model.to(torch.bfloat16).eval()


def begun(model: Any) -> list[Any]:
    """States in the middle of a text."""
    states = model.initial_states(1)
    for i, state in enumerate(states):
        state.kv.normal_(generator=torch.Generator("cuda").manual_seed(i))
        state.length.fill_(1000 + i)
    return states


def drawn(n: int = 1, seed: int = 0) -> Any:
    return torch.randn(
        n, 1, 1024, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"
    ).bfloat16()


def exactly(model: Any, states: list[Any], x: Any) -> tuple[Any, list[Any]]:
    """The formulas in float64, and the states that they give."""
    acts = {
        None: lambda y: y, "silu": torch.nn.functional.silu, "relu": torch.relu,
        "elu+1": lambda y: torch.nn.functional.elu(y) + 1,
    }  # fmt: skip
    x, after = x.double(), []

    def normed(y: Any, eps: float) -> Any:
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)

    for layer, state in zip(model.layers, states, strict=True):
        mixer, channels, eps = layer.token_mixer, layer.channel_mixer, layer.norm.eps
        q, k, v, u = (normed(x, eps) @ mixer.qkvu_proj.weight.double().T).chunk(4, -1)
        act = acts[mixer.feature_map]
        q, k, v = act(q).view(8, 128), act(k).view(8, 128), v.view(8, 128)
        decay = 1.0 if mixer.log_decay is None else mixer.log_decay.exp()[:, None, None]
        old, added = state.kv[0].double(), k[:, :, None] * v[:, None]
        if mixer.lrpe is None:
            new = torch.where(torch.as_tensor(decay, device="cuda") == 0, 0.0, decay * old) + added
        else:
            turn, cosine, sine = mixer.lrpe.theta.double().view(8, 128, 1), old[:, :128], old[:, 128:]
            one = decay * (cosine * turn.cos() - sine * turn.sin()) + added
            new = torch.cat([one, decay * (sine * turn.cos() + cosine * turn.sin())], 1)
        after.append(new)
        o = torch.einsum("hd,hde->he", q, new[:, :128]).reshape(1, 1024)
        x = x + (normed(o, mixer.norm.eps) * u) @ mixer.out_proj.weight.double().T
        y = normed(x, eps)
        p = (y @ channels.l1.weight.double().T) * (y @ channels.l2.weight.double().T)
        x = x + p @ channels.l3.weight.double().T
    return x, after


def assert_near(got: Any, want: Any, unit: float = 0.0) -> None:
    """As near as sums in float32, and a rounding with `unit`, are."""
    over = (got.double() - want).abs() - unit * want.abs() - SUMS * want.abs().max()
    assert float(over.max()) <= 0, float(over.max())


def check(model: Any, states: list[Any], x: Any) -> Any:
    """A step by the kernel against the formulas: sums in float32, one rounding at the end."""
    want, after = exactly(model, states, x)
    lengths = [int(state.length) for state in states]
    got = persistent.step(model._layers(), states, x)
    assert got is not None
    assert_near(got, want, tolerance.UNIT["bfloat16"])
    for state, new, length in zip(states, after, lengths, strict=True):
        assert_near(state.kv[0], new)
        assert int(state.length) == length + 1
    return got


@pytest.mark.parametrize("inner", [256, 1024, 2048, 2816, 3072])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_formulas(layers: int, inner: int) -> None:
    model = built(layers, inner)
    check(model, begun(model), drawn()[0])


@pytest.mark.parametrize("feature_map", [None, "relu", "silu", "elu+1"])
def test_feature_maps(feature_map: str | None) -> None:
    model = built(2, 512, feature_map)
    check(model, begun(model), drawn()[0])


def test_epsilons_of_their_own() -> None:
    model = built(3, 512)
    for i, layer in enumerate(model.layers):
        layer.norm.eps, layer.token_mixer.norm.eps = 0.3 * (i + 1), 0.1 / (i + 1)
    check(model, begun(model), drawn()[0])


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -3.0, -math.inf])
def test_decays(log_decay: float) -> None:
    model = built(3, 512)
    for layer in model.layers:
        layer.token_mixer.log_decay.fill_(log_decay)
    states = begun(model)
    if log_decay == -math.inf:  # what is forgotten may not be finite
        want, _ = exactly(model, states, drawn()[0])
        for state in states:
            state.kv.fill_(math.nan)
        got = persistent.step(model._layers(), states, drawn()[0])
        assert got is not None
        assert_near(got, want, tolerance.UNIT["bfloat16"])
        assert all(bool(state.kv.isfinite().all()) for state in states)
    else:
        check(model, states, drawn()[0])


@pytest.mark.parametrize("vocab", [1, 100, 9000, 64000])
def test_logits(vocab: int) -> None:
    model, x = built(2, 512, vocab=vocab), drawn()[0]
    states, end = begun(model), persistent.End(model.norm, model.lm_head)
    want, _ = exactly(model, states, x)
    want = want * torch.rsqrt(want.square().mean() + model.norm.eps)
    assert persistent.ends(end, model._layers(), x)
    found = []
    for graphs in (False, True):
        states = begun(model)
        for _ in range(4):
            for state, first in zip(states, begun(model), strict=True):
                state.kv.copy_(first.kv)
            row, logits = decoding.ended(model._layers(), states, x, end, graphs=graphs, one_kernel=True)
            assert_near(row, want, tolerance.UNIT["bfloat16"])
            assert_near(logits, want @ model.lm_head.weight.double().T, tolerance.UNIT["bfloat16"])
            found.append(logits)
    same(found[1:], found[:-1])


def test_sizes_in_turn() -> None:
    """Words that blocks leave for each other are told from those of a use by other layers before."""
    models = [built(layers, inner) for layers, inner in ((1, 3072), (1, 256), (2, 3072), (1, 512), (3, 256))]
    rows = drawn(20)
    for i in range(100):
        model = models[(i * i + i // 5) % len(models)]
        check(model, begun(model), rows[i % 20])


def test_a_long_text() -> None:
    """20000 tokens that add nothing: nothing adds up but roundings of the state, one a token."""
    n, model = 20_000, built(1, 256)
    (layer,), states = model.layers, begun(model)
    layer.token_mixer.log_decay.fill_(-1e-5)
    old = states[0].kv[0].double()
    x = torch.zeros_like(drawn()[0])
    for _ in range(n):
        persistent.step(model._layers(), states, x)
    turn = n * layer.token_mixer.lrpe.theta.double().view(8, 128, 1)
    c, s = (math.exp(-1e-5 * n) * part for part in old.split(128, 1))
    want = torch.cat([c * turn.cos() - s * turn.sin(), s * turn.cos() + c * turn.sin()], 1)
    # roundings know little of each other; constants that were rounded to float32 would be off by n of them
    room = 8 * math.sqrt(n) * tolerance.UNIT["float32"]
    assert (states[0].kv[0].double() - want).norm() <= room * want.norm()
    assert int(states[0].length) == 1000 + n


def walked(model: Any, rows: Any, states: Any = None) -> tuple[Any, Any]:
    states = begun(model) if states is None else states
    how = {"graphs": model.graphs, "one_kernel": True}
    return torch.stack([decoding.last(model._layers(), states, x, **how) for x in rows]), states


def test_no_race() -> None:
    model, rows = built(24), drawn(100)
    want, states = walked(model, rows)
    for _ in range(10):
        got, others = walked(model, rows)
        same([got, *(state.kv for state in others)], [want, *(state.kv for state in states)])
    # replayed without a pause, and while other work is on the device
    replayed, x = begun(model), rows[0].clone()
    graph, y = captured(lambda: decoding.last(model._layers(), replayed, x, graphs=False, one_kernel=True))
    for state, first in zip(replayed, begun(model), strict=True):
        state.kv.copy_(first.kv)
    side, busy, out = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda"), torch.empty_like(want)
    for i, row in enumerate(rows):
        with torch.cuda.stream(side):
            busy = (busy @ busy).tanh()
        x.copy_(row)
        graph.replay()
        out[i] = y
    torch.cuda.synchronize()
    same([out], [want])


def test_graphs_have_the_bits_of_steps_without() -> None:
    model, rows = built(4), drawn(12)
    want, states = walked(model, rows)
    model.graphs = True
    got, others = walked(model, rows)
    recorded = [x for x in replay.of(model.layers[0]).found.values() if isinstance(x, replay.Recording)]
    assert len(recorded) == 1 and recorded[0].kept[1] is not None
    same([got], [want])
    for mine, other in zip(others, states, strict=True):
        same([mine.kv, mine.length], [other.kv, other.length])


def test_two_models_at_once() -> None:
    """Each waits until the other has left the device, whatever is in between."""
    models, rows = [built(3, seed=1), built(5, 512, seed=2)], drawn(200)
    want = [walked(model, rows)[0] for model in models]
    streams, states = [torch.cuda.Stream() for _ in models], [begun(model) for model in models]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got: list[Any] = [[], []]
    for x in rows:
        for i, model in enumerate(models):
            with torch.cuda.stream(streams[i]):
                got[i].append(decoding.last(model._layers(), states[i], x, graphs=i == 0, one_kernel=True))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    same([torch.stack(parts) for parts in got], want)


def test_two_models_in_branches_of_a_graph() -> None:
    """Neither begins with a part of its blocks while the other has the rest."""
    models, rows = [built(2, seed=seed) for seed in (0, 1)], drawn(2)
    states, want = [begun(model) for model in models], []
    for model, x in zip(models, rows, strict=True):
        want.append(persistent.step(model._layers(), begun(model), x))
    streams, graph, got = [torch.cuda.Stream() for _ in models], torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        origin = torch.cuda.current_stream()
        for i, model in enumerate(models):
            streams[i].wait_stream(origin)
            with torch.cuda.stream(streams[i]):
                got.append(persistent.step(model._layers(), states[i], rows[i]))
        for stream in streams:
            origin.wait_stream(stream)
    for _ in range(200):
        for model, of_model in zip(models, states, strict=True):
            for state, first in zip(of_model, begun(model), strict=True):
                state.kv.copy_(first.kv)
        graph.replay()
        same(got, want)


def test_nothing_waits_for_the_gpu() -> None:
    model, rows = built(2, 512), drawn(5)
    walked(model, rows)
    with without_waiting():
        walked(model, rows)


def test_a_nan_is_no_deadlock() -> None:
    model, x = built(2, 512), drawn()[0]
    x[0, 5] = math.nan
    got = persistent.step(model._layers(), begun(model), x)
    assert got is not None and bool(got.isnan().all())
    x[0, 5] = math.inf
    got = persistent.step(model._layers(), begun(model), x)
    assert got is not None and bool(got.isnan().all())


def test_models_generate_with_it() -> None:
    """Against the plain modules: as near to the formulas as five kernels a layer are, or nearer."""
    model, ids = built(4), torch.randint(0, 64, (1, 24), device="cuda")

    def run() -> Any:
        states = model.initial_states(1)
        return torch.stack([model.step(ids[:, i], states) for i in range(24)], 1)

    launched = mock.Mock(wraps=persistent._kernel().launch)
    with mock.patch.object(persistent._kernel(), "launch", launched):
        got = run()
        assert launched.call_count == 24
        model.one_kernel = False
        five = run()
        fuse(model, False)
        plain = run()
    assert launched.call_count == 24
    want = model.double()(ids)
    off = [float((y.double() - want).norm()) for y in (got, five, plain)]
    assert off[0] <= max(off[1:]), off


def others(model: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    """Layers, states and rows that it does not take."""
    layers, states, x = model._layers(), begun(model), drawn()[0]
    yield "two rows", layers, model.initial_states(2), torch.cat([x, x])
    yield "half precision", [layer.half() for layer in built(2, 512)._layers()], states, x.half()
    yield "a state twice", [layers[1], layers[1]], [states[1], states[1]], x
    wide = begun(model)
    wide[0].kv = torch.cat([wide[0].kv, wide[0].kv], 3)[..., ::2]
    yield "a state with gaps", layers, wide, x
    narrow = built(2, 640)
    yield "another inner width", narrow._layers(), begun(narrow), x
    hooked = built(2, 512)
    hooked.layers[0].channel_mixer.l1.register_forward_hook(lambda module, given, out: out)
    yield "a hook", hooked._layers(), begun(hooked), x
    turned = built(2, 512)
    turned.layers[0].token_mixer.lrpe.forward = turned.layers[0].token_mixer.lrpe.forward
    yield "angles of somebody's own", turned._layers(), begun(turned), x


def test_what_it_does_not_take() -> None:
    seen = []
    for name, layers, states, x in others(built(2, 512)):
        assert persistent.step(layers, states, x) is None, name
        seen.append(name)
    assert len(seen) == 7
    model = built(2, 512)
    with linattn.use_backend("triton"):
        assert persistent.step(model._layers(), begun(model), drawn()[0]) is None
