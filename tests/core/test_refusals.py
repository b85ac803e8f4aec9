"""Every refusal: its class, and a sentence that names the argument and what came."""

# ruff: noqa: E501 (the tables have one row for each case)
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, Cosine, State, errors

B, N, H, D, E = 2, 5, 3, 4, 6


def make(kind: str, *shape: int, dtype: str = "float32") -> Any:
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    if kind == "torch":
        return torch.from_numpy(x).to(getattr(torch, dtype))
    return x.astype(dtype)


def whole(kind: str, values: Any, dtype: str = "int64") -> Any:
    x = np.asarray(values, dtype=dtype)
    return torch.from_numpy(x) if kind == "torch" else x


def call(kind: str, **changes: Any) -> Any:
    given = {"q": make(kind, B, N, H, D), "k": make(kind, B, N, H, D), "v": make(kind, B, N, H, E)} | changes
    return linattn.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def state(kind: str, rows: int = B, **changes: Any) -> State:
    parts = {"kv": make(kind, rows, H, D, E), "z": None, "length": whole(kind, [0] * rows)} | changes
    return State(**parts)


# name: (error, words of the sentence, what to change, given the array kind)
REFUSALS: dict[str, tuple[type[Exception], str, Any]] = {
    "rank of q": (errors.ShapeError, r"q must have shape \[B, N, H, D\], got \(5, 3, 4\)", lambda k: {"q": make(k, N, H, D)}),
    "a list": (errors.ArgumentTypeError, "q must be a NumPy, torch or CuPy array, got builtins.list", lambda k: {"q": [1.0]}),
    "a scalar": (errors.ArgumentTypeError, "v must be a NumPy", lambda k: {"v": 1.0}),
    "integers": (errors.DtypeError, "q, k and v must share one dtype of .* got int64", lambda k: {"q": whole(k, np.ones((B, N, H, D)))}),
    "mixed dtypes": (errors.DtypeError, "got float32, float64, float32", lambda k: {"k": make(k, B, N, H, D, dtype="float64")}),
    "batch": (errors.ShapeError, "must share B and D", lambda k: {"k": make(k, 1, N, H, D)}),
    "features": (errors.ShapeError, "must share B and D", lambda k: {"k": make(k, B, N, H, D + 1)}),
    "grouped heads": (errors.ShapeError, "grouped heads are not offered", lambda k: {"k": make(k, B, N, 1, D), "v": make(k, B, N, 1, E)}),
    "values": (errors.ShapeError, "must share B, M and H", lambda k: {"v": make(k, B, N + 1, H, E)}),
    "causal cross": (errors.ShapeError, "a causal call needs q and k of one length", lambda k: {"q": make(k, B, N + 2, H, D)}),
    "no features": (errors.ShapeError, "D must be at least 1", lambda k: {"q": make(k, B, N, H, 0), "k": make(k, B, N, H, 0)}),
    "no values": (errors.ShapeError, "E must be at least 1", lambda k: {"v": make(k, B, N, H, 0)}),
    "no heads": (errors.ShapeError, "H must be at least 1", lambda k: {n: make(k, B, N, 0, D) for n in "qkv"}),
    "decay is a list": (errors.ArgumentTypeError, "log_decay must be an array, got list", lambda k: {"log_decay": [0.0] * H}),
    "decay shape": (errors.ShapeError, r"log_decay must have shape \[H\] = \(3,\) or", lambda k: {"log_decay": -abs(make(k, H + 1))}),
    "decay dtype": (errors.DtypeError, "log_decay must be float32 or float64, got float16", lambda k: {"log_decay": -abs(make(k, H, dtype="float16"))}),
    "a slope": (
        errors.ValueRangeError,
        r"log_decay must be <= 0 \(natural log of a factor in \(0, 1\]\); head 2 has 0.25. If these are slopes, pass -slopes",
        lambda k: {"log_decay": whole(k, [0, -1, 0.25], "float32")},
    ),
    "a NaN decay": (errors.ValueRangeError, "head 1 has nan", lambda k: {"log_decay": whole(k, [0, np.nan, 0], "float32")}),
    "a token's decay": (
        errors.ValueRangeError,
        "batch 1 position 4 head 2 has 1",
        lambda k: {"log_decay": whole(k, np.eye(B * N * H)[-1].reshape(B, N, H), "float32")},
    ),
    "decay per token, not causal": (errors.OptionError, "per token needs causal=True", lambda k: {"log_decay": -abs(make(k, B, N, H)), "causal": False}),
    "theta": (errors.ShapeError, r"theta must have shape \[H, D\] = \(3, 4\), got \(4, 3\)", lambda k: {"reweight": LRPE(make(k, D, H))}),
    "theta dtype": (errors.DtypeError, "theta must be float32 or float64", lambda k: {"reweight": LRPE(make(k, H, D, dtype="float16"))}),
    "theta is infinite": (errors.ValueRangeError, "theta must be finite; head 0 feature 0", lambda k: {"reweight": LRPE(make(k, H, D) * np.inf)}),
    "reweight": (errors.ArgumentTypeError, "reweight must be None, linattn.Cosine or linattn.LRPE, got str", lambda k: {"reweight": "cosine"}),
    "positions": (errors.ValueRangeError, r"Cosine\(max_len=4\) is shorter than the call's 5 positions", lambda k: {"reweight": Cosine(4)}),
    "positions with a state": (
        errors.ValueRangeError,
        r"Cosine\(max_len=9\) is shorter than the 10 positions",
        lambda k: {"reweight": Cosine(9), "initial_state": State(make(k, B, H, 2 * D, E), None, whole(k, [5, 2]))},
    ),
    "unfixed cosine, state": (errors.OptionError, r"Cosine\(\) takes max_len from the length", lambda k: {"reweight": Cosine(), "return_state": True}),
    "feature map": (errors.OptionError, "feature_map must be None or one of 'relu', 'silu', 'elu", lambda k: {"feature_map": "gelu"}),
    "normalize": (errors.ArgumentTypeError, "normalize must be True or False, got 1", lambda k: {"normalize": 1}),
    "eps": (errors.ValueRangeError, "eps must be > 0, got 0", lambda k: {"eps": 0.0}),
    "eps is a word": (errors.ArgumentTypeError, "eps must be a number", lambda k: {"eps": "small"}),
    "scale": (errors.ValueRangeError, "scale must be finite", lambda k: {"scale": float("nan")}),
    "precision": (errors.OptionError, "precision must be one of 'ieee', 'tf32', got 'bf16'", lambda k: {"precision": "bf16"}),
    "mask shape": (errors.ShapeError, r"key_mask must have shape \[B, M\] = \(2, 5\)", lambda k: {"key_mask": whole(k, np.ones((B, N + 1)), "bool")}),
    "mask dtype": (errors.DtypeError, "key_mask must be bool, got float32", lambda k: {"key_mask": make(k, B, N)}),
    "lengths": (errors.ValueRangeError, r"lengths must lie in 0 … N = 5, got \[6, 1\]", lambda k: {"lengths": whole(k, [6, 1])}),
    "lengths shape": (errors.ShapeError, r"lengths must have shape \[B\] = \(2,\)", lambda k: {"lengths": whole(k, [1])}),
    "lengths dtype": (errors.DtypeError, "lengths must be int64 or int32, got float32", lambda k: {"lengths": make(k, B)}),
    "packed batch": (errors.ShapeError, "B must be 1, got 2", lambda k: {"cu_seqlens": whole(k, [0, N])}),
    "packed and padded": (errors.OptionError, "not both", lambda k: {"cu_seqlens": whole(k, [0, N]), "lengths": whole(k, [1, 1])}),
    "a state's shape": (errors.StateError, r"kv must have shape \[S, H, F, E\] = \(2, 3, 4, 6\), got \(1, 3, 4, 6\)", lambda k: {"initial_state": state(k, 1)}),
    "a state's dtype": (errors.DtypeError, "initial_state must be float32 for float32 calls, got float64", lambda k: {"initial_state": state(k, kv=make(k, B, H, D, E, dtype="float64"))}),
    "a state's z": (errors.StateError, "has no z, but normalize=True needs it", lambda k: {"initial_state": state(k), "normalize": True}),
    "a state of another map": (errors.StateError, "its feature_map is 'relu', this call's is None", lambda k: {"initial_state": state(k, feature_map="relu", d=D)}),
    "no state": (errors.ArgumentTypeError, "initial_state must be a linattn.State, got tuple", lambda k: {"initial_state": (1, 2)}),
    "state, not causal": (errors.OptionError, "initial_state needs causal=True", lambda k: {"initial_state": state(k), "causal": False}),
    "return_state, not causal": (errors.OptionError, "return_state needs causal=True", lambda k: {"return_state": True, "causal": False}),
    "slots without a pool": (errors.OptionError, "slots needs initial_state", lambda k: {"slots": whole(k, [0, 1])}),
    "slot out of range": (errors.ValueRangeError, r"slots must lie in 0 … 3 .* got \[0, 4\]", lambda k: {"slots": whole(k, [0, 4]), "initial_state": state(k, 4)}),
    "slot twice": (errors.ValueRangeError, r"slots must name each row once, got \[1, 1\]", lambda k: {"slots": whole(k, [1, 1]), "initial_state": state(k, 4)}),
    "a backend's name": (errors.UnknownBackendError, "no backend named 'tirton'; known: triton, cupy, torch, numpy", lambda k: {"backend": "tirton"}),
    "a backend's kind": (errors.ArgumentTypeError, "backend must be 'auto', a name", lambda k: {"backend": 3}),
    "no backend": (errors.ArgumentTypeError, "backend must name at least one", lambda k: {"backend": []}),
    "keyword": (errors.ArgumentTypeError, "attention has no keyword 'sclae'; did you mean 'scale'", lambda k: {"sclae": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_sentence(kind: str, name: str) -> None:
    error, words, change = REFUSALS[name]
    with pytest.raises(error, match=words) as caught:
        call(kind, **change(kind))
    assert isinstance(caught.value, errors.LinattnError)


def test_each_wrong_backend_says_why() -> None:
    x = np.ones((1, 2, 1, 2), np.float32)
    with pytest.raises(errors.UnsupportedError, match="torch  takes torch arrays, got numpy") as caught:
        linattn.attention(x, x, x, backend="torch")
    assert caught.value.reasons == {"torch": "takes torch arrays, got numpy"}
    assert "b=1 n=2 h=1 d=2 e=2, float32, numpy on cpu" in str(caught.value)


def test_arrays_of_two_kinds() -> None:
    x = np.ones((1, 2, 1, 2), np.float32)
    with pytest.raises(errors.ArgumentTypeError, match="one kind of array, got numpy, torch, numpy"):
        linattn.attention(x, torch.from_numpy(x), x)
    with pytest.raises(errors.ArgumentTypeError, match="key_mask must be a torch array as q is, got numpy"):
        linattn.attention(*[torch.from_numpy(x)] * 3, key_mask=np.ones((1, 2), bool))


def test_arrays_whose_values_are_not_all_there() -> None:
    x = np.ones((1, 2, 1, 2), np.float32)
    with pytest.raises(errors.ArgumentTypeError, match=r"q must be .*, got numpy\.ma"):
        linattn.attention(np.ma.masked_less(x, 2), x, x)
    t = torch.from_numpy(x)
    with pytest.raises(
        errors.ArgumentTypeError, match=r"k must be a dense tensor, its layout is torch\.sparse_coo"
    ):
        linattn.attention(t, t.to_sparse(), t)


def test_arrays_on_two_devices() -> None:
    x = torch.ones(1, 2, 1, 2)
    with pytest.raises(errors.DeviceError, match="got cpu, meta, cpu"):
        linattn.attention(x, x.to("meta"), x)
    with pytest.raises(errors.DeviceError, match="lengths must be on cpu as q is, got meta"):
        linattn.attention(x, x, x, lengths=torch.ones(1, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("bad", [[1, 5], [0, 4], [0, 3, 2, 5], [0, 6]])
def test_cu_seqlens_must_rise_from_0_to_n(bad: list[int]) -> None:
    x = np.ones((1, 5, 1, 2), np.float32)
    with pytest.raises(errors.ValueRangeError, match="cu_seqlens must rise from 0 to N = 5"):
        linattn.attention(x, x, x, cu_seqlens=np.array(bad))


def test_decode_step_refuses_like_attention() -> None:
    q, v = np.ones((B, H, D), np.float32), np.ones((B, H, E), np.float32)
    memory = State.zeros(q, B, H, D, E)
    with pytest.raises(errors.ShapeError, match=r"q must have shape \[B, H, D\]"):
        linattn.decode_step(q[:, None], q, v, memory)
    with pytest.raises(errors.ArgumentTypeError, match="start with State"):
        linattn.decode_step(q, q, v, None)
    with pytest.raises(errors.StateError, match="kv must have shape"):
        linattn.decode_step(q[:1], q[:1], v[:1], memory)
    with pytest.raises(errors.ShapeError, match=r"log_decay must have shape \[H\] = \(3,\) or \[B, H\]"):
        linattn.decode_step(q, q, v, memory, log_decay=np.zeros(2))
    with pytest.raises(errors.ValueRangeError, match="slots must lie in"):
        linattn.decode_step(q, q, v, memory, slots=np.array([0, 2]))
    with pytest.raises(errors.ArgumentTypeError, match="no keyword 'causal'"):
        linattn.decode_step(q, q, v, memory, causal=True)
    with pytest.raises(errors.ArgumentTypeError, match="state is missing"):
        linattn.decode_step(q, q, v)
    memory.kv.flags.writeable = False
    with pytest.raises(errors.StateError, match=r"state\.kv must be writable"):
        linattn.decode_step(q, q, v, memory)


def test_decode_step_refuses_gradients() -> None:
    q = torch.ones(1, 1, 2, requires_grad=True)
    memory = State.zeros(q, 1, 1, 2, 2)
    with pytest.raises(errors.GradientError, match="no gradient passes through it"):
        linattn.decode_step(q, q, q, memory)
    with torch.no_grad():
        linattn.decode_step(q, q, q, memory)
    assert memory.length.tolist() == [1]


def test_decode_step_past_max_len() -> None:
    q = np.ones((1, 1, 2), np.float32)
    memory = State.zeros(q, 1, 1, 2, 2, reweight=Cosine(2))
    for _ in range(2):
        linattn.decode_step(q, q, q, memory, reweight=Cosine(2))
    with pytest.raises(errors.ValueRangeError, match="the 3 positions that state and call reach"):
        linattn.decode_step(q, q, q, memory, reweight=Cosine(2))


def test_fixed_keywords_of_the_papers_calls() -> None:
    x = np.ones((1, 2, 1, 2), np.float32)
    with pytest.raises(errors.ArgumentTypeError, match="cosformer_attention fixes normalize"):
        linattn.cosformer_attention(x, x, x, normalize=False)
    with pytest.raises(errors.ArgumentTypeError, match="lightning_attention fixes causal"):
        linattn.lightning_attention(x, x, x, None, causal=False)
    with pytest.raises(errors.ArgumentTypeError, match="no keyword 'max_length'"):
        linattn.lightning_attention(x, x, x, None, max_length=3)
    with pytest.raises(errors.ArgumentTypeError, match="log_decay is missing"):
        linattn.lightning_attention(x, x, x)


def test_states_that_do_not_merge() -> None:
    left, right = state("numpy"), state("numpy")
    with pytest.raises(errors.StateError, match="same sequences of one problem"):
        linattn.merge_states(left, right.select([0]))
    with pytest.raises(errors.OptionError, match="not both"):
        linattn.merge_states(left, right, log_decay=-np.ones(H), total_log_decay=-np.ones((B, H)))
    with pytest.raises(errors.ShapeError, match=r"log_decay must have shape \(3,\), got \(4,\)"):
        linattn.merge_states(left, right, log_decay=-np.ones(4))
    with pytest.raises(errors.ValueRangeError, match="total_log_decay must be <= 0"):
        linattn.merge_states(left, right, total_log_decay=np.ones((B, H)))
    with pytest.raises(errors.ArgumentTypeError, match=r"right must be a linattn\.State"):
        linattn.merge_states(left, None)
    long = State(left.kv, None, np.array([3, 4]))
    with pytest.raises(errors.ValueRangeError, match="merged length exceeds Cosine's max_len = 6"):
        linattn.merge_states(long, long, reweight=Cosine(6))


@pytest.mark.parametrize("value", [0, -1])
def test_max_len_must_be_positive(value: int) -> None:
    with pytest.raises(errors.ValueRangeError, match="max_len must be at least 1"):
        Cosine(value)


@pytest.mark.parametrize("value", [1.5, "8", True])
def test_max_len_must_be_an_int(value: object) -> None:
    with pytest.raises(errors.ArgumentTypeError, match="max_len must be an int or None"):
        Cosine(value)  # type: ignore[arg-type]


def test_vjp_refuses_gradients_of_another_call() -> None:
    x = np.ones((1, 2, 1, 2), np.float32)
    _, vjp = linattn.attention_vjp(x, x, x)
    with pytest.raises(errors.ShapeError, match="do must have o's shape"):
        vjp(x[:, :1])
    with pytest.raises(errors.ArgumentTypeError, match="do must be a numpy array"):
        vjp(torch.from_numpy(x))
    with pytest.raises(errors.StateError, match="return_state=False"):
        vjp(x, State.zeros(x, 1, 1, 2, 2))


Q = np.ones((1, 2, 1, 2), np.float32)
ONE = State(np.ones((1, 1, 2, 2), np.float32), None, np.zeros(1, np.int64))

# the sentence: what raises it
OTHERS: dict[str, tuple[type[Exception], Any]] = {
    "scale must be finite": (errors.ValueRangeError, lambda: linattn.attention(Q, Q, Q, scale=10**400)),
    "eps must be at least 1.18e-38 for float32": (errors.ValueRangeError, lambda: linattn.attention(Q, Q, Q, normalize=True, eps=1e-50)),
    "max_len must be at least 1 and below": (errors.ValueRangeError, lambda: Cosine(10**30)),
    "max_len must be an int": (errors.ArgumentTypeError, lambda: Cosine(np.array([8, 9]))),  # type: ignore[arg-type]
    "merge_states has no keyword 'foo'": (errors.ArgumentTypeError, lambda: linattn.merge_states(ONE, ONE, foo=1)),
    "merge_states needs left, right; right is missing": (errors.ArgumentTypeError, lambda: linattn.merge_states(ONE)),
    "reweight must be None, linattn.Cosine or linattn.LRPE, got int": (errors.ArgumentTypeError, lambda: linattn.merge_states(ONE, ONE, reweight=5)),
    "log_decay must be float32 or float64, got int64": (errors.DtypeError, lambda: linattn.merge_states(ONE, ONE, log_decay=np.array([-1]))),
    "log_decay must be a numpy array as kv is": (errors.ArgumentTypeError, lambda: linattn.merge_states(ONE, ONE, log_decay=torch.zeros(1))),
    "right.length must be >= 0": (errors.ValueRangeError, lambda: linattn.merge_states(ONE, State(ONE.kv, None, np.array([-3])))),
    "initial_state.length must be >= 0": (errors.ValueRangeError, lambda: linattn.attention(Q, Q, Q, initial_state=State(ONE.kv, None, np.array([-3])))),
    "rows must lie in 0": (errors.ValueRangeError, lambda: ONE.select([1])),
    "rows must be integers, got float64": (errors.DtypeError, lambda: ONE.select([0.7])),
    "rows must be integers, got bool": (errors.DtypeError, lambda: ONE.select([True])),
    r"rows must have shape \[R\]": (errors.ShapeError, lambda: ONE.select([[0]])),
    "reweight must be a Cosine or an LRPE": (errors.ArgumentTypeError, lambda: State.zeros(Q, 1, 1, 2, 2, reweight="cosine")),  # type: ignore[arg-type]
    "feature_map must be one of relu": (errors.OptionError, lambda: State.zeros(Q, 1, 1, 2, 2, feature_map="gelu")),
    "heads must be positive, got -1": (errors.ValueRangeError, lambda: State.zeros(Q, 1, -1, 2, 2)),
    "d must be an int, got 2.5": (errors.ArgumentTypeError, lambda: State.zeros(Q, 1, 1, 2.5, 2)),  # type: ignore[arg-type]
    "sizes must be ints": (errors.ArgumentTypeError, lambda: LRPE.default_theta(2.5, 3)),  # type: ignore[arg-type]
    "must be a whole number of at least 1": (errors.ValueRangeError, lambda: linattn.decay.alibi(0)),
    "layer must be a whole number from 0": (errors.ValueRangeError, lambda: linattn.decay.transnormer(4, 5, 3)),
    "no backend named 'numpy,torch'": (errors.UnknownBackendError, lambda: linattn.attention(Q, Q, Q, backend="numpy,torch")),
    "log_decay must be a dense tensor": (errors.ArgumentTypeError, lambda: linattn.attention(*[torch.from_numpy(Q)] * 3, log_decay=torch.zeros(1).to_sparse())),
}  # fmt: skip


@pytest.mark.parametrize("words", OTHERS)
def test_refused_elsewhere_with_a_sentence(words: str) -> None:
    error, call = OTHERS[words]
    with pytest.raises(error, match=words):
        call()


def test_states_that_cannot_change_in_place() -> None:
    q = torch.ones(2, 1, 2)
    expanded = State(torch.zeros(1, 1, 2, 2).expand(2, 1, 2, 2), None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(errors.StateError, match=r"state\.kv is expanded"):
        linattn.decode_step(q, q, q, expanded)
    with torch.inference_mode():
        made = State.zeros(q, 2, 1, 2, 2)
    with pytest.raises(errors.StateError, match=r"state\.kv was made in inference mode"):
        linattn.decode_step(q, q, q, made)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_pool_without_rows_serves_padding(kind: str) -> None:
    q = make(kind, 1, 2, 1, 2)
    pool = State(make(kind, 0, 1, 2, 2), None, whole(kind, []))
    assert not linattn.attention(q, q, q, initial_state=pool, slots=whole(kind, [-1])).any()
    assert not linattn.decode_step(q[:, 0], q[:, 0], q[:, 0], pool, slots=whole(kind, [-1])).any()


def test_the_gradient_of_a_state_is_checked() -> None:
    _, vjp = linattn.attention_vjp(Q, Q, Q, return_state=True)
    with pytest.raises(errors.ArgumentTypeError, match="dstate must hold numpy arrays, got torch"):
        vjp(Q, State(torch.ones(1, 1, 2, 2), None, torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(errors.DtypeError, match="dstate must be float32, got float64"):
        vjp(Q, State(np.ones((1, 1, 2, 2)), None, np.zeros(1, np.int64)))
