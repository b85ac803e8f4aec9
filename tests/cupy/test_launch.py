"""From a call to launches, without a GPU: what they look like, what they are told, what is refused."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import linattn
from linattn import State, registry
from linattn.backends.cupy import CupyBackend, decode, exact, hopper, launch, memory, sources
from linattn.backends.cupy.launch import Blocks, Room
from linattn.cli.explain import describe
from linattn.errors import UnsupportedError
from tests.cupy.hosted import COMPILER, library
from tests.cupy.recorded import COSFORMER, H200, Recorder, decays, kernels, lrpe

FILES = ("product.cu", "between.cu", "decode.cu", "hopper.cu")
NVCC = shutil.which("nvcc")
SMALL = Room(96 * 1024)  # what compute capability 7.0 has


@pytest.mark.parametrize("file", FILES)
def test_a_source_is_one_text(file: str) -> None:
    """CuPy's cache looks at the text alone: what it includes must be in it."""
    text = sources.text(file)
    assert '#include "' not in text
    assert "#pragma once" not in text
    assert text.count("enum Feature") == 1


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed, which says how large a struct is")
def test_arguments_are_packed_as_the_kernel_reads_them() -> None:
    packed = sources.packed("product.cu", "Arguments", {"eps": 0.5, "x": 7})
    assert len(packed) == library("product.cu").arguments_size()
    assert np.frombuffer(packed[-8:]) == 0.5
    assert np.frombuffer(packed[:8], np.int64) == 7


@pytest.mark.skipif(
    COMPILER is None, reason="g++ is not installed, which evaluates the formula of the source"
)
def test_shared_memory_is_counted_as_the_kernel_counts_it() -> None:
    count = library("product.cu").shared_bytes_of
    count.restype = ctypes.c_int64
    for blocks, size, f in itertools.product(launch.CHOICES, (4, 8), (1, 33, 64, 512)):
        sizes = (size, blocks.c, blocks.columns, f)
        assert blocks.shared(size, f) == count(*(ctypes.c_int64(x) for x in sizes))


def test_every_size_of_features_fits_everywhere() -> None:
    """Up to 256, where a block of threads may have 96 KB; a backward pass of LRPE computes in float64."""
    for dtype, d, e in itertools.product(
        ("float32", "bfloat16", "float64"), (1, 17, 64, 128, 256), (1, 64, 256)
    ):
        for reweight in (None, "cosine", "lrpe"):
            plain = describe((2, 8, 3, d), value_dim=e)
            problem = replace(
                plain, dtype=dtype, reweight=reweight, normalize=True, needs_grad=True, max_len=64
            )
            wide = 2 * max(d, e) > 256 and reweight is not None and (dtype == "float64" or reweight == "lrpe")
            assert (launch.too_large(problem, SMALL) is None) or wide, problem
            assert launch.too_large(problem, H200) is None, problem


def test_what_has_no_place_is_refused_before_any_work() -> None:
    runner = Recorder(Room(1 << 14))
    backend = CupyBackend(runner=runner, arrays={"numpy": False})
    x = np.ones((1, 4, 2, 64))
    with pytest.raises(UnsupportedError, match="need more than the 16 KB of shared memory"):
        linattn.attention(x, x, x, backend=backend)
    assert not runner.kernels


def test_blocks_are_no_wider_than_their_columns() -> None:
    assert H200.blocks(4, 64, 64) == Blocks(64, 64)
    assert H200.blocks(4, 64, 32) == Blocks(64, 32)
    assert H200.blocks(4, 64, 5) == Blocks(32, 16)
    assert SMALL.blocks(8, 256, 64) == Blocks(32, 32)
    assert Room(1000).blocks(4, 64, 64) is None


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"log_decay": decays()}, 5),  # forward; dq, dk, dv; suffixes of decays
        (COSFORMER, 5),  # forward; the denominator's gradient; dq, dk, dv
        (COSFORMER | {"causal": False}, 8),  # state, forward; denominator; two states, dq, dk, dv
        (lrpe() | {"causal": False}, 9),  # two directions of forward, dq, dk, dv; suffixes
    ],
    ids=["causal", "cosformer", "not causal", "both directions"],
)
def test_passes_are_few_launches(options: dict[str, Any], count: int) -> None:
    assert len(kernels(**options)) == count


def test_a_launch_covers_every_head_and_column() -> None:
    (found,) = kernels(b=2, h=3, d=64, e=100, gradients=False)
    assert (found.grid, found.threads) == (2 * 3 * 2, 256)
    assert found.shared <= H200.shared


def test_memory_is_described_for_arrays_of_any_library() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = np.arange(24.0).reshape(2, 3, 4)[:, ::-1]
    assert memory.strides(x) == (12, -4, 1)
    assert memory.address(x) == x.ctypes.data
    t = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2)
    assert memory.strides(t) == (1, 4, 12)
    assert memory.address(t) == t.data_ptr()
    assert memory.address(None) == 0
    assert memory.dense(x, "float64").flags.c_contiguous
    assert memory.dense(t, "float64").dtype == torch.float64


def test_a_machine_without_cupy_says_so() -> None:
    reason = registry.get("cupy").unavailable()
    assert reason is not None
    assert reason.startswith(("cupy is not installed", "no CUDA device", "NVRTC"))


def test_arrays_on_the_cpu_are_refused() -> None:
    problem = describe((2, 8, 3, 4), kind="torch", device="cpu")
    assert registry.get("cupy").unsupported(problem) == "takes arrays on CUDA devices, got cpu"


BF16 = ml_dtypes.bfloat16
HOPPER: dict[str, tuple[dict[str, Any], str | None]] = {
    "it": ({"d": 128, "e": 128, "log_decay": decays()}, None),
    "cosformer": (COSFORMER, None),
    "silu": ({"d": 128, "e": 256, "feature_map": "silu", "state": True}, None),
    "float16": ({"dtype": np.float16}, "takes bfloat16, got float16"),
    "odd": ({"d": 65}, "takes D of 64 or 128, got 65"),
    "wide": (COSFORMER | {"d": 128}, "takes D of 64, got 128"),
    "narrow": ({"e": 32}, "takes E in multiples of 64, got 32"),
    "lrpe": (lrpe(), "takes one angle for all features, or none"),
    "two ways": ({"causal": False}, "takes causal calls"),
    "tokens": ({"log_decay": np.full((2, 100, 3), -0.1)}, "takes one decay a head, not one a token"),
    "lengths": ({"lengths": np.array([30, 100])}, "does not take lengths"),
    "mask": ({"key_mask": np.ones((2, 100), bool)}, "does not take key_mask"),
}


@pytest.mark.parametrize("name", HOPPER)
def test_tensor_cores_take_what_they_can(name: str) -> None:
    given, why = HOPPER[name]
    options = {"dtype": BF16, "gradients": False, **given}
    files = {one.file for one in kernels(architecture=90, **options)}
    assert files == {"tensor.cu" if why else "hopper.cu"}
    assert {one.file for one in kernels(architecture=80, **options)} == {"tensor.cu"}
    assert {one.file for one in kernels(architecture=75, **options)} == {"product.cu"}
    x = np.ones((2, 100, 3, options.get("d", 64)), options["dtype"])
    v = np.ones((2, 100, 3, options.get("e", 64)), options["dtype"])
    backend = CupyBackend(runner=Recorder(architecture=90), arrays={"numpy": False})
    words = {name for name in options if name not in ("dtype", "gradients", "d", "e", "state")}
    said = str(linattn.explain(x, x, v, backend=backend, **{word: options[word] for word in words}))
    assert (why or "on tensor cores (hopper.cu)") in said


def test_gradients_without_sums_are_formed_on_tensor_cores_too() -> None:
    plain = [one.file for one in kernels(BF16, architecture=90)]
    assert plain == ["hopper.cu"] * 4
    decayed = kernels(BF16, architecture=90, feature_map="relu", log_decay=decays())
    assert [one.file for one in decayed] == ["hopper.cu"] * 4 + ["between.cu"]
    normalized = kernels(BF16, architecture=90, normalize=True, feature_map="relu")
    assert [one.file for one in normalized].count("hopper.cu") == 1


def test_few_heads_are_cut_into_pieces() -> None:
    def grids(**sizes: int) -> list[int]:
        return [one.grid for one in kernels(BF16, architecture=90, gradients=False, **sizes)]

    assert grids(b=4, h=32, n=8192) == [128]
    assert grids(b=1, h=32, n=8192) == [96, 128]  # what three pieces add, then four
    assert grids(b=40, h=32, n=8192) == [132]
    assert grids(b=1, h=1, n=500) == [1]


def test_what_bulk_copies_move() -> None:
    x = np.zeros((2, 10, 3, 64), BF16)
    assert hopper.copied_by_tiles(x, x[:, 1:], x[:, :, 1:])
    assert hopper.copied_by_tiles(np.zeros((1, 10, 3, 72), BF16)[..., 8:])
    for refused in (
        np.zeros((2, 10, 3, 65), BF16)[..., 1:],  # not at a multiple of 16 bytes
        np.zeros((2, 10, 3, 68), BF16)[..., :64],  # rows that are not
        np.zeros((2, 10, 64, 3), BF16).swapaxes(2, 3),  # features apart
        np.broadcast_to(x[:1], x.shape),  # one sequence twice
        x[:, ::-1],
    ):
        assert not hopper.copied_by_tiles(x, refused)


@pytest.mark.parametrize("name", ["it", "cosformer", "silu"])
def test_hopper_is_given_the_shared_memory_that_it_counts(name: str) -> None:
    """`Places` of the source, evaluated by a compiler."""
    if NVCC is None:
        pytest.skip("nvcc is not installed, which evaluates the formula of the source")
    found = kernels(BF16, architecture=90, **{"gradients": False, **HOPPER[name][0]})[0]
    options = found.name.partition("<")[2].removesuffix(">")
    text = sources.text("hopper.cu") + f'\nstatic_assert(Places<{options}>::BYTES == {found.shared}, "");\n'
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "places.cu"
        source.write_text(text)
        command = [NVCC, "-std=c++17", "-gencode=arch=compute_90a,code=compute_90a", "-ptx", "-o", os.devnull]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_decode_steps_ask_for_all_rows_at_once() -> None:
    large = decode.shape(8192, 128, 128, 4, turned=False, normalize=False, multiprocessors=132)
    assert large == decode.Shape(threads=256, lanes=16, at_once=8)
    assert large.slices(128, 4) == 2
    few = decode.shape(32, 128, 128, 4, turned=False, normalize=False, multiprocessors=132)
    assert 32 * few.slices(128, 4) >= 132
    for heads, d, e, wide, turned, normalize in itertools.product(
        (1, 300, 9000), (1, 33, 64, 256), (1, 20, 64, 256), (1, 4), (False, True), (False, True)
    ):
        found = decode.shape(heads, d, e, wide, turned, normalize, 132)
        assert found.threads % found.lanes == 0
        assert found.threads <= 512
        assert found.slices(e, wide) == 1 or not normalize


def test_a_normalized_decode_step_that_is_too_wide_is_refused() -> None:
    runner = Recorder()
    backend = CupyBackend(runner=runner, arrays={"numpy": False})
    q, v = np.ones((1, 2, 8)), np.ones((1, 2, 3001))
    state = State.zeros(q, 1, 2, 8, 3001, normalize=True)
    with pytest.raises(UnsupportedError, match="at most 1024 threads for a head; E = 3001 needs 4096"):
        linattn.decode_step(q, q, v, state, normalize=True, backend=backend)
    assert not runner.kernels
    assert state.length[0] == 0


def test_divisors_become_factors() -> None:
    for divisor in (1, 2, 3, 7, 32, 128, 1000, 2**31 - 1):
        of = decode.inverse(divisor) % (1 << 64)
        for x in (0, 1, divisor - 1, divisor, 2 * divisor - 1, 12345678, 2**31, 2**32 - 1):
            assert (x * of >> 64 if of else x) == x // divisor, (x, divisor)


def test_compiled_kernels_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "kernel.cubin"
    exact.keep(kept, b"name\0image")
    assert kept.read_bytes() == b"name\0image"
    assert list(kept.parent.iterdir()) == [kept]
    exact.keep(kept / "below a file", b"")  # refused by the disk: only the next compilation is lost
    assert list(tmp_path.rglob("*.cubin")) == [kept]
