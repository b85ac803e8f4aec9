"""One kernel for all layers without a GPU: its threads on a CPU, where what they wait for comes late."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linattn import tolerance
from linattn.backends.cupy import persistent, sources
from tests.cupy import hosted
from tests.cupy.test_mutants import changed

torch = pytest.importorskip("torch", reason="torch is not installed, and NumPy has no bfloat16")
pytestmark = pytest.mark.skipif(
    hosted.COMPILER is None, reason="g++ is not installed, by which the kernels run on a CPU"
)

ROOT = Path(__file__).parents[2]
PLACES = "", "rows", "shares", "v", "u", "qk", "squares", "mixed", "inner"  # of words, in persistent.cpp
SUMS = 1e-5  # of the largest number: what sums in float32 may be off by
ACTS = {
    None: lambda x: x, "silu": torch.nn.functional.silu, "relu": torch.relu,
    "elu+1": lambda x: torch.nn.functional.elu(x) + 1,
}  # fmt: skip


def library(inner: int, feature_map: str | None = "silu") -> ctypes.CDLL:
    feature = sources.FEATURES[feature_map]
    return hosted.library("persistent.cu", "-O2", f"-DHOST_FEATURE={feature}", f"-DHOST_INNER={inner}")


def drawn(*shape: int, seed: int, size: float = 1.0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def layer(i: int, inner: int, *, turned: bool = False, decay: float | None = 0.3, **more: Any) -> Any:
    """A layer in the middle of a text; weights keep the size of what they are for."""
    shapes = {"qkvu": (4096, 1024), "out": (1024, 1024), "l1": (inner, 1024), "l2": (inner, 1024)}
    shapes["l3"] = (1024, inner)
    made = {
        name: drawn(*shape, seed=10 * i + j, size=shape[1] ** -0.5).bfloat16()
        for j, (name, shape) in enumerate(shapes.items())
    }
    log_decay = None if decay is None else -decay * torch.arange(1, 9) / 8
    theta = torch.rand(8, 1, 128, generator=torch.Generator().manual_seed(i)) if turned else None
    kv = drawn(1, 8, 256 if turned else 128, 128, seed=10 * i + 9)
    given = {"eps": 1e-6, "gate_eps": 1e-6} | more
    return persistent.Layer(
        **made, kv=kv, log_decay=log_decay, theta=theta, length=torch.tensor([7]), **given
    )


def exactly(x: Any, layers: Any, feature_map: str | None) -> tuple[Any, list[Any]]:
    """The formulas in float64, and the states that they give."""
    act, x, after = ACTS[feature_map], x.double(), []

    def normed(y: Any, eps: float) -> Any:
        return y * torch.rsqrt(y.square().mean() + eps)

    for one in layers:
        q, k, v, u = (normed(x, one.eps) @ one.qkvu.double().T).chunk(4, -1)
        q, k, v = act(q).view(8, 128, 1), act(k).view(8, 128, 1), v.view(8, 1, 128)
        decay = 1.0 if one.log_decay is None else one.log_decay.double().exp()[:, None, None]
        new = one.kv[0].double()
        new = torch.where(torch.as_tensor(decay) == 0, 0.0, decay * new)
        if one.theta is not None:
            turn, (c, s) = one.theta.double().view(8, 128, 1), new.split(128, 1)
            new = torch.cat([c * turn.cos() - s * turn.sin(), s * turn.cos() + c * turn.sin()], 1)
        new[:, :128] += k * v
        after.append(new)
        o = (q * new[:, :128]).sum(1).view(1, 1024)
        x = x + (normed(o, one.gate_eps) * u) @ one.out.double().T
        y = normed(x, one.eps)
        x = x + ((y @ one.l1.double().T) * (y @ one.l2.double().T)) @ one.l3.double().T
    return x, after


def assert_near(got: Any, want: Any, unit: float = 0.0) -> None:
    over = (got.double() - want).abs() - unit * want.abs() - SUMS * want.abs().max()
    assert float(over.max()) <= 0, float(over.max())


def check(
    layers: Any,
    feature_map: str | None = "silu",
    *,
    exchange: Any = None,
    outputs: int = 0,
    seed: int = 0,
    late: str = "",
    tired: int = -1,
) -> Any:
    """A step by the kernel against the formulas; the bits of its result.

    late: words that come last. tired: a warp of each block that sleeps most of the time; others nap then.
    """
    x = drawn(1, 1024, seed=seed).bfloat16()
    y = torch.full_like(x, math.nan)
    want, after = exactly(x, layers, feature_map)
    inner = layers[0].l1.shape[0]
    if exchange is None:
        exchange = torch.zeros(persistent.room(inner), dtype=torch.uint8)
    run = library(inner, feature_map).persistent_run
    end = None
    if outputs:
        head, eps = drawn(outputs, 1024, seed=5, size=1 / 32).bfloat16(), 0.5
        end = persistent.End(head, torch.full((outputs,), math.nan, dtype=torch.bfloat16), eps)
        want = want * torch.rsqrt(want.square().mean() + eps)
    run(persistent.told(x, y, layers, exchange, end), ctypes.c_uint32(seed), PLACES.index(late), tired)
    assert_near(y, want, tolerance.UNIT["bfloat16"])
    if end is not None:
        assert_near(end.logits, want[0] @ end.head.double().T, tolerance.UNIT["bfloat16"])
    for one, new in zip(layers, after, strict=True):
        assert_near(one.kv[0], new)
        assert int(one.length) == 8
    return y


def test_sizes_are_those_of_the_kernel() -> None:
    found = (ctypes.c_int64 * 3)()
    for inner in (256, 2816):
        library(inner).persistent_bytes(found)
        told = persistent.told(torch.zeros(1), torch.zeros(1), [], torch.zeros(1))
        assert [*found] == [len(told), persistent.SHARED, persistent.room(inner)], [*found]


@pytest.mark.parametrize("feature_map", ACTS)
def test_one_layer(feature_map: str | None) -> None:
    check([layer(0, 256, turned=feature_map == "silu", eps=0.5, gate_eps=0.25)], feature_map)


@pytest.mark.parametrize("inner", [1280, 2816, 3072])
def test_stages_go_round(inner: int) -> None:
    """11 to 14 of them a layer, in 12 places: whoever is ahead, or late, may meet another use of a place."""
    for seed in range(3):
        check([layer(i, inner, turned=i == 0) for i in range(5)], outputs=1100, seed=seed)


@pytest.mark.parametrize("tired", range(12))
def test_a_tired_warp(tired: int) -> None:
    """Readers, the one that asks for weights, its helpers: nobody relies on another's speed."""
    check([layer(i, (1280, 2816)[tired % 2], turned=i == 0) for i in range(4)], tired=tired, seed=tired)


@pytest.mark.parametrize("late", PLACES[1:])
def test_words_that_come_last(late: str) -> None:
    check([layer(0, 256, turned=True), layer(1, 256)], late=late)


@pytest.mark.parametrize("outputs", [1, 100, 1024, 9000])
def test_logits(outputs: int) -> None:
    """Some blocks have none, some a part of 8, some more than they form at once."""
    check([layer(0, 256)], outputs=outputs)


def test_what_is_forgotten_may_not_be_finite() -> None:
    layers = [
        layer(0, 256, turned=True, decay=math.inf),
        layer(1, 256, decay=math.inf),
        layer(2, 256, decay=None),
    ]
    layers[0].kv.fill_(math.nan)
    layers[1].kv.fill_(math.inf)
    check(layers)


def test_the_same_bits_in_any_order_of_threads() -> None:
    """Steps that share their memory, by odd and even numbers of layers; words and copies come as drawn."""
    exchange = torch.zeros(persistent.room(256), dtype=torch.uint8)
    seen: list[Any] = []
    for turn in range(3):
        layers = [layer(i, 256, turned=i == 1) for i in range(2 + turn % 2)]
        check(layers, exchange=exchange, seed=turn)
        again = [layer(i, 256, turned=i == 1) for i in range(2)]
        x, y = drawn(1, 1024, seed=0).bfloat16(), torch.zeros(1, 1024, dtype=torch.bfloat16)
        told = persistent.told(x, y, again, exchange)
        library(256).persistent_run(told, ctypes.c_uint32(100 + turn), 0, -1)
        seen.append((y, again[1].kv))
    for y, kv in seen[1:]:
        assert torch.equal(y, seen[0][0]) and torch.equal(kv, seen[0][1])


# what is wrong: the source, the right text, the wrong one, and words that come last
MUTANTS = {
    "rows": ("persistent.cu", "awaited(ex.rows + own, mark ^ 1)", "look_4(ex.rows + own)", "rows"),
    "shares of o": ("persistent.cu", "ready = ready && there(shares[i], mark);", ";", "shares"),
    "values": ("persistent.cu", "ready = there(v, mark) && ", "ready = ", "v"),
    "gates": ("persistent.cu", "there(v, mark) && there(u, mark)", "there(v, mark)", "u"),
    "weights of values": ("persistent.cu", " && there(qk, mark)", "", "qk"),
    "shares of the projection": ("persistent.cu", "ready = ready && there(mixed[i], mark);", ";", "mixed"),
    "squares": ("persistent.cu", "ready = there(of_group, mark);", "ready = true;", "squares"),
    "inner rows": ("persistent.cu", "while (!__all_sync(~0u, there(words[i], mark)))", "if (false)", "inner"),
    "values for the state": (
        "persistent.cu", "while (!__all_sync(~0u, there(word_of_v, mark)))", "if (false)", "v",
    ),
    "the state": ("persistent.cu", "      late_copies_are_there();\n      pause", "      pause", ""),
    "stages": ("persistent.cuh", "i < stages; ++i) wait(ring.full", "i < 0; ++i) wait(ring.full", ""),
    "room": ("persistent.cuh", "!is_over(ring.empty + at, turn & 1 ^ 1)", "false", ""),
    "helpers": ("persistent.cuh", "    else wait(&ring.help, turn_of_help++ & 1);\n", "", ""),
    "the last bit": ("persistent.cuh", "return (word & 1) == mark;", "return word != 0;", ""),
    "a number's third part": (
        "persistent.cuh", "for (int n = 0; n < 3; ++n)", "for (int n = 0; n < 2; ++n)", "",
    ),
    "the mark taken off": (
        "persistent.cuh", "return from_bits(word & ~1u);", "return from_bits(word);", "",
    ),
}  # fmt: skip
QUICK = "shares of o", "the state", "room", "the last bit"
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MUTANTS]


@pytest.mark.parametrize("name", ALL)
def test_without(name: str) -> None:
    """Each wait is needed, and each part of a number: in a process of its own, as kernels may stop it."""
    file, right, _, _ = MUTANTS[name]
    assert (sources.FOLDER / file).read_text(encoding="utf-8").count(right) == 1
    code = f"from tests.cupy.test_persistent import mutant; mutant({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and ("AssertionError" in done.stderr or "block" in done.stderr), done.stderr


def mutant(name: str) -> None:
    file, right, wrong, late = MUTANTS[name]
    with changed(file, right, wrong):
        check([layer(0, 1280, turned=True), layer(1, 1280)], late=late)
        test_the_same_bits_in_any_order_of_threads()
        test_stages_go_round(2816)
