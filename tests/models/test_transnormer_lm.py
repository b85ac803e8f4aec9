"""TransNormerLM against its formulas written out pair by pair, and against the released code's failures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from linattn.errors import (
    ArgumentTypeError,
    CheckpointError,
    DtypeError,
    OptionError,
    ShapeError,
    StateError,
    ValueRangeError,
)
from linattn.models import PRESETS, TransNormerConfig, TransNormerLM
from linattn.models.transnormer import TransNormerConfig as ForTransformers

BASE = TransNormerConfig(
    vocab_size=11,
    embed_dim=8,
    hidden_dim=12,
    num_heads=3,
    num_layers=3,
    glu_dim=10,
    linear_use_lrpe_list=(1, 0, 1),
)
CONFIGS = {
    "released": BASE,
    "paper": dataclasses.replace(BASE, decay_schedule="paper", num_heads=4),
    "one layer": dataclasses.replace(BASE, num_layers=1, linear_use_lrpe_list=(1,)),
    "no lrpe": dataclasses.replace(BASE, linear_use_lrpe_list=()),
    "square": dataclasses.replace(BASE, hidden_dim=8, num_heads=2, no_scale_embedding=True),
}


def alibi(heads):
    below = 2 ** int(np.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
    return slopes if below == heads else slopes + alibi(2 * below)[0::2][: heads - below]


def restated(config, weights, ids):
    """The logits of one text, [n, vocab]: the formulas as they are published, in float64, pair by pair."""

    def norm(x):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)

    def silu(x):
        return x / (1 + np.exp(-x))

    n, layers, heads = len(ids), config.num_layers, config.num_heads
    lag = np.arange(n)[:, None] - np.arange(n)
    x = weights["embed_tokens.weight"][ids] * (
        1.0 if config.no_scale_embedding else np.sqrt(config.embed_dim)
    )
    for layer in range(layers):
        name = f"layers.{layer}."
        q, k, v, u = np.split(norm(x) @ weights[name + "token_mixer.qkvu_proj.weight"].T, 4, -1)
        q, k = silu(q), silu(k)
        out = np.zeros_like(v)
        for h in range(heads):
            d = config.hidden_dim // heads
            part = slice(h * d, (h + 1) * d)
            if config.decay_schedule == "paper":
                slope = 8.0 * (h + 1) / heads * (1 - layer / layers)
            else:
                slope = alibi(heads)[h] * ((1 - layer / (layers - 1) if layers > 1 else 1.0) + 1e-5)
            theta = weights[name + "token_mixer.lrpe.theta"][h, 0] if config.uses_lrpe(layer) else np.zeros(d)
            for t in range(n):
                for s in range(t + 1):
                    pair = np.sum(q[t, part] * k[s, part] * np.cos(theta * (t - s)))
                    out[t, part] += np.exp(-slope * lag[t, s]) * pair * v[s, part]
        x = x + (u * norm(out)) @ weights[name + "token_mixer.out_proj.weight"].T
        y = norm(x)
        one, two, three = (weights[f"{name}channel_mixer.l{i}.weight"].T for i in (1, 2, 3))
        x = x + ((y @ one) * (y @ two)) @ three
    return norm(x) @ weights["lm_head.weight"].T


def close(got, want):
    """Equal up to rounding: some hundred additions in a row per layer, of numbers up to the largest logit."""
    allowed = 1000 * np.finfo(np.float64).eps * max(1.0, abs(want).max())
    got = got.numpy()
    assert got.shape == want.shape and got.dtype == np.float64
    assert abs(want).max() > 0.1
    assert (abs(got - want) <= allowed).all(), f"{abs(got - want).max():.3e} > {allowed:.3e}"


def make(config):
    torch.manual_seed(0)
    model = TransNormerLM(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if name.endswith("theta") else 0.5)  # the head starts at 0: draw it too
    return model, {name: x.numpy() for name, x in model.state_dict().items()}


def text(rows, n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 11, (rows, n)))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_the_formulas(config):
    model, weights = make(config)
    ids = text(2, 13)
    want = np.stack([restated(config, weights, row) for row in ids.numpy()])
    close(model(ids), want)
    # in one go, in pieces of several tokens (one of them single), and token by token, on one module
    head, states = model(ids[:, :5], return_states=True)
    middle, states = model(ids[:, 5:6], states, return_states=True)
    more, states = model(ids[:, 6:9], states, return_states=True)
    tail = torch.stack([model.step(ids[:, t], states) for t in range(9, 13)], 1)
    close(torch.cat([head, middle, more, tail], 1), want)
    states = model.initial_states(2)
    close(torch.stack([model.step(ids[:, t], states) for t in range(13)], 1), want)


def test_a_second_text_on_the_same_module_starts_afresh():
    model, weights = make(BASE)
    for seed in (1, 2):
        ids = text(1, 8, seed)
        want = restated(BASE, weights, ids[0].numpy())
        head, states = model(ids[:, :6], return_states=True)
        tail = [model.step(ids[:, t], states) for t in (6, 7)]
        close(torch.cat([head[0], torch.cat(tail)]), want)


def test_given_states_are_not_changed():
    model, _ = make(BASE)
    _, states = model(text(1, 5), return_states=True)
    before = [state.clone() for state in states]
    model(text(1, 5), states, return_states=True)
    assert all(torch.equal(a.kv, b.kv) for a, b in zip(states, before, strict=True))


def test_packed_texts_are_separate_texts():
    model, weights = make(BASE)
    texts = [text(1, n, seed=n)[0] for n in (4, 0, 7, 1)]
    borders = torch.tensor([0, 4, 4, 11, 12])
    logits, states = model(torch.cat(texts)[None], cu_seqlens=borders, return_states=True)
    want = np.concatenate([restated(BASE, weights, ids.numpy()) for ids in texts])
    close(logits[0], want)
    more = text(4, 3, seed=9)
    follow, _ = model(more, states, return_states=True)
    for row, ids in enumerate(texts):
        whole = restated(BASE, weights, torch.cat([ids, more[row]]).numpy())
        close(follow[row], whole[len(ids) :])


def test_right_padding_does_not_touch_the_state():
    model, weights = make(BASE)
    lengths, ids, more = torch.tensor([4, 9]), text(2, 9), text(2, 2, seed=5)
    logits, states = model(ids, lengths=lengths, return_states=True)
    steps = torch.stack([model.step(more[:, t], states) for t in range(2)], 1)
    for row, length in enumerate(lengths.tolist()):
        whole = restated(BASE, weights, torch.cat([ids[row, :length], more[row]]).numpy())
        close(torch.cat([logits[row, :length], steps[row]]), whole)


def test_left_padding_is_exact():
    model, weights = make(BASE)
    ids = text(2, 9)
    mask = torch.arange(9) >= torch.tensor([[5], [0]])
    logits, states = model(ids, key_mask=mask, return_states=True)
    step = model.step(torch.tensor([3, 3]), states)
    whole = restated(BASE, weights, np.append(ids[0, 5:].numpy(), 3))
    close(torch.cat([logits[0, 5:], step[:1]]), whole)


def test_state_dict_names():
    names = {"embed_tokens.weight", "lm_head.weight"}
    for layer in range(3):
        names |= {f"layers.{layer}.token_mixer.{part}.weight" for part in ("qkvu_proj", "out_proj")}
        names |= {f"layers.{layer}.channel_mixer.{part}.weight" for part in ("l1", "l2", "l3")}
    names |= {f"layers.{layer}.token_mixer.lrpe.theta" for layer in (0, 2)}
    state = TransNormerLM(BASE).state_dict()
    assert set(state) == names
    assert state["layers.0.token_mixer.lrpe.theta"].shape == (3, 1, 4)
    assert state["layers.1.token_mixer.qkvu_proj.weight"].shape == (48, 8)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built(name):
    with torch.device("meta"):
        model = TransNormerLM(PRESETS[name])
    assert model.config.vocab_size == 256


def test_bfloat16_keeps_float32_states():
    model = make(BASE)[0].to(torch.bfloat16)
    ids = text(1, 6)
    logits, states = model(ids, return_states=True)
    assert logits.dtype == torch.bfloat16
    assert all(state.kv.dtype == torch.float32 for state in states)
    assert model.step(ids[:, 0], states).dtype == torch.bfloat16
    assert [state.length.tolist() for state in states] == [[7]] * 3


def test_bad_ids_and_states():
    model, _ = make(BASE)
    for ids, error, sentence in (
        (torch.tensor([[0, 11]]), ValueRangeError, "ids must lie in 0 … 10, got 11"),
        (torch.tensor([[-1, 3]]), ValueRangeError, "got -1"),
        (torch.tensor([[0.5]]), DtypeError, "ids must be int64 or int32, got float32"),
        (torch.tensor([1]), ShapeError, r"ids must have shape \[b, n\], got \(1,\)"),
        ([[1]], ArgumentTypeError, "ids must be a tensor, got list"),
    ):
        with pytest.raises(error, match=sentence):
            model(ids)
    with pytest.raises(ShapeError, match=r"ids must have shape \[b\]"):
        model.step(torch.tensor([[1]]), model.initial_states(1))
    with pytest.raises(StateError, match="one State for each of 3 layers, got 2"):
        model(text(1, 3), model.initial_states(1)[:2])
    assert model(torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 11)


BAD_CONFIGS = [
    ({"num_heads": 5}, OptionError, "num_heads must divide hidden_dim"),
    ({"num_layers": 0}, ValueRangeError, "num_layers must be an int of at least 1, got 0"),
    ({"embed_dim": "8"}, ValueRangeError, "embed_dim must be an int"),
    ({"decay_schedule": "other"}, OptionError, "decay_schedule must be one of paper, released"),
    ({"linear_use_lrpe_list": (1, 0)}, OptionError, "a 0 or 1 for each of 3 layers"),
    ({"linear_use_lrpe_list": (1, 2, 0)}, OptionError, "a 0 or 1 for each of 3 layers"),
]


@pytest.mark.parametrize(("change", "error", "sentence"), BAD_CONFIGS, ids=[row[2] for row in BAD_CONFIGS])
def test_bad_configurations(change, error, sentence):
    with pytest.raises(error, match=sentence):
        dataclasses.replace(BASE, **change)
    with pytest.raises(CheckpointError, match=sentence):
        TransNormerConfig.from_dict(dataclasses.asdict(BASE) | change)


def test_configurations_survive_json():
    older = dataclasses.asdict(BASE) | {"linear_use_lrpe_list": [1, 0, 1]}  # under this library's own names
    assert TransNormerConfig.from_dict(BASE.to_dict()) == TransNormerConfig.from_dict(older) == BASE
    with pytest.raises(CheckpointError, match="unknown fields: depth"):
        TransNormerConfig.from_dict(older | {"depth": 3})
    with pytest.raises(CheckpointError, match="must be a list, got 5"):
        TransNormerConfig.from_dict(BASE.to_dict() | {"linear_use_lrpe_list": 5})


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_smallest_vocabularies_are_read_again(tokens):
    config = dataclasses.replace(BASE, vocab_size=tokens)
    fields = config.to_dict()
    assert TransNormerConfig.from_dict(fields) == config == ForTransformers.from_dict(fields).parts()
    assert ("eos_token_id" in fields) == (tokens < 3)
