"""Self-tuning peers: every configuration is compiled beforehand, and none is chosen by that."""

import sys
import types

import pytest

from linattn.bench import gpu_tuning
from linattn.bench.gpu_cases import GpuCase
from linattn.errors import LinattnError

triton = pytest.importorskip("triton", reason="Triton is not installed")
CASE = GpuCase("forward", 1, 2, 4096, 128)


class Kernel:
    """Stands in for a compiled function: counts how it is run, and cannot take one configuration."""

    def __init__(self, fn):
        self.fn, self.ran = fn, []

    def run(self, x, *, WIDTH, **_):
        self.ran.append(WIDTH)
        if WIDTH == 32:
            raise LinattnError("too wide")


def kernel(x, WIDTH):
    """The arguments that a tuner sees."""


@pytest.fixture
def tuner(monkeypatch):
    """A tuner with three configurations in a module of fla, called by both of its functions."""
    from triton.runtime.autotuner import Autotuner

    configs = [triton.Config({"WIDTH": width}) for width in (16, 32, 64)]
    found = Autotuner(Kernel(kernel), ["x", "WIDTH"], configs, ["x"], None, None, cache_results=True)
    module = types.ModuleType("fla.ops.simple_gla")
    module.hidden = triton.runtime.autotuner.Heuristics(found, ["x", "WIDTH"], {})

    def chunk_simple_gla(q, k, v, *, g_gamma, scale):
        found.run(q.shape[1])
        return v, None

    module.chunk_simple_gla = chunk_simple_gla
    for name, stub in {
        "fla": types.ModuleType("fla"),
        "fla.ops": types.ModuleType("fla.ops"),
        "fla.ops.simple_gla": module,
    }.items():
        monkeypatch.setitem(sys.modules, name, stub)
    return found


def test_tuners_are_found_under_their_wrappers(tuner):
    assert gpu_tuning.autotuners() == [tuner]


def test_everything_is_compiled_and_nothing_is_chosen(tuner):
    assert gpu_tuning.compile_tuned([CASE], 100.0, device="cpu") > 0
    assert set(tuner.fn.ran) == {16, 32, 64}
    assert tuner.cache == {}
    assert tuner.cache_results is True
    assert tuner.do_bench.keywords == {"warmup": gpu_tuning.WARM_UP, "rep": gpu_tuning.REPEAT}


def test_lengths_do_not_matter_and_time_is_limited(tuner):
    gpu_tuning.compile_tuned([CASE, GpuCase("forward", 1, 2, 8192, 128)], 100.0, device="cpu")
    assert sorted(tuner.fn.ran)[1:] == [16, 32, 64]  # and once more what was run instead of a choice
    tuner.fn.ran.clear()
    gpu_tuning.compile_tuned([CASE], -1.0, device="cpu")
    assert tuner.fn.ran == []


def test_a_peer_that_is_missing_is_the_run_s_business(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    assert gpu_tuning.compile_tuned([CASE], 100.0, device="cpu") >= 0
