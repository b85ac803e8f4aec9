"""Steps as graphs: when one is recorded and used again, and what makes it another one."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import linattn
from linattn.models import TransNormerLM, decoding, parts, replay
from linattn.models.transnormer import TransNormerConfig as Released
from linattn.models.transnormer import TransNormerForCausalLM
from linattn.models.transnormer_lm import TransNormerLayer
from linattn.nn import SimpleRMSNorm
from tests.models.stepping import Kernels, walked


class Graph:
    """Does what was recorded again, on the numbers that are there now."""

    def __init__(self, work: Any, given: Any) -> None:
        self.work, self.given, self.result, self.count = work, given, torch.empty(0), 0

    def replay(self) -> None:
        self.count += 1
        self.result.copy_(self.work(self.given))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Every graph that is recorded, on a machine that cannot."""
    made: list[Graph] = []

    def recorded(work: Any, x: Any, kept: Any) -> replay.Recording:
        graph = Graph(work, torch.empty_like(x))
        graph.result = torch.empty_like(x)
        made.append(graph)
        return replay.Recording(graph, graph.given, kept)

    monkeypatch.setattr(replay, "recorded", recorded)
    monkeypatch.setattr(replay, "possible", lambda x: True)
    return made


def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_the_third_time_is_a_graph(graphs: list[Graph]) -> None:
    replays, x = replay.Replays(), torch.ones(3)
    assert [replays("a", x, twice) for _ in range(replay.AFTER)] == [None] * replay.AFTER
    assert not graphs
    first, second = replays("a", x, twice), replays("a", 5 * x, twice)
    assert first is not None and second is not None
    assert first.tolist() == [2] * 3 and second.tolist() == [10] * 3  # the first is nobody else's memory
    assert len(graphs) == 1 and graphs[0].count == 2
    assert replays("b", x, twice) is None


def test_the_graph_that_was_not_asked_for_longest_goes(graphs: list[Graph]) -> None:
    replays, x = replay.Replays(), torch.ones(3)
    for name in range(replay.MOST):
        for _ in range(replay.AFTER + 1):
            replays(name, x, twice)
    replays(0, x, twice)
    replays("one more", x, twice)
    assert len(replays.found) == replay.MOST
    assert replays(0, x, twice) is not None
    assert replays(1, x, twice) is None


def test_what_cannot_be_recorded_runs_as_usual(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(replay, "recorded", lambda *given: tried.append(given))
    replays = replay.Replays()
    assert [replays("a", torch.ones(3), twice) for _ in range(9)] == [None] * 9
    assert len(tried) == 1


def test_graphs_go_with_what_they_are_of(graphs: list[Graph]) -> None:
    owner, kept = nn.Linear(2, 2), torch.ones(1)
    assert replay.of(owner) is replay.of(owner)
    for _ in range(replay.AFTER + 1):
        replay.of(owner)("a", torch.ones(3), twice, kept)
    watch, held = weakref.ref(replay.of(owner)), weakref.ref(kept)
    del kept
    assert held() is not None  # as long as the graph reads it
    other = copy.deepcopy(owner)
    assert replay.of(other) is not replay.of(owner)
    del owner
    graphs.clear()
    gc.collect()
    assert watch() is None and held() is None


def test_several_threads_at_once(graphs: list[Graph]) -> None:
    replays, wrong = replay.Replays(), []

    def ask(number: int) -> None:
        for i in range(200):
            y = replays(number, torch.full((3,), float(i)), twice)
            if y is not None and y.tolist() != [2.0 * i] * 3:
                wrong.append((number, i))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(replay.MOST)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(graphs) == replay.MOST


@pytest.mark.parametrize("batch", [1, 5])
def test_steps_by_a_graph_are_those_without(
    model: TransNormerLM,
    kernels: Kernels,
    graphs: list[Graph],
    batch: int,
) -> None:
    ids = torch.randint(0, 40, (batch, 12), generator=torch.Generator().manual_seed(1))
    model.graphs = False
    want, others = walked(model, ids)
    assert not graphs
    model.graphs = True
    got, states = walked(model, ids)
    assert [graph.count for graph in graphs] == [12 - replay.AFTER]
    assert torch.equal(got, want)
    for mine, other in zip(states, others, strict=True):
        assert torch.equal(mine.kv, other.kv) and torch.equal(mine.length, other.length)


def test_where_modules_have_to_run_there_is_no_graph(
    model: TransNormerLM,
    kernels: Kernels,
    graphs: list[Graph],
) -> None:
    ids = torch.zeros(1, 9, dtype=torch.int64)
    seen: list[Any] = []
    for part in (model.layers[1].norm, model.layers[1].channel_mixer.l2, model.layers[0].token_mixer.lrpe):
        handle = part.register_forward_hook(lambda *given: seen.append(given))
        walked(model, ids)
        assert len(seen) >= 9 and not graphs
        seen.clear()
        handle.remove()
    model.layers[1].norm.fused = False
    walked(model, ids)
    assert not graphs
    model.layers[1].norm.fused = True
    walked(model, ids)
    assert len(graphs) == 1
    model.layers[1].channel_mixer.l2.register_forward_hook(lambda *given: seen.append(given))
    _, states = walked(model, ids)  # perhaps states where the others were
    assert len(seen) == 9 and int(states[0].length) == 9


def test_what_is_made_anew_or_replaced_leaves_no_graph(model: TransNormerLM, kernels: Kernels) -> None:
    layers, states = model._layers(), model.initial_states(2)
    x = torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        for name in ("options", "split", "decays"):
            mixer = layers[1].token_mixer
            setattr(mixer, name, getattr(mixer, name))
            assert parts.facts_of(layers, states, x) is None
            delattr(mixer, name)
        assert parts.facts_of(layers, states, x) is not None
        mixer.lrpe = lambda: None  # no module
        assert parts.facts_of(layers, states, x) is None
        mixer.lrpe = None
        assert parts.facts_of(layers, states, x) is not None
        lrpe = layers[0].token_mixer.lrpe
        theta = lrpe._parameters.pop("theta")
        lrpe.theta = theta.detach()  # no parameter
        assert parts.facts_of(layers, states, x) is None
        del lrpe.theta
        lrpe.theta = theta
        assert parts.facts_of(layers, states, x) is not None
        assert parts.facts_of(layers, states, x.float()) is None  # the table of a layer is still float64
        assert parts.facts_of(layers, states[:2], x) is None
        states[1].length = states[1].length.numpy()  # the call says so
        assert parts.facts_of(layers, states, x) is None


def test_eps_of_any_kind(model: TransNormerLM, kernels: Kernels, graphs: list[Graph]) -> None:
    eps: Any = torch.tensor(1e-6, dtype=torch.float64)
    model.layers[0].norm.eps = eps
    states, token = model.initial_states(1), torch.zeros(1, dtype=torch.int64)
    for _ in range(4):
        model.step(token, states)
    x = torch.randn(1, 32, dtype=torch.float64)
    with torch.no_grad():
        before = parts.facts_of(model._layers(), states, x)
        eps.fill_(10.0)
        assert before is not None and before[0] != parts.facts_of(model._layers(), states, x)[0]
    got = model.step(token, states)
    model.graphs = False
    states = model.initial_states(1)
    eps.fill_(1e-6)
    for _ in range(4):
        model.step(token, states)
    eps.fill_(10.0)
    assert torch.equal(got, model.step(token, states)) and len(graphs) == 1


def test_a_graph_has_the_decays_of_its_facts_and_keeps_them(
    model: TransNormerLM, kernels: Kernels, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    states, layers, x = model.initial_states(1), model._layers(), torch.randn(1, 32, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(4):
            decoding.last(layers, states, x)
        seen = []
        monkeypatch.setattr(decoding, "steps", lambda *given: seen.append(given) or iter([x]))
        graphs[0].work(x)
    (recording,) = replay.of(layers[0]).found.values()
    assert isinstance(recording, replay.Recording)
    decays, exchange = recording.kept
    assert seen[0][3] is decays and exchange is None
    assert [one.shape for one in decays] == [(3,)] * 3


def test_no_layers(model: TransNormerLM, kernels: Kernels, graphs: list[Graph]) -> None:
    model.layers = model.layers[:0]
    assert model.step(torch.zeros(2, dtype=torch.int64), []).shape == (2, 40)


@pytest.mark.parametrize("watch", ["hook", "autocast", "gradients"])
def test_a_graph_is_not_asked_where_modules_have_to_run(
    model: TransNormerLM, kernels: Kernels, graphs: list[Graph], watch: str
) -> None:
    x, layers, states = torch.randn(1, 32, dtype=torch.float64), model._layers(), model.initial_states(1)
    with torch.no_grad():
        for _ in range(4):
            decoding.last(layers, states, x)
    (graph,) = graphs
    before = graph.count
    handle = register_module_forward_hook(lambda *given: None) if watch == "hook" else None
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=watch == "autocast"),
        torch.set_grad_enabled(False),
    ):
        if watch == "gradients":
            with torch.enable_grad(), pytest.raises(linattn.errors.GradientError):
                decoding.last(layers, states, x)
        else:
            decoding.last(layers, states, x)
    if handle is not None:
        handle.remove()
    assert graph.count == before
    with torch.no_grad():
        decoding.last(layers, states, x)
    assert graph.count == before + 1


def test_autograd_learns_of_states_that_a_graph_wrote(
    model: TransNormerLM, kernels: Kernels, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "replay", lambda self: self.result.zero_())  # writes past torch, as kernels do
    ids = torch.tensor([[1, 2, 3]])
    _, states = walked(model, ids[:, :1].expand(1, 5))
    out: Any = model(ids, states=states)
    before = [part._version for state in states for part in (state.kv, state.length)]
    model.step(ids[:, 0], states)
    assert len(graphs) == 1
    after = [part._version for state in states for part in (state.kv, state.length)]
    assert all(new > old for new, old in zip(after, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_released_model_says_whether_there_are_graphs(kernels: Kernels, graphs: list[Graph]) -> None:
    config = Released(
        vocab_size=40, decoder_embed_dim=32, hidden_dim=48, decoder_attention_heads=3, decoder_layers=3,
        glu_dim=64, linear_use_lrpe_list=[1, 0, 1],
    )  # fmt: skip
    model = TransNormerForCausalLM(config).double().eval()
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    assert model.graphs and model.model.graphs
    for on, each, count in ((False, False, 0), (True, True, 0), (True, False, 1)):
        model.graphs = on
        with torch.no_grad():
            cache = model(ids[:, :2], use_cache=True).past_key_values
            for i in range(2, 9):
                out = model(ids[:, i : i + 1], past_key_values=cache, output_hidden_states=each)
                assert (out.hidden_states is not None) == each
        assert len(graphs) == count, (on, each)


def test_only_backends_whose_steps_can_be_recorded() -> None:
    x: Any = SimpleNamespace(is_cuda=True, device="cuda:1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert replay.possible(x)
        with linattn.use_backend("torch"):
            assert replay.possible(x)
        with linattn.use_backend(["reference", "torch"]):
            assert not replay.possible(x)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # somebody else's
        assert not replay.possible(x)
    assert not replay.possible(torch.ones(1))


class Other(TransNormerLayer):
    """A layer of somebody's own."""

    def step(self, x: Any, state: Any) -> Any:
        return super().step(x, state) + 1


def test_a_layer_of_ones_own_leaves_no_graph(
    model: TransNormerLM,
    kernels: Kernels,
    graphs: list[Graph],
) -> None:
    model.layers[1].__class__ = Other
    ids = torch.zeros(1, 6, dtype=torch.int64)
    got, _ = walked(model, ids)
    for part in model.modules():
        if isinstance(part, SimpleRMSNorm):
            part.fused = False
    want, _ = walked(model, ids)
    assert not graphs and torch.allclose(got, want)
