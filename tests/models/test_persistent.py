"""Which steps are one kernel's, and what it is told, on a machine that has none."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import linattn
from linattn import registry
from linattn.backends.cupy import persistent as kernel
from linattn.models import TransNormerConfig, TransNormerLM, decoding, persistent, replay
from linattn.models.transnormer import TransNormerConfig as Released
from linattn.models.transnormer import TransNormerForCausalLM, TransNormerModel
from tests.models.stepping import Kernels
from tests.models.test_rounded_decays import on_a_gpu

EXCHANGE = torch.zeros(1)


def launch(x: Any, y: Any, layers: Any, feature_map: Any, exchange: Any, end: Any) -> None:
    """The kernel's contract in torch, for silu."""
    assert feature_map == "silu"
    row = x.double()

    def normed(z: Any, eps: float) -> Any:
        return z * torch.rsqrt(z.square().mean() + eps)

    for one in layers:
        wide = {name: getattr(one, name).double() for name in ("qkvu", "out", "l1", "l2", "l3", "log_decay")}
        q, k, v, u = (normed(row, one.eps) @ wide["qkvu"].T).chunk(4, -1)
        q, k = (nn.functional.silu(z).view(8, 128, 1) for z in (q, k))
        decay, kv = wide["log_decay"].exp()[:, None, None], one.kv[0].double()
        if one.theta is None:
            new = decay * kv
        else:
            turn = one.theta.double().view(8, 128, 1)
            c, s = kv.chunk(2, 1)
            new = decay * torch.cat([c * turn.cos() - s * turn.sin(), s * turn.cos() + c * turn.sin()], 1)
        new[:, :128] += k * v.view(8, 1, 128)
        one.kv.copy_(new)
        one.length.add_(1)
        o = (q * new[:, :128]).sum(1).view(1, 1024)
        row = row + (normed(o, one.gate_eps) * u) @ wide["out"].T
        z = normed(row, one.eps)
        row = row + ((z @ wide["l1"].T) * (z @ wide["l2"].T)) @ wide["l3"].T
    if end is not None:
        row = normed(row, end.eps)
        end.logits.copy_(row @ end.head.double().T)
    y[:, :1024].copy_(row)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> list[Any]:
    return faked(monkeypatch)


def faked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernel is told from now on, each time."""
    seen: list[Any] = []

    def told(*given: Any) -> None:
        seen.append(given)
        launch(*given)

    names = "refusal", "Layer", "End", "D", "WIDTH", "HEADS", "WIDEST", "room"
    fake = SimpleNamespace(launch=told, **{name: getattr(kernel, name) for name in names})
    fake.compiles = lambda feature_map, inner, index: True
    monkeypatch.setattr(persistent, "_kernel", lambda: fake)
    monkeypatch.setattr(persistent, "possible", lambda x: len(x) == 1)
    monkeypatch.setattr(persistent, "exchange_of", lambda layers, x: EXCHANGE)
    return seen


def built(inner: int = 256, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"embed_dim": 1024, "hidden_dim": 1024, "num_heads": 8, "num_layers": 2, "glu_dim": inner}
    config = TransNormerConfig(vocab_size=8, linear_use_lrpe_list=(1, 0), **sizes | more)
    return TransNormerLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def one() -> Any:
    return built()


def rows(n: int = 5) -> Any:
    return torch.randn(n, 1, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()


last = partial(decoding.last, one_kernel=True)


def walked(model: Any, given: Any) -> tuple[Any, Any]:
    states = model.initial_states(1)
    with torch.no_grad():
        return torch.stack([last(model._layers(), states, x, graphs=False) for x in given]), states


def test_steps_are_those_of_the_modules(
    one: Any, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    got, states = walked(one, rows())
    assert len(launched) == 5
    for x, _, layers, _, exchange, end in launched:
        assert end is None
        assert x.shape == (1, 1024) and len(layers) == 2 and exchange is EXCHANGE
        assert [layer.theta is None for layer in layers] == [False, True]
    monkeypatch.setattr(persistent, "possible", lambda x: False)
    five, others = walked(one.double(), rows().double())
    assert len(launched) == 5
    assert (got.double() - five).abs().max() <= five.abs().max() / 64
    for mine, other in zip(states, others, strict=True):
        assert torch.equal(mine.length, other.length)
        assert (mine.kv.double() - other.kv).abs().max() <= 0.05 * other.kv.abs().max()


def test_widths_are_those_of_weights(one: Any, launched: list[Any]) -> None:
    """Not what modules were made with: the memory that blocks meet in has to have room for all of it."""
    wider = built(512)
    for layer, other in zip(one.layers, wider.layers, strict=True):
        for name in ("l1", "l2", "l3"):
            getattr(layer.channel_mixer, name).weight = getattr(other.channel_mixer, name).weight
    walked(one, rows(1))
    ((_, _, layers, *_),) = launched
    assert layers[0].l3.shape[1] == persistent._inner(one._layers(), rows()[0]) == 512


def test_rows_that_lie_apart(one: Any, launched: list[Any]) -> None:
    want, _ = walked(one, rows())
    apart = torch.stack([rows(), rows()], -1)[..., 0]
    got, _ = walked(one, apart)
    assert torch.equal(got, want)
    assert all(x.is_contiguous() and x.data_ptr() % 8 == 0 for x, *_ in launched)


def test_a_recorded_step_has_its_memory(
    one: Any, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    on_a_gpu(monkeypatch)  # decays are kept in float32
    monkeypatch.setattr(replay, "possible", lambda x: True)
    monkeypatch.setattr(replay, "recorded", lambda work, x, given: kept.append((work, given)))
    states = one.initial_states(1)
    with torch.no_grad():
        for x in rows():
            last(one._layers(), states, x)
    ((work, (decays, exchange)),) = kept
    assert exchange is EXCHANGE and [tuple(decay.shape) for decay in decays] == [(8,)] * 2
    monkeypatch.setattr(persistent, "exchange_of", lambda layers, x: pytest.fail("another memory"))
    with torch.no_grad():
        work(rows()[0])
    assert len(launched) == 6


def own_forward(model: Any) -> None:
    lrpe = model.layers[0].token_mixer.lrpe
    lrpe.forward = lrpe.forward


CHANGES = {
    "a hook": lambda model: model.layers[1].channel_mixer.l1.register_forward_hook(lambda *given: None),
    "angles of somebody's own": own_forward,
    "a seen angle": lambda model: model.layers[0].token_mixer.lrpe.register_forward_hook(lambda *given: None),
    "half angles": lambda model: setattr(
        model.layers[0].token_mixer.lrpe, "theta", nn.Parameter(torch.zeros(8, 1, 128, dtype=torch.bfloat16))
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*angles")
def test_layers_that_it_does_not_take(one: Any, launched: list[Any], change: str) -> None:
    CHANGES[change](one)
    walked(one, rows(1))
    assert not launched


@pytest.mark.parametrize("sizes", [{"inner": 320}, {"num_heads": 4}, {"hidden_dim": 2048}, {"inner": 3328}])
def test_sizes_that_it_does_not_take(launched: list[Any], sizes: dict[str, int]) -> None:
    walked(built(**sizes), rows(1))
    assert not launched


def test_states_that_it_does_not_take(one: Any, launched: list[Any]) -> None:
    layers, x = one._layers(), rows(1)[0]
    with torch.no_grad():
        shared = one.initial_states(1)[1]
        last([layers[1]] * 2, [shared] * 2, x)
        assert int(shared.length) == 2
        overlapping = one.initial_states(1)
        memory = torch.zeros(8 * 128 * 128 * 3)
        for state, first in zip(overlapping, (0, 8 * 128 * 128), strict=True):
            size = state.kv.numel()
            state.kv = memory[first : first + size].view(state.kv.shape)
        last(layers, overlapping, x)
        counted = one.initial_states(1)
        counted[1].length = counted[0].length
        last(layers, counted, x)
        assert int(counted[0].length) == 2
        apart = one.initial_states(1)
        apart[1].kv = torch.cat([apart[1].kv, apart[1].kv], 3)[..., ::2]
        last(layers, apart, x)
        assert not launched
        for wrong in (one.initial_states(2), one.initial_states(1)[::-1]):
            with pytest.raises(linattn.errors.StateError):
                last(layers, wrong, x)
        last(layers, one.initial_states(1), x)
    assert len(launched) == 1


def released(model: Any) -> Any:
    """The same weights in transformers' model."""
    config = Released(
        vocab_size=8, decoder_embed_dim=1024, hidden_dim=1024, decoder_attention_heads=8, decoder_layers=2,
        glu_dim=256, linear_use_lrpe_list=[1, 0],
    )  # fmt: skip
    found = TransNormerForCausalLM(config).to(torch.bfloat16).eval()
    weights = model.state_dict()
    found.load_state_dict({name: weights[name.removeprefix("model.")] for name in found.state_dict()})
    return found


def test_models_step_with_it_where_they_are_asked_to(one: Any, launched: list[Any]) -> None:
    """The same bits from both models; near those of the five kernels, which are a rounding more often off."""
    nn.init.normal_(one.lm_head.weight, std=1 / 32)
    of_transformers, seen = released(one), []
    for on in (False, True):
        one.one_kernel = of_transformers.one_kernel = on
        assert of_transformers.model.one_kernel == on
        with torch.no_grad():
            states = one.initial_states(1)
            token = torch.zeros(1, dtype=torch.int64)
            cache = of_transformers(token[None], use_cache=True).past_key_values
            _, states = one(token[None], return_states=True)
            for i in range(3):
                got = one.step(token + i, states)
                found = of_transformers(token[None] + i, past_key_values=cache, logits_to_keep=1)
                assert found.logits.shape == (1, 1, 8) and torch.equal(found.logits[:, 0], got)
                hidden = of_transformers.model(token[None] + i, past_key_values=copy.deepcopy(cache))
                assert hidden.last_hidden_state.shape == (1, 1, 1024)
                seen.append(got.double())
    assert len(launched) == 9
    assert [given[-1] is not None for given in launched] == [True, True, False] * 3
    plain, ours = torch.stack(seen[:3]), torch.stack(seen[3:])
    assert 0 < (plain - ours).abs().max() <= plain.abs().max() / 20


class Steered(TransNormerModel):
    """One's own rows."""

    def forward(self, *given: Any, **more: Any) -> Any:
        found = super().forward(*given, **more)
        found.last_hidden_state = -found.last_hidden_state
        return found


def steer(model: Any, given: Any, found: Any) -> Any:
    found.last_hidden_state = -found.last_hidden_state
    return found


class Around(nn.Module):
    """What passes calls on, and nothing else."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **more: Any) -> Any:
        return self.inner(*given, **more)


INNER = {
    "a hook": lambda model: model.model.register_forward_hook(steer),
    "a class of somebody's own": lambda model: setattr(model.model, "__class__", Steered),
    "a module around it": lambda model: setattr(model, "model", Around(model.model)),
}


@pytest.mark.parametrize("change", INNER)
def test_rows_that_somebody_changes_in_front_of_the_head(one: Any, launched: list[Any], change: str) -> None:
    nn.init.normal_(one.lm_head.weight, std=1 / 32)
    model, token, found = released(one), torch.zeros(1, 1, dtype=torch.int64), []
    inner = model.model
    INNER[change](model)
    for on in (False, True):
        inner.one_kernel = on
        with torch.no_grad():
            cache = model(token, use_cache=True).past_key_values
            found.append(model(token, past_key_values=cache).logits.double())
    assert len(launched) == 1 and launched[0][-1] is None
    assert (found[0] - found[1]).abs().max() <= found[0].abs().max() / 20


def test_a_compiler_follows_steps(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not where somebody asks for the backend, as on a GPU."""
    monkeypatch.setattr(persistent, "possible", lambda x: registry.requested("auto") == "auto")
    one.one_kernel, states = True, one.initial_states(1)
    step = torch.compile(one.step, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert step(torch.zeros(1, dtype=torch.int64), states).shape == (1, 8)


HEADS = {
    "a hook": lambda model: model.lm_head.register_forward_hook(lambda *given: None),
    "a bias": lambda model: setattr(model, "lm_head", nn.Linear(1024, 8).to(torch.bfloat16)),
    "a norm of somebody's own": lambda model: setattr(model, "norm", nn.Identity()),
    "a norm that is seen": lambda model: model.norm.register_forward_hook(lambda *given: None),
    "a norm of torch's operations": lambda model: setattr(model.norm, "fused", False),
}


@pytest.mark.parametrize("change", HEADS)
def test_ends_that_it_does_not_take(one: Any, launched: list[Any], change: str) -> None:
    """They are called behind the kernel."""
    HEADS[change](one)
    one.one_kernel = True
    with torch.no_grad():
        got = one.step(torch.zeros(1, dtype=torch.int64), one.initial_states(1))
    (given,) = launched
    assert got.shape == (1, 8) and given[-1] is None


def test_a_recorded_step_has_its_end(one: Any, launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(replay, "possible", lambda x: True)
    monkeypatch.setattr(replay, "recorded", lambda work, x, given: kept.append(work))
    one.one_kernel, states, token = True, one.initial_states(1), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(4):
            one.step(token, states)
        (work,) = kept
        y = work(rows()[0])
        assert y.shape == (1, 1024 + 8)
        one.norm.eps = 0.5  # another end is another graph
        for _ in range(3):
            one.step(token, states)
        assert len(kept) == 2
        monkeypatch.setattr(persistent, "step", lambda *given, **more: None)
        with pytest.raises(RuntimeError, match="does not take"):
            work(rows()[0])


def test_two_rows_and_gradients(one: Any, launched: list[Any]) -> None:
    with torch.no_grad():
        last(one._layers(), one.initial_states(2), torch.cat([*rows(2)]))
    with pytest.raises(linattn.errors.GradientError):
        last(one._layers(), one.initial_states(1), rows(1)[0])
    assert not launched


def test_where_there_is_no_gpu() -> None:
    x = rows(1)[0]
    assert not persistent.possible(x)
    with torch.no_grad():
        assert persistent.step(built()._layers(), built().initial_states(1), x) is None


def test_memory_is_of_a_stream_a_capture_and_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"stream": 5, "capture": 0}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: here["stream"], raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(persistent, "capture_of", lambda stream: here["capture"])
    monkeypatch.setattr(persistent, "_zeros", lambda size, device: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(persistent, "_exchanges", {})
    x, model, wide = SimpleNamespace(shape=(1, 1024), device=SimpleNamespace(index=0)), built(), built(512)

    def found(layers: Any, **changed: int) -> Any:
        here.update(changed)
        return persistent.exchange_of(layers._layers(), x)  # type: ignore[arg-type]

    first, other = found(model), found(wide)
    assert first.numel() == kernel.room(256) and other.numel() == kernel.room(512)
    assert found(model) is first and found(wide) is other
    elsewhere = found(model, stream=6)
    recorded = found(model, capture=1)
    again = found(model, capture=2)
    assert len({id(one) for one in (first, other, elsewhere, recorded, again)}) == 5
    assert found(model) is again and found(model, capture=0) is elsewhere
    assert sorted(key[1] for key in persistent._exchanges[0]) == [0, 0, 0, 2]  # what is over is its graph's
    assert found(built(320)) is None
    assert found(model, stream=persistent.PER_THREAD) is None


def test_sentences() -> None:
    assert kernel.refusal(1024, 8, 2816, 24) is None
    for sizes, words in (
        ((2048, 16, 5632, 24), "takes width 1024 with 8 heads, got 2048 with 16"),
        ((1024, 8, 2800, 24), "takes inner widths in multiples of 256 up to 3072, got 2800"),
        ((1024, 8, 2816, 41), "takes 1 to 40 layers, got 41"),
    ):
        assert kernel.refusal(*sizes) == words
