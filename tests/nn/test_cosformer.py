"""CosformerAttention against the paper's sum over pairs, and what the released module could not do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from linattn.errors import (
    ArgumentTypeError,
    DtypeError,
    LinattnError,
    OptionError,
    ShapeError,
    StateError,
    ValueRangeError,
)
from linattn.nn import CosformerAttention

RELEASED = {f"{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")} | {
    "out_proj.weight",
    "out_proj.bias",
}


def defined(module, query, key, value, eps=1e-6, max_len=None):
    """The paper's weights, pair by pair, in float64; arguments and result are [L, B, E]."""
    parameter = {name: x.detach().numpy() for name, x in module.state_dict().items()}
    heads = module.num_heads
    length, batch, width = query.shape
    d = width // heads
    m = max_len or max(length, key.shape[0])

    def project(name, x):
        return x @ parameter[f"{name}_proj.weight"].T + parameter[f"{name}_proj.bias"]

    def phi(x):
        return (
            np.maximum(x, 0.0)
            if module.feature_map == "relu"
            else np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))
        )

    q, k, v = phi(project("q", query)), phi(project("k", key)), project("v", value)
    out = np.zeros((length, batch, width))
    for b in range(batch):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for t in range(length):
                numerator, denominator = np.zeros(d), 0.0
                for s in range(t + 1 if module.causal else key.shape[0]):
                    weight = q[t, b, part] @ k[s, b, part] * math.cos(math.pi * (t - s) / (2 * m))
                    numerator += weight * v[s, b, part]
                    denominator += weight
                out[t, b, part] = numerator / max(denominator, eps)
    return project("out", out) if module.has_outproj else out


def close(got, want, terms):
    """Equal up to the rounding of `terms` float64 additions of numbers as large as the largest."""
    got = got.detach().numpy()
    assert got.shape == want.shape and got.dtype == np.float64
    assert np.isfinite(want).all()
    allowed = 4 * np.finfo(np.float64).eps * terms * max(1.0, abs(want).max())
    assert (abs(got - want) <= allowed).all(), f"{abs(got - want).max():.3e} > {allowed:.3e}"


def make(seed=0, **options):
    torch.manual_seed(seed)
    return CosformerAttention(12, 3, **options).double()


def noise(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("act_fun", ["relu", "elu"])
@pytest.mark.parametrize("has_outproj", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_is_the_papers_sum(causal, has_outproj, act_fun):
    module, x = make(causal=causal, has_outproj=has_outproj, act_fun=act_fun), noise(7, 2, 12)
    close(module(torch.from_numpy(x)), defined(module, x, x, x), terms=100)


@pytest.mark.parametrize(("length", "source"), [(4, 9), (9, 4), (1, 5)])
def test_cross_attention_takes_the_longer_length_for_its_cosine(length, source):
    module = make(kdim=10, vdim=8)
    query, key, value = noise(length, 2, 12), noise(source, 2, 10, seed=2), noise(source, 2, 8, seed=3)
    close(module(*map(torch.from_numpy, (query, key, value))), defined(module, query, key, value), terms=100)


def test_vdim_counts_without_kdim():
    module = make(vdim=8)
    assert module.v_proj.in_features == 8
    x, value = noise(5, 2, 12), noise(5, 2, 8, seed=2)
    close(module(torch.from_numpy(x), value=torch.from_numpy(value)), defined(module, x, x, value), terms=100)


def test_batch_first_only_moves_the_axes():
    module, x = make(causal=True, batch_first=True), noise(6, 2, 12)
    out = module(torch.from_numpy(x).transpose(0, 1))
    assert out.shape == (2, 6, 12)
    close(out.transpose(0, 1), defined(module, x, x, x), terms=100)


def test_a_small_denominator_is_clamped_not_shifted():
    # weights below eps: o = num / eps; adding eps, or dividing by the sum, gives other numbers
    module = make(causal=True, has_outproj=False)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            for parameter in getattr(module, name).parameters():
                parameter *= 3e-4
    x = noise(6, 2, 12)
    want = defined(module, x, x, x)
    assert abs(want).max() > 0 and abs(want - defined(module, x, x, x, eps=1e-9)).max() > 0.01
    close(module(torch.from_numpy(x)), want, terms=100)
    close(module(torch.from_numpy(x), eps=1e-3), defined(module, x, x, x, eps=1e-3), terms=100)


def test_no_positive_query_gives_zero_and_finite_gradients():
    module = make(causal=True, has_outproj=False)
    with torch.no_grad():
        module.q_proj.weight.zero_()
        module.q_proj.bias.fill_(-1.0)
    x = torch.from_numpy(noise(5, 2, 12)).requires_grad_()
    out = module(x)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_streaming_with_a_fixed_length_is_the_whole():
    x = noise(9, 2, 12)
    module = make(causal=True, max_len=20)
    want = defined(module, x, x, x, max_len=20)
    with torch.no_grad():
        head, state = module(torch.from_numpy(x[:4]), return_state=True)
        middle, state = module(torch.from_numpy(x[4:6]), state=state, return_state=True)
        tail = [module.step(torch.from_numpy(row), state) for row in x[6:]]
        close(torch.cat([head, middle, torch.stack(tail)]), want, terms=200)
        state = module.initial_state(2)
        close(torch.stack([module.step(torch.from_numpy(row), state) for row in x]), want, terms=200)
    assert state.length.tolist() == [9, 9]


def test_masked_keys_do_not_exist():
    module, x = make(), noise(6, 2, 12)
    poisoned = x.copy()
    poisoned[4:] = np.nan
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    got = module(torch.from_numpy(x), torch.from_numpy(poisoned), torch.from_numpy(poisoned), key_mask=mask)
    want = defined(module, x, x[:4], x[:4])  # the cosine's length is that of the query in both
    close(got, want, terms=100)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("act_fun", ["relu", "elu"])
def test_a_state_of_all_keys_is_attended_to_as_they_are(act_fun, batch_first):
    """From rows at any positions, whatever is after a text's end, or masked."""
    module = make(act_fun=act_fun, kdim=10, vdim=8, max_len=20, batch_first=batch_first)
    query, key, value = noise(7, 2, 12), noise(5, 2, 10, seed=2), noise(5, 2, 8, seed=3)
    lengths, mask = torch.tensor([5, 3]), torch.tensor([[True, True, False, True, True], [True] * 5])

    def turned(*given):
        given = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in given]
        return [x.transpose(0, 1) for x in given] if batch_first else given

    with torch.no_grad():
        q, k, v = turned(query, key, value)
        places = torch.stack([torch.arange(7), torch.arange(7).flip(0)])
        whole, state = module(q, k, v, return_state=True)
        close(*turned(whole), defined(module, query, key, value, max_len=20), terms=200)
        again, same = module(q, state=state, return_state=True)
        assert torch.equal(again, whole) and same is state
        moved = query.copy()
        moved[:, 1] = query[::-1, 1]
        wanted = defined(module, query, key, value, max_len=20)
        wanted[:, 1] = wanted[::-1, 1]
        found = module(turned(moved)[0], state=state, positions=places)
        close(*turned(found), wanted, terms=200)
        short = module(q, k, v, lengths=lengths, return_state=True)[1]
        assert short.length.tolist() == [5, 3]
        wanted[:, 1] = defined(module, query, key[:3], value[:3], max_len=20)[:, 1]
        close(turned(module(q, state=short))[0], wanted, terms=200)
        hidden = module(q, k, v, key_mask=mask, return_state=True)[0]
        close(hidden, module(q, k, v, key_mask=mask).numpy(), terms=200)


def test_rows_may_be_padded_beyond_max_len_and_positions_have_any_integers():
    module = make(max_len=6, batch_first=True)
    x, lengths = torch.from_numpy(noise(2, 9, 12)), torch.tensor([3, 6])
    want = module(x, lengths=lengths)
    got, state = module(x, lengths=lengths, return_state=True)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(got[row, :n], want[row, :n])
    for dtype in (torch.int16, torch.uint8):
        again = module(x[:, :3], state=state, positions=torch.arange(3, dtype=dtype)[None])
        torch.testing.assert_close(again, got[:, :3])


def test_reading_a_state_compiles_whole_for_any_length():
    torch.compiler.reset()
    torch.manual_seed(0)
    module, x = make(max_len=8).float(), torch.randn(6, 2, 12)
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="eager")
    with torch.no_grad():
        state = module(x, return_state=True)[1]
        for n in (2, 5):
            want = module(x[:n], state=state, eps=1e-5)
            torch.testing.assert_close(compiled(x[:n], state=state, eps=1e-5), want)


def test_flags_may_be_numpy_s():
    """And so may sizes."""
    module, x = CosformerAttention(np.int64(12), np.int32(3), max_len=8), torch.ones(5, 2, 12)
    for causal in (True, False):
        module.causal = causal
        state = module(x, return_state=np.True_)[1]
        assert state.length.tolist() == [5, 5]
        assert torch.equal(module(x, return_state=np.False_), module(x))


def test_lengths_end_the_rows_of_a_text():
    x, lengths = noise(6, 2, 12), torch.tensor([6, 4])
    for causal in (True, False):
        module = make(causal=causal, max_len=20)
        found, want = module(torch.from_numpy(x), lengths=lengths), defined(module, x, x, x, max_len=20)
        close(found[:, 0], want[:, 0], terms=200)
        close(found[:4, 1], defined(module, x[:4], x[:4], x[:4], max_len=20)[:, 1], terms=200)


def test_the_state_dict_is_the_released_one():
    module = CosformerAttention(12, 3, kdim=10, vdim=8, has_outproj=False)
    assert set(module.state_dict()) == RELEASED
    assert module.k_proj.weight.shape == (12, 10) and module.v_proj.weight.shape == (12, 8)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_causal_mask_says_nothing_new(dtype):
    module, x = make(causal=True), torch.from_numpy(noise(5, 2, 12))
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mask = above if dtype == torch.bool else torch.zeros(5, 5).masked_fill(above, -torch.inf)
    assert torch.equal(module(x, attn_mask=mask), module(x))


def reading(query=None, **options):
    """A query of a state of 3 keys."""
    module = make(max_len=8).float()
    state = module(x5[:3], return_state=True)[1]
    return module(x5 if query is None else query, state=state, **options)


x5 = torch.zeros(5, 2, 12)
REFUSED = [
    (lambda: CosformerAttention(12, 5), OptionError, "num_heads must divide embed_dim"),
    (
        lambda: CosformerAttention(12, 3, causal="no"),
        ArgumentTypeError,
        "causal must be True or False, got 'no'",
    ),
    (
        lambda: CosformerAttention(12, 3, has_outproj=1),
        ArgumentTypeError,
        "has_outproj must be True or False, got 1",
    ),
    (
        lambda: CosformerAttention(12, 3, batch_first=None),
        ArgumentTypeError,
        "batch_first must be True or False",
    ),
    (lambda: CosformerAttention(12, 2.0), ArgumentTypeError, "num_heads must be an int, got 2.0"),
    (lambda: CosformerAttention(12.0, 3), ArgumentTypeError, "embed_dim must be an int, got 12.0"),
    (lambda: CosformerAttention(12, 3, vdim=True), ArgumentTypeError, "vdim must be an int, got True"),
    (lambda: CosformerAttention(12, 3, act_fun=["relu"]), OptionError, r"relu, elu, got \['relu'\]"),
    (lambda: CosformerAttention(12, 3, act_fun="gelu"), OptionError, "act_fun must be one of relu, elu"),
    (
        lambda: make(causal=True).float()(x5[:1], x5, x5),
        ShapeError,
        "causal attention needs query and key of one",
    ),
    (lambda: make(causal=True).float()(x5, x5[:1], x5[:1]), ShapeError, "got 5 and 1"),
    (lambda: make().float()(x5, x5[:3]), ShapeError, "a missing value is the query"),
    (lambda: make().float()(x5[0]), ShapeError, "must have 3 axes"),
    (lambda: make().float()(x5[..., :7]), ShapeError, "query must be 12 wide"),
    (
        lambda: make().float()(x5, attn_mask=torch.zeros(5, 5)),
        OptionError,
        "attn_mask must be None when causal=False",
    ),
    (
        lambda: make(causal=True).float()(x5, attn_mask=torch.zeros(5, 5)),
        OptionError,
        "may only be the causal mask",
    ),
    (
        lambda: make(causal=True).float()(x5, attn_mask=torch.zeros(4, 4)),
        OptionError,
        r"must be the causal mask \(5, 5\)",
    ),
    (
        lambda: make(causal=True).float()(x5, attn_mask=[[0.0] * 5] * 5),
        ArgumentTypeError,
        "attn_mask must be a tensor, got list",
    ),
    (
        lambda: make(causal=True).float()(x5, attn_mask=torch.zeros(5, 5).long()),
        DtypeError,
        "attn_mask must be bool or of floating point, got int64",
    ),
    (lambda: reading(return_state=1), ArgumentTypeError, "return_state must be True or False, got 1"),
    (lambda: make(causal=True).float()(x5, return_state=True), OptionError, "takes max_len from the length"),
    (lambda: make(causal=True, max_len=4).float()(x5), ValueRangeError, "max_len=4"),
    (lambda: make().float().step(x5[0], None), OptionError, "step needs causal=True"),
    (
        lambda: make(max_len=8).float()(x5, return_state="no"),
        ArgumentTypeError,
        "return_state must be True or False",
    ),
    (lambda: make().float()(x5, return_state=True), OptionError, "takes max_len from the length"),
    (lambda: reading(eps=0.0), ValueRangeError, "eps must be > 0, got 0.0"),
    (lambda: reading(key=x5), OptionError, "key: a state of keys and values is instead of them"),
    (lambda: reading(lengths=torch.tensor([1, 1])), OptionError, "lengths: a state of keys and values is"),
    (
        lambda: reading(positions=torch.zeros(2, 4, dtype=torch.int64)),
        ShapeError,
        r"positions must be \[2, 5\] or \[1, 5\], got",
    ),
    (lambda: reading(positions=torch.zeros(3, 5).int()), ShapeError, r"got \(3, 5\)"),
    (lambda: reading(positions=[[0] * 5]), ArgumentTypeError, "positions must be a tensor, got list"),
    (lambda: reading(positions=torch.zeros(1, 5)), DtypeError, "must be integers, got float32"),
    (lambda: reading(positions=torch.ones(1, 5) > 0), DtypeError, "must be integers, got bool"),
    (
        lambda: reading(positions=torch.arange(5)[None] + 4),
        ValueRangeError,
        "positions must lie in 0 … 7, below max_len, got 8",
    ),
    (lambda: reading(positions=torch.arange(5)[None] - 1), ValueRangeError, "0 … 7, below max_len, got -1"),
    (
        lambda: make(max_len=4).float()(x5, x5[:3], x5[:3], return_state=True),
        ValueRangeError,
        r"Cosine\(max_len=4\) is shorter than the query's 5 positions",
    ),
    (
        lambda: reading(query=torch.zeros(9, 2, 12)),
        ValueRangeError,
        r"Cosine\(max_len=8\) is shorter than the query's 9 positions",
    ),
    (
        lambda: make().float()(x5, state=make(max_len=8).float()(x5, return_state=True)[1]),
        OptionError,
        "a state needs max_len",
    ),
    (
        lambda: make(max_len=8).float()(x5[:, :1], state=make(max_len=8).float()(x5, return_state=True)[1]),
        StateError,
        "initial_state.kv must have shape",
    ),
    (
        lambda: make(max_len=4).float()(x5[:1], state=make(max_len=8).float()(x5, return_state=True)[1]),
        ValueRangeError,
        r"Cosine\(max_len=4\) is shorter than the state's 5 positions",
    ),
    (lambda: make().float()(x5, positions=torch.arange(5)[None]), OptionError, "positions are of queries"),
    (
        lambda: make(causal=True, max_len=8).float()(x5, positions=torch.arange(5)[None]),
        OptionError,
        "of a module with causal=False",
    ),
]


@pytest.mark.parametrize(("call", "error", "sentence"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert isinstance(caught.value, LinattnError)
