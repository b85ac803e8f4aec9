"""Without a GPU: what its driver would be told, and what is said where something is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import linattn
from linattn import known, registry
from linattn.backends.cupy import gpu, tape
from linattn.backends.cupy.gpu import Gpu
from linattn.cli.explain import describe
from linattn.errors import UnsupportedError
from tests.cupy import pretended


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CuPy's place is taken, on a machine that has everything."""
    found = pretended.module()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    known.forget()
    tape._seen.clear()
    for function in (gpu.unavailable, gpu.limits):
        function.cache_clear()
    yield found
    known.forget()
    tape._seen.clear()
    gpu.unavailable.cache_clear()


def failing(error: Exception) -> Any:
    def fails() -> None:
        raise error

    return fails


def test_a_machine_that_has_everything_has_no_reason(cupy: Any) -> None:
    assert gpu.unavailable() is None


def test_a_driver_that_is_missing_is_named(cupy: Any) -> None:
    words = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    cupy.cuda.runtime.getDeviceCount = failing(RuntimeError(words))
    assert gpu.unavailable() == f"no CUDA device: {words}"


def test_no_device_is_no_driver(cupy: Any) -> None:
    cupy.cuda.runtime.getDeviceCount = lambda: 0
    assert gpu.unavailable() == "no CUDA device: CuPy finds none"


def test_a_compiler_that_is_missing_is_named(cupy: Any) -> None:
    words = "CuPy failed to load libnvrtc.so.13: OSError: cannot open shared object file"
    cupy.cuda.nvrtc.getVersion = failing(RuntimeError(words + "\n\nmore of it"))
    assert gpu.unavailable() == f"NVRTC, which compiles the kernels, cannot be loaded: {words}"


def test_cupy_may_be_missing_or_broken(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    said = gpu.unavailable()
    assert said is not None
    assert said.startswith("cupy is installed, but cannot be imported: ")
    gpu.unavailable.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (gpu.unavailable() or "").startswith("cupy is not installed: pip install 'linattn[cupy13]'")


def test_an_old_device_is_refused(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "limits", lambda index: (48 * 1024, 20, 61))
    problem = describe((2, 8, 3, 4), kind="cupy", device="cuda:1")
    wanted = "needs compute capability 7.0, cuda:1 has 6.1"
    assert registry.get("cupy").unsupported(problem) == wanted
    x = cupy.asarray(np.zeros((1, 4, 2, 8), np.float32))
    with pytest.raises(UnsupportedError, match=r"needs compute capability 7\.0, cuda:0 has 6\.1"):
        linattn.attention(x, x, x, backend="cupy")


def test_the_driver_is_told_where_arguments_are(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel parameter is a pointer to its value: directly, and from a tape."""
    told = []

    def launch(*words: int) -> None:
        *shape, stream, where, extra = words
        there = ctypes.c_uint64.from_address(where).value
        told.append((*shape, stream, extra, ctypes.string_at(there, 8)))

    cupy.cuda.driver.launchKernel = launch
    monkeypatch.setattr(gpu, "function", lambda file, kernel, index: types.SimpleNamespace(ptr=7))
    runner = Gpu()
    x = cupy.asarray(np.zeros(2, np.float32))
    arguments = (3).to_bytes(8, "little")
    runner("decode.cu", "decode<float>", arguments, 9, 128, 0, x)
    want = (7, 9, 1, 1, 128, 1, 1, 0, 5, 0, arguments)
    assert told == [want]

    def work(run: Any, x: Any) -> tuple[Any, ...]:
        run("decode.cu", "decode<float>", x.address.to_bytes(8, "little"), 9, 128, 0, x)
        return (x,)

    found = tape.Tape(runner, (x,))
    assert found.record((x,), work)
    found.play((x,))
    assert told[1:] == [(*want[:-1], x.data.ptr.to_bytes(8, "little"))]


def test_devices_become_the_current_one_and_do_not_stay(cupy: Any) -> None:
    with gpu.current(1):
        assert pretended.Device.current == 1
        with gpu.current(1):
            assert pretended.Device.current == 1
    assert pretended.Device.current == 0
