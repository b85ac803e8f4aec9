"""The CUDA sources compile, without a GPU, to kernels that fit: NVRTC for what calls would start."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from linattn.backends.cupy import decode, persistent, sources
from tests.cupy.recorded import COSFORMER, H200, Kernel, decays, kernels, lrpe

pathfinder = pytest.importorskip("cuda.pathfinder", reason="NVRTC is not installed")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

ARCHITECTURES = ("sm_80", "sm_90a")
BFLOAT16 = ml_dtypes.bfloat16


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes, stores and loads
    shared: int


def checked(answer: Any) -> Any:
    error, *found = answer
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    return found[0] if found else None


@functools.cache
def compiled(file: str, name: str, architecture: str, more: str = "") -> Resources:
    """Compile one instantiation, as CuPy does; more: source behind the file's own."""
    text = sources.text(file) + more
    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), file.encode(), 0, [], []))
    checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    options = [*sources.OPTIONS, f"-arch={architecture}", "--ptxas-options=-v"]
    if file in sources.EXACT:  # which are compiled without CuPy, and so without its headers
        options.append("-ftz=true")
    else:
        options.append(f"-I{pathfinder.find_nvidia_header_directory('cudart')}")
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode()
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
    registers = re.search(r"Used (\d+) registers", text)
    assert registers is not None, text
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    shared = re.search(r"(\d+) bytes smem", text)
    return Resources(
        int(registers[1]), 0 if spills is None else int(spills[1]) + int(spills[2]),
        0 if shared is None else int(shared[1]),
    )  # fmt: skip


USUAL: dict[str, dict[str, Any]] = {
    "float32": {"log_decay": decays(), "decode": True},
    "float64": {"dtype": np.float64, "log_decay": decays(), "gradients": False},
    "bfloat16": {
        "dtype": BFLOAT16, "log_decay": np.full((2, 100, 3), -0.1), "feature_map": "elu+1", "gradients": False
    },
    "float16": {"dtype": np.float16, **COSFORMER, "gradients": False, "decode": True},
    "gradients": {"dtype": BFLOAT16, "log_decay": decays(), "feature_map": "relu", "d": 128, "e": 128},
}  # fmt: skip
MANY: dict[str, dict[str, Any]] = {
    f"{np.dtype(dtype).name} {name}": {"dtype": dtype, **options}
    for dtype in (np.float32, np.float64, np.float16, BFLOAT16)
    for name, options in {
        "head": {"log_decay": decays(), "state": True, "decode": True},
        "token": {"log_decay": np.full((2, 100, 3), -0.1), "feature_map": "elu+1"},
        "cosformer": COSFORMER | {"state": True, "decode": True},
        "lrpe": lrpe() | {"state": True, "decode": True},
        "two": COSFORMER | {"causal": False, "log_decay": decays()},
        "total": COSFORMER | {"causal": False, "key_mask": np.ones((2, 100), bool)},
        "packed": {"cu_seqlens": np.array([0, 30, 100]), "b": 1, "log_decay": decays()},
        "lengths": {"lengths": np.array([30, 100]), "log_decay": decays()},
    }.items()
}


HOPPER: dict[
    str, tuple[int, dict[str, Any]]
] = {  # bytes that may be spilled, by warps that wait for memory anyway
    "decay": (0, {"log_decay": decays(), "d": 128, "e": 128, "state": True}),
    "narrow": (0, {"log_decay": decays(), "feature_map": "silu"}),
    "wide": (0, {"log_decay": decays(), "feature_map": "relu", "d": 128, "e": 128}),
    "plain": (0, {"d": 128, "e": 64, "n": 2000}),
    "cosformer": (64, {**COSFORMER, "gradients": False}),
    "sums": (
        700,
        {
            "d": 128,
            "e": 128,
            "feature_map": "relu",
            "normalize": True,
            "log_decay": decays(),
            "gradients": False,
        },
    ),
}


MEASURES = """
static_assert(SLOTS * STAGE + sizeof(Shared) <= {persistent.SHARED}, "shared memory");
static_assert(sizeof(Exchange<{persistent.WIDEST}>) == {room}, "room");
static_assert(sizeof(Call) <= 4096 && THREADS == {persistent.THREADS}, "a launch");
"""


def check(found: list[Kernel], architecture: str, spilled: int = 0) -> None:
    """spilled: bytes of a thread that may be."""
    assert found
    for one in dict.fromkeys(found):
        resources = compiled(one.file, one.name, architecture)
        assert resources.spilled <= spilled, (one.name, resources)
        assert resources.registers * one.threads <= 65536, (one.name, resources)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", USUAL)
def test_usual_kernels_compile(name: str, architecture: str) -> None:
    check(kernels(**USUAL[name]), architecture)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_of_many_features_fit(dtype: str, normalize: bool) -> None:
    """Their constants lie in 48 KB of shared memory, which need no word to the driver."""
    wide = 16 // np.dtype(dtype).itemsize
    for d in (512, 513, decode.WIDEST):
        form, widest = decode.shape(4, d, 64, wide, True, normalize, 132), decode.power(d)
        numbers = form.threads, wide, form.lanes, form.at_once, widest, 0, 2, 1, normalize, d == widest
        name = sources.expression("decode", (dtype,), numbers, "Choice")
        assert compiled("decode.cu", name, "sm_90").shared <= 48 << 10


@pytest.mark.parametrize("name", HOPPER)
def test_kernels_for_hopper_compile(name: str) -> None:
    spilled, given = HOPPER[name]
    found = [one for one in kernels(dtype=BFLOAT16, architecture=90, **given) if one.file == "hopper.cu"]
    check(found, "sm_90a", spilled)
    assert all(one.shared <= H200.shared for one in found)


@pytest.mark.parametrize("inner", [256, 2048, 2816, 3072])
def test_the_kernel_for_all_layers_compiles(inner: int) -> None:
    """Without spilling, as what spills would wait for weights; its readers take what the others give."""
    resources = compiled("persistent.cu", f"persistent<2, {inner}>", "sm_90a")
    assert resources.spilled == 0 and resources.registers == 65536 // persistent.THREADS // 8 * 8


def test_python_and_the_kernel_for_all_layers_agree() -> None:
    text = sources.text("persistent.cu")
    for name in ("WIDTH", "HEADS", "BLOCKS", "MOST"):
        assert re.search(rf"\b{name} = {getattr(persistent, name)}\b", text), name
    assert [name for name, _ in sources.fields("persistent.cu", "Layer")] == [*persistent.Layer._fields]
    more = MEASURES.format(persistent=persistent, room=persistent.room(persistent.WIDEST))
    measured = compiled("persistent.cu", "persistent<2, 2816>", "sm_90a", more)
    assert measured.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", MANY)
def test_every_kernel_compiles(name: str, architecture: str) -> None:
    check(kernels(**MANY[name]), architecture, spilled=16)  # of float64, in one direction of two
