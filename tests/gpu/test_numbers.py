"""Results at every size, far apart in memory, at the ends of the numbers, and after a million tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, Cosine, State, testing, tolerance
from linattn.testing import arrays
from linattn.testing.properties.equality import compare_gradients, gradient_limits
from linattn.testing.properties.plan import assert_parts, limits, truth
from linattn.testing.subject import natives
from tests.gpu.calls import HEADS, D, both, captured, drawn, needs_cupy, same

pytestmark = pytest.mark.gpu
CUPY = pytest.param("cupy", marks=needs_cupy)


@pytest.mark.parametrize("far", ["batch", "token", "head"])
def test_inputs_more_than_2_31_elements_apart(far: str) -> None:
    of = testing.BackendSubject("triton")
    batch, n, heads = {"batch": (2, 40, 2), "token": (1, 5, 2), "head": (1, 40, 2)}[far]
    case = testing.Case(
        batch=batch, n=n, heads=heads, d=16, e=16, decay="head", dtype="bfloat16", values=1.0, state=True
    )
    x = case.inputs().replace(dstate=None)
    given, _ = natives(of, x)
    strides = {
        "batch": (1 << 31, heads * 16, 16, 1), "token": (0, 1 << 29, 16, 1), "head": (0, 16, 1 << 31, 1),
    }[far]  # fmt: skip
    buffer = torch.empty((1 << 31) + (1 << 16), dtype=torch.bfloat16, device="cuda")
    for i, name in enumerate("qkv"):
        view = buffer[i << 12 :].as_strided((batch, n, heads, 16), strides, i << 12)
        view.copy_(given[name])
        given[name] = view
    assert_parts(of.run(x, given, return_state=True).read(), truth(x), limits(of, x), x)
    do = arrays.place(x.do, "torch", "bfloat16", "cuda").array
    found = of.vjp(x, given, do, None)
    read = {name: arrays.back(found[name]) for name in ("q", "k", "v", "log_decay")}
    want = linattn.reference.gradients(x.q, x.k, x.v, x.do, None, **x.options())
    compare_gradients(read, {name: want[name] for name in read}, gradient_limits(of, x), x)


def test_an_output_of_more_than_2_31_elements() -> None:
    """Small integers are exact: each token forgets all others, so o = (q . k) v."""
    n, heads, d, e = 1 << 17, 64, 16, 256
    q, k = (torch.randint(-1, 2, (1, n, heads, d), device="cuda").bfloat16() for _ in range(2))
    v = torch.randint(-8, 9, (1, 1, heads, e), device="cuda").bfloat16().expand(1, n, heads, e)
    g = torch.full((heads,), -math.inf, device="cuda")
    o = linattn.attention(q, k, v, log_decay=g, backend="triton")
    assert o.numel() >= 1 << 31
    for rows in (slice(0, 1000), slice(n - 1000, n)):
        want = (q[:, rows].float() * k[:, rows].float()).sum(-1, keepdim=True) * v[:, rows].float()
        same([o[:, rows].float()], [want])


KINDS: dict[str, dict[str, Any]] = {
    "lightning": {"decay": "head", "state": True},
    "lrpe": {"decay": "token", "reweight": "lrpe", "feature_map": "silu", "packed": True},
    "cosformer": {"reweight": "cosine", "feature_map": "relu", "normalize": True},
    "both ways": {"decay": "head", "causal": False, "feature_map": "elu+1", "normalize": True},
}
SIZES = (
    (1, 256), (2, 1), (7, 65), (15, 16), (31, 128), (33, 7), (63, 100), (64, 64), (65, 33), (100, 200),
    (127, 2), (128, 128), (129, 63), (160, 31), (200, 17), (255, 129), (256, 255), (256, 256),
)  # fmt: skip


@pytest.mark.parametrize(("d", "e"), SIZES)
def test_every_size_of_features(d: int, e: int) -> None:
    place = SIZES.index((d, e))
    for shift, dtype in enumerate(("bfloat16", "float32")):
        options = list(KINDS.values())[(place + shift) % len(KINDS)]
        case = testing.Case(n=77, heads=2, d=d, e=e, dtype=dtype, rates=(0.0, 0.1), seed=place, **options)
        testing.properties.matches_the_reference("triton", case)
        testing.properties.gradients_match_the_reference("triton", case)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_accurate(kind: str) -> None:
    case = testing.Case(n=150, heads=2, d=128, e=128, rates=(0.0, 1e-3, 0.1), **KINDS[kind])
    testing.properties.gradients_match_the_reference("triton", case)
    if kind != "both ways":
        testing.properties.matches_the_reference("triton", case.replace(n=2500, heads=1, d=64, e=64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("reweight", [None, "lrpe"])
def test_a_decay_of_zero_forgets_anything(bad: float, reweight: str | None) -> None:
    q, k, v = drawn(dtype=torch.float32)
    angles = None if reweight is None else LRPE(torch.rand(HEADS, D, device="cuda"))
    g = torch.tensor([-math.inf, -2000.0, -math.inf, -1e30], device="cuda")
    results = []
    for value in (0.0, bad):
        state = State.zeros(q, 2, HEADS, D, D, reweight=angles)
        state.kv.fill_(value)
        o, after = linattn.attention(
            q, k, v, log_decay=g, reweight=angles, initial_state=state, return_state=True, backend="triton"
        )
        assert o.isfinite().all()
        results.append((o, after.kv))
    same(results[0], results[1])


def test_slopes_far_beyond_eight() -> None:
    for dtype in ("bfloat16", "float32"):
        rates = (0.0, 1e-3, 8.0, 60.0, 1e4, math.inf)
        case = testing.Case(n=200, heads=6, d=32, e=32, decay="head", rates=rates, dtype=dtype)
        testing.properties.matches_the_reference("triton", case)


def test_a_row_keeps_its_bits_in_any_batch(options: dict[str, Any]) -> None:
    x = drawn(8, 2048, HEADS, D, count=4)
    if "log_decay" in options and options["log_decay"].ndim == 3:
        options["log_decay"] = -torch.rand(8, 2048, HEADS, device="cuda")
    if "reweight" in options and isinstance(options["reweight"], Cosine):
        options["reweight"] = Cosine(2048)
    whole = both(*x, batch_invariant=True, **options)
    for b in (0, 7):
        row = slice(b, b + 1)
        mine = dict(options)
        if "log_decay" in mine and mine["log_decay"].ndim == 3:
            mine["log_decay"] = mine["log_decay"][row]
        alone = both(*(part[row] for part in x), batch_invariant=True, **mine)
        same(alone, [part[row] for part in whole])


@pytest.mark.parametrize("of", ["triton", CUPY])
@pytest.mark.parametrize("decay", [0.0, 1e-7, 3e-6])
def test_a_million_decoded_tokens(decay: float, of: str) -> None:
    """One value at token 0, seen from token N: scale sum_d cos(theta_d N) lambda^N v, within the bound."""
    heads, d, e, steps, times = 2, 64, 16, 1000, 1000
    theta = torch.rand(heads, d, device="cuda") * 6
    reweight, g = LRPE(theta), torch.full((heads,), -decay, device="cuda")
    ones = torch.ones(1, heads, d, device="cuda")
    zeros, v = torch.zeros_like(ones), torch.rand(1, heads, e, device="cuda")
    state = State.zeros(ones, 1, heads, d, e, reweight=reweight)

    def step(k: Any) -> Any:
        return linattn.decode_step(ones, k, v, state, log_decay=g, reweight=reweight, backend=of)

    graph, o = captured(lambda: [step(zeros) for _ in range(steps)][-1])
    state.kv.zero_()
    state.length.zero_()
    step(ones)
    for _ in range(times):
        graph.replay()
    n = steps * times
    assert state.length.item() == n + 1
    log_weight = -float(np.float32(decay)) * n
    phase = theta.double().cpu().numpy() * n
    values = v[0].double().cpu().numpy()
    factor = tolerance.Rounding("float32", update_every=1).factor(
        2 * d + e, n, -log_weight, tolerance.UNIT["float32"]
    )
    want = np.exp(log_weight) * np.cos(phase).sum(1)[:, None] * values
    allowed = np.exp(log_weight) * abs(np.cos(phase)).sum(1)[:, None] * values * factor
    testing.assert_within("o", "h e", arrays.back(o)[0], want, allowed, "float32")
    kv = np.exp(log_weight) * np.concatenate([np.cos(phase), np.sin(phase)], 1)[:, :, None] * values[:, None]
    room = np.exp(log_weight) * np.ones((heads, 2 * d, 1)) * values[:, None] * factor
    found = arrays.back(state.kv)[0]
    testing.assert_within("kv", "h f e", found, kv, room, "float32")
    # roundings know little of each other: what leans one way would grow with n, and not with its root
    off = np.linalg.norm(found - kv) / np.linalg.norm(kv)
    assert off <= 8 * math.sqrt(n) * tolerance.UNIT["float32"]
