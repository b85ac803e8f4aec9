"""Checks of the decode kernel in Triton's interpreter; run as a program, with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl

import linattn
from linattn import LRPE, Cosine, State, testing
from linattn.backends.triton import TritonBackend
from linattn.backends.triton import decode as kernels
from linattn.testing import arrays
from linattn.testing.properties.plan import assert_parts, limits, truth
from linattn.testing.properties.states import step
from linattn.testing.subject import BackendSubject, Result, natives
from tests.triton.programs import main

BACKEND = TritonBackend(interpreted=True)
SUBJECT = BackendSubject(BACKEND, "torch", "cpu")


def conformance() -> None:
    """The suite's own properties, every combination of options that it draws in pairs."""
    names = ("decodes_as_the_whole", "decodes_only_named_rows")
    report = testing.check_backend(BACKEND, kind="torch", device="cpu", only=names, shrink=False)
    assert all(finding.status == "pass" for finding in report.findings), str(report)


def sizes() -> None:
    """One token at sizes that no slice of E and no power of two divides, in any layout."""
    rng = np.random.default_rng(0)
    for d, e in ((1, 1), (3, 2), (17, 5), (16, 33), (130, 9), (5, 200), (256, 3), (31, 256)):
        for reweight, normalize in ((None, False), ("lrpe", True), ("cosine", True), ("lrpe", False)):
            case = testing.Case(
                feature_map=str(rng.choice(["relu", "silu", "elu+1"])), normalize=normalize,
                reweight=reweight, decay=rng.choice([None, "head", "token"]), rates=(0.01, 60.0, math.inf),
                scale=0.5, state=True, batch=2, n=1, heads=3, d=d, e=e,
                layout=str(rng.choice(["plain", "strided", "offset"])),
                dtype=str(rng.choice(["float32", "float16"])), values=2.0, seed=int(rng.integers(1 << 30)),
            )  # fmt: skip
            x = case.inputs()
            given, _ = natives(SUBJECT, x)
            o = arrays.back(SUBJECT.decode(*step(SUBJECT, x, 0, given)))
            got = {"o": o[:, None], **Result(None, given["kv"], given.get("z"), given["length"]).read_state()}
            assert_parts(got, truth(x), limits(SUBJECT, x, decode=True), x)


def both(state: State, *args: torch.Tensor, **options: object) -> None:
    """One step here and in torch: outputs and states with the same NaN and infinities, others close by."""
    other = state.clone()
    o = linattn.decode_step(*args, state, backend=BACKEND, **options)
    want = linattn.decode_step(*args, other, backend="torch", **options)
    for got, right in ((o, want), (state.kv, other.kv), (state.length, other.length)):
        torch.testing.assert_close(got, right, equal_nan=True)


def not_finite() -> None:
    """What a decay of 0 forgets may be anything; other NaN and infinities stay, and stay where they are."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 5)
    for reweight in (None, Cosine(9), LRPE(torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.5, 100.0]]))):
        for decay in (torch.tensor([-math.inf, -0.5]), torch.tensor([[-2000.0, 0.0], [-1.0, -math.inf]])):
            for bad in (math.nan, math.inf):
                state = State.zeros(q, 2, 2, 3, 5, reweight=reweight)
                state.kv.normal_()
                state.kv[0, :, 0, 0] = bad
                if bad == math.inf and reweight is not None:
                    state.kv[0, 1] = 1.0  # turned infinities meet their opposites; forgotten ones do not
                both(state, q, k, v, log_decay=decay, reweight=reweight)
    state = State.zeros(q, 2, 2, 3, 5, normalize=True, feature_map="relu")
    state.z[0, 0, 0] = math.nan
    o = linattn.decode_step(q.abs(), k, v, state, normalize=True, feature_map="relu", backend=BACKEND)
    assert o[0, 0].isnan().all()
    assert o[0, 1].isfinite().all()
    assert o[1].isfinite().all()


def padding() -> None:
    """Slots outside the pool change nothing and give 0, whatever their rows hold."""
    torch.manual_seed(0)
    for dtype in (torch.int32, torch.int64):
        q, k, v = torch.randn(4, 2, 3), torch.randn(4, 2, 3), torch.randn(4, 2, 5)
        q[1], v[2] = math.nan, math.inf
        pool = State.zeros(q, 3, 2, 3, 5, normalize=True, feature_map="elu+1")
        pool.kv.normal_()
        pool.z.uniform_()
        before = pool.clone()
        problem = Named(feature_map="elu+1", normalize=True, reweight=None, eps=1e-6, scale=-1.0, angle=0.0)
        slots = torch.tensor([1, -1, 3, 1 << 30], dtype=dtype)
        o = kernels.decode_step(problem, q, k, v, None, None, pool, slots)
        assert not o[1:].any()
        assert o[0].isfinite().all()
        for part in ("kv", "z", "length"):
            now, old = getattr(pool, part), getattr(before, part)
            assert torch.equal(now[[0, 2]], old[[0, 2]])
            assert not torch.equal(now[1], old[1])


class Named:
    """What the kernel's launch reads of a problem."""

    def __init__(self, **facts: object) -> None:
        self.__dict__.update(facts)


@triton.jit
def probe(g_ptr, turns_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    factor = kernels.exponential(tl.load(g_ptr + i))
    quarter, c, s = kernels.circle(tl.load(turns_ptr + i))
    high, low = kernels.halves(factor)
    c_high, c_low = kernels.halves(c)
    s_high, s_low = kernels.halves(s)
    for part in tl.static_range(7):
        value = quarter.to(tl.float64)
        if part == 1:
            value = high.to(tl.float64)
        elif part == 2:
            value = low.to(tl.float64)
        elif part == 3:
            value = c_high.to(tl.float64)
        elif part == 4:
            value = c_low.to(tl.float64)
        elif part == 5:
            value = s_high.to(tl.float64)
        elif part == 6:
            value = s_low.to(tl.float64)
        tl.store(out_ptr + part * N + i, value)


def constants() -> None:
    """Factors and rotations carry 47 bits or more: a million of them are off by less than storage rounds."""
    rng = np.random.default_rng(0)
    n = 1024
    g = np.concatenate([-rng.uniform(0, 1, n // 2), -(10.0 ** rng.uniform(-9, 1.5, n // 2))]).astype(
        np.float32
    )
    g[0] = 0.0
    turns = np.concatenate([rng.uniform(-0.5, 0.5, n // 2), 10.0 ** rng.uniform(-9, -0.4, n // 2)])
    turns[:9] = np.arange(-4, 5) / 8
    out = torch.empty(7, n, dtype=torch.float64)
    probe[(1,)](torch.from_numpy(g), torch.from_numpy(turns), out, N=n)
    quarter, high, low, c, c_low, s, s_low = out.numpy()
    wide = g.astype(np.float64)
    assert (abs((high + low) / np.exp(wide) - 1) <= 2.0**-47 * (1 + abs(wide) / 8)).all()
    turned = (c + c_low + 1j * (s + s_low)) * np.where(quarter > 0, 1j, 1)
    error = abs(turned - np.exp(2j * np.pi * turns))
    assert (error <= 2.0**-46).all(), error.max()
    assert (abs(s) <= abs(c) * (1 + 1e-6)).all()
    assert (np.angle(turned**1_000_000 * np.exp(-2j * np.pi * ((turns * 1_000_000) % 1))) < 1e-7).all()


def many_steps() -> None:
    """A state that is only turned keeps its phase, to what float32 storage costs."""
    torch.manual_seed(0)
    steps, d = 300, 64
    theta = torch.rand(1, d) * 6
    q, v = torch.zeros(1, 1, d), torch.zeros(1, 1, 1)
    state = State.zeros(q, 1, 1, d, 1, reweight=LRPE(theta))
    state.kv[:, :, :d] = 1.0
    for _ in range(steps):
        linattn.decode_step(q, q, v, state, reweight=LRPE(theta), backend=BACKEND)
    phase = theta.double()[0] * steps
    kv = state.kv[0, 0, :, 0].double()
    allowed = linattn.tolerance.SLACK * linattn.tolerance.UNIT["float32"] * steps
    assert (kv[:d] - phase.cos()).abs().max() < allowed
    assert (kv[d:] - phase.sin()).abs().max() < allowed
    assert state.length.item() == steps


if __name__ == "__main__":
    main(globals())
