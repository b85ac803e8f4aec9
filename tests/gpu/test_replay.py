"""Steps as CUDA graphs: the bits of steps without, whatever happens to model, states and streams between."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from linattn import errors
from linattn.models import decoding, replay
from tests.gpu.calls import needs_two, same, without_waiting
from tests.gpu.test_steps import built, walked

pytestmark = pytest.mark.gpu

N = 12
DTYPES = (torch.bfloat16, torch.float16)


def drawn_ids(b: int, n: int = N) -> torch.Tensor:
    return torch.randint(0, 256, (b, n), generator=torch.Generator().manual_seed(b)).cuda()


def graphs_of(model: Any) -> list[replay.Recording]:
    return [x for x in replay.of(model.layers[0]).found.values() if isinstance(x, replay.Recording)]


def both(model: Any, run: Any) -> tuple[Any, Any]:
    """What run() gives with graphs, and without."""
    found = []
    for graphs in (True, False):
        model.graphs = graphs
        with torch.no_grad():
            found.append(run())
    return found[0], found[1]


@pytest.mark.parametrize("b", [1, 3, 5, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits(b: int, dtype: Any) -> None:
    model, ids = built(dtype), drawn_ids(b)
    (got, states), (want, others) = both(model, lambda: walked(model, ids))
    assert len(graphs_of(model)) == 1
    same([got], [want])
    for mine, other in zip(states, others, strict=True):
        same([mine.kv, mine.length], [other.kv, other.length])


@pytest.mark.parametrize("inference", [(True, True), (True, False), (False, True)])
def test_in_inference_mode_and_after_it(inference: tuple[bool, bool]) -> None:
    model, ids = built(torch.bfloat16), drawn_ids(2)

    def run() -> Any:
        with torch.no_grad():
            states = model.initial_states(2)
        out = []
        for i in range(N):
            with torch.inference_mode(inference[i > N // 2]), torch.no_grad():
                out.append(model.step(ids[:, i], states).clone())
        return torch.stack(out)

    got, want = both(model, run)
    assert len(graphs_of(model)) == len({*inference})
    same([got], [want])


def change_in_place(model: Any) -> None:
    for weight in model.parameters():
        weight.mul_(0.5)


def change_decays(model: Any) -> None:
    for layer in model.layers:
        layer.token_mixer.log_decay.mul_(2)


def change_modules(model: Any) -> None:
    for layer in model.layers:
        layer.channel_mixer.l3 = copy.deepcopy(layer.channel_mixer.l3)
        layer.channel_mixer.l3.weight.neg_()


def change_norms(model: Any) -> None:
    for layer in model.layers:
        layer.norm.eps = 0.5


def change_back_and_forth(model: Any) -> None:
    model.half()
    model.bfloat16()
    model.layers[1].token_mixer.out_proj.weight.zero_()


def hook(model: Any) -> None:
    model.layers[1].channel_mixer.l2.register_forward_hook(lambda part, given, out: 2 * out)


CHANGES = [change_in_place, change_decays, change_modules, change_norms, change_back_and_forth, hook]


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_a_model_that_changes_between_steps(change: Any) -> None:
    ids = drawn_ids(2)

    def run(model: Any) -> Any:
        states = model.initial_states(2)
        out = [model.step(ids[:, i], states) for i in range(N // 2)]
        change(model)
        return torch.stack(out + [model.step(ids[:, i], states) for i in range(N // 2, N)])

    found = []
    for graphs in (True, False):
        model = built(torch.bfloat16)
        model.graphs = graphs
        with torch.no_grad():
            found.append(run(model))
        assert bool(replay.of(model.layers[0]).found) == graphs
    same(found[:1], found[1:])
    assert not torch.equal(found[0][N // 2 - 1], found[0][N // 2])


def test_states_that_are_copied_picked_and_reset() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(3, 30)
    order = torch.tensor([2, 0, 0], device="cuda")

    def run() -> Any:
        states, out = model.initial_states(3), []
        for i in range(8):
            out.append(model.step(ids[:, i], states))
        twin = copy.deepcopy(states)
        torch.cuda.empty_cache()
        for i in range(8, 14):  # two texts in turn
            out.append(model.step(ids[:, i], states))
            out.append(model.step(ids[:, 29 - i], twin))
        for i in range(14, 24):  # beams
            states = [state.select(order) for state in states]
            out.append(model.step(ids[:, i], states))
        for state in twin:
            state.kv.zero_()
        out += [model.step(ids[:, i], twin) for i in range(24, 30)]
        return torch.stack(out)

    got, want = both(model, run)
    assert len(graphs_of(model)) >= 2
    same([got], [want])


def test_on_streams_of_ones_own_without_waiting() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(2, 40)
    with torch.no_grad():
        want, _ = walked(model, ids)
        model.graphs = True
        walked(model, ids[:, :1])  # what is compiled and made once
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        with without_waiting():
            states, out = model.initial_states(2), []
            for i, column in enumerate(ids.T):
                here, before = streams[i % 2], streams[1 - i % 2] if i else torch.cuda.current_stream()
                here.wait_stream(before)
                with torch.cuda.stream(here):
                    out.append(model.step(column, states))
        torch.cuda.synchronize()
    assert graphs_of(model)
    same([torch.stack(out, 1)], [want])


def test_several_threads() -> None:
    models = [built(torch.bfloat16, layers) for layers in (2, 3, 4)]
    ids, found = drawn_ids(2, 60), {}
    for number, model in enumerate(models):
        with torch.no_grad():
            found[number] = [walked(model, ids)[0]]
        model.graphs = True
    torch.cuda.synchronize()
    begin = threading.Barrier(len(models))

    def run(number: int) -> None:
        begin.wait()
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                found[number].append(walked(models[number], ids)[0])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        assert graphs_of(model)
    for want, *got in found.values():
        assert len(got) == 3
        same(got, [want] * 3)


def test_what_cannot_be_recorded_runs_as_before() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(2)
    with torch.no_grad():
        want, _ = walked(model, ids)
        model.graphs, steps = True, decoding.steps

        def looking(layers: Any, states: Any, x: Any, *rest: Any) -> Any:
            for y in steps(layers, states, x, *rest):
                float(y.sum())  # no graph can wait for the GPU
                yield y

        with mock.patch.object(decoding, "steps", looking):
            got, _ = walked(model, ids)
        assert not graphs_of(model)
        same([got], [want])
        torch.rand(1, device="cuda")
        assert not torch.cuda.is_current_stream_capturing()
        replay._owned.clear()
        got, _ = walked(model, ids)
        assert len(graphs_of(model)) == 1
        same([got], [want])


def test_a_pool_of_ones_own_gives_graphs_no_memory() -> None:
    """What a recording took from it, it would give to others as well."""
    model, ids = built(torch.bfloat16), drawn_ids(2)
    with torch.no_grad():
        want, _ = walked(model, ids)
        model.graphs, pool = True, torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            got, _ = walked(model, ids)
        same([got], [want])
        for recording in graphs_of(model):  # or there is none: an older torch asks the outer pool first
            at = recording.graph.result.data_ptr()
            held = {
                whose: any(0 <= at - part["address"] < part["total_size"] for part in segments.snapshot())
                for whose, segments in (("graph", recording.graph.pool), ("user", pool))
            }
            assert held == {"graph": True, "user": False}
        del got
        replay._owned.clear()
        got, _ = walked(model, ids)
        assert len(graphs_of(model)) == 1
        same([got], [want])


def test_random_numbers_of_other_threads() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(2)
    model.graphs, failed, done = True, [], threading.Event()

    def draw() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not done.is_set():
                try:
                    torch.rand(1, device="cuda")
                except RuntimeError as error:
                    failed.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    with torch.no_grad():
        for _ in range(20):
            replay._owned.clear()
            walked(model, ids[:, :4])
    done.set()
    thread.join()
    assert graphs_of(model) and not failed


def test_memory_of_graphs_goes_with_them() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(64)
    model.graphs, sizes, kept = True, [], []
    with torch.no_grad():
        for _ in range(5 * replay.MOST):
            kept.append(walked(model, ids[:, :4])[1])  # so that the next states lie elsewhere
            torch.cuda.synchronize()
            held = sum(
                x.numel() * x.element_size() for states in kept for s in states for x in (s.kv, s.length)
            )
            sizes.append(torch.cuda.memory_reserved() - held)
    assert len(graphs_of(model)) == replay.MOST
    # a graph has 2 MB at least; without giving back they would be 40 of them
    assert sizes[-1] - sizes[replay.MOST] < replay.MOST << 21


def test_autograd_learns_of_states_that_were_written() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(2)
    model.graphs = True
    with torch.no_grad():
        _, states = walked(model, ids)
    for by_graph in (True, False):
        model.graphs = by_graph
        with torch.enable_grad():
            out = model(ids, states=states)
        before = [state.kv._version for state in states]
        with torch.no_grad():
            model.step(ids[:, 0], states)
        assert [state.kv._version for state in states] == [version + 1 for version in before]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert len(graphs_of(model)) == 1


def test_states_of_inference_mode_are_refused_outside() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(2)
    model.graphs = True
    with torch.inference_mode():
        _, states = walked(model, ids)
    assert graphs_of(model)
    with torch.no_grad():
        for _ in range(5):
            with pytest.raises(errors.StateError, match="inference mode"):
                model.step(ids[:, 0], states)


def test_rows_that_are_said_to_lie_apart() -> None:
    model = built(torch.bfloat16)
    wide = torch.randn(1, 7, 128, device="cuda").bfloat16()

    def run() -> Any:
        states = model.initial_states(1)
        layers = model._layers()
        return torch.stack([
            decoding.last(layers, states, wide[:, i], graphs=model.graphs) for i in range(7)
        ])  # fmt: skip

    got, want = both(model, run)
    assert wide[:, 1].stride() != (128, 1) and len(graphs_of(model)) == 1
    same([got], [want])


def test_memory_goes_with_the_model() -> None:
    model, ids = built(torch.bfloat16), drawn_ids(2)
    model.graphs = True
    with torch.no_grad():
        walked(model, ids)
    assert graphs_of(model)
    twin = copy.deepcopy(model)
    assert not graphs_of(twin)
    before = torch.cuda.memory_allocated()
    size = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    del model
    gc.collect()
    assert before - torch.cuda.memory_allocated() >= size


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2,
                                     "do_sample": True}], ids=str)  # fmt: skip
def test_generate(options: dict[str, Any]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM

    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=256, decoder_embed_dim=128, hidden_dim=128, decoder_attention_heads=2, decoder_layers=3,
        glu_dim=384, linear_use_lrpe_list=[1, 0, 1], pad_token_id=0, eos_token_id=255,
    )  # fmt: skip
    model = TransNormerForCausalLM(config).cuda().bfloat16().eval()
    nn.init.normal_(model.lm_head.weight, std=0.1)
    ids = drawn_ids(2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def run() -> Any:
        torch.manual_seed(1)
        return model.generate(ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40, **options)

    got, want = both(model, run)
    assert graphs_of(model.model) or "num_beams" in options
    same([got], [want])


@needs_two
def test_on_another_device_than_the_current_one() -> None:
    model, ids = built(torch.bfloat16).to("cuda:1"), drawn_ids(3).to("cuda:1")
    (got, states), (want, others) = both(model, lambda: walked(model, ids))
    assert torch.cuda.current_device() == 0 and len(graphs_of(model)) == 1
    same([got], [want])
    for mine, other in zip(states, others, strict=True):
        same([mine.kv, mine.length], [other.kv, other.length])
