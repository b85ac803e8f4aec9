"""The product on Hopper's tensor cores (hopper.cu): which launches it takes, and what it is told."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from linattn.arrays import Array
from linattn.backends.cupy import sources, tensor
from linattn.backends.cupy.memory import address, room, strides
from linattn.problem import Problem

if TYPE_CHECKING:
    from linattn.backends.cupy.launch import Call

BLOCK, TILE = 64, 64 * 128  # tokens of a step; bytes of a tile of 64 features
FARTHEST = 1 << 40  # bytes between neighbours, for the unit that copies


CAPABILITY = 90  # times ten, as `sm_90a` asks for


def refusal(problem: Problem, d: int, e: int, *, gradient: bool = False) -> str | None:
    """None if the kernel takes a call's products of d contracted features with e, else what it does not."""
    if problem.dtype != "bfloat16":
        return f"takes bfloat16, got {problem.dtype}"
    if not problem.causal:
        return "takes causal calls"
    if problem.decay == "token":
        return "takes one decay a head, not one a token"
    if problem.reweight == "lrpe":
        return "takes one angle for all features, or none"
    widths = (64,) if problem.reweight else (64, 128)
    if d not in widths:
        return f"takes D of {' or '.join(map(str, widths))}, got {d}"
    if e % 64 or not e:
        return f"takes E in multiples of 64, got {e}"
    for option in ("key_mask", "lengths", "packed", "slots"):
        if getattr(problem, option):
            return f"does not take {option}"
    if gradient and problem.normalize:
        return "forms no gradients of a normaliser"
    return None


def describe(problem: Problem, capability: int) -> str:
    """Which kernels compute a call, and why not this one, where it does not."""
    others = tensor.describe(problem, capability)
    if capability != CAPABILITY:
        return others
    why = refusal(problem, problem.d, problem.e)
    if why is not None:
        return f"{others}; the kernel for Hopper {why}"
    if problem.needs_grad and (why := refusal(problem, problem.e, problem.d, gradient=True)) is not None:
        return f"on tensor cores (hopper.cu), gradients {others}; the kernel for Hopper {why}"
    return "on tensor cores (hopper.cu)"


def copied_by_tiles(*arrays: Array) -> bool:
    """Whether bulk copies can move arrays [B N H features]: gaps of 16 bytes, features without any."""
    for array in arrays:
        steps = strides(array)
        gaps = [step for step, size in zip(steps, array.shape, strict=True) if size > 1]
        if address(array) % 16 or (steps[3] != 1 and array.shape[3] > 1):
            return False
        if any(gap * 2 % 16 or not 0 < gap * 2 < FARTHEST for gap in gaps[: len(gaps) - 1]):
            return False
    return True


def takes(
    call: Call, x: Array, y: Array, w: Array, out: Array, *, raw: Array | None, rows: Array | None,
    gradient: bool,
) -> bool:  # fmt: skip
    """Whether one product of a call, whose options `product` has looked at, can be the kernel's."""
    if gradient and (raw is None or not copied_by_tiles(raw)):
        return False
    if gradient and rows is not None and rows.shape[0] * 64 != w.shape[3]:
        return False
    return (
        call.run.capability(y) == CAPABILITY
        and refusal(call.problem, y.shape[3], w.shape[3], gradient=gradient) is None
        and y.shape[1] > 0
        and copied_by_tiles(x, y, w, out)
    )


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.lru_cache(maxsize=4096)
def encoded(at: int, shape: tuple[int, ...], steps: tuple[int, ...]) -> bytes:
    """The driver's description of an array [B N H features] of 2-byte numbers, for tiles of 64 tokens."""
    b, n, h, features = shape
    found = ctypes.create_string_buffer(128 + 64)
    start = -ctypes.addressof(found) % 64
    sizes = (ctypes.c_uint64 * 4)(features, h, n, b)
    gaps = [2 * step if size > 1 else 16 * -(-features // 8) for step, size in zip(steps, shape, strict=True)]
    code = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(found) + start), 9, 4, ctypes.c_void_p(at), sizes,
        (ctypes.c_uint64 * 3)(gaps[2], gaps[1], gaps[0]), (ctypes.c_uint32 * 4)(64, 1, BLOCK, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1), 0, 3, 3, 0,
    )  # fmt: skip
    if code:
        raise RuntimeError(f"cuTensorMapEncodeTiled refused {shape} with steps {steps}: error {code}")
    return found.raw[start : start + 128]


def maps(arrays: Sequence[Array]) -> bytes:
    """Of arrays on the current device."""
    return b"".join(encoded(address(a), tuple(a.shape), strides(a)) for a in arrays)


def pieces(units: int, steps: int, multiprocessors: int) -> int:
    """Into how many pieces sequences are cut, so that few heads use all multiprocessors."""
    return max(1, min(multiprocessors // max(1, units), steps // 8, 16))


def launch(
    call: Call, *, x: Array, y: Array, w: Array, out: Array, raw: Array | None = None,
    values: dict[str, float], reverse: bool = False, gradient: bool = False, normalize: bool = False,
    rows: bool = False,
) -> None:  # fmt: skip
    """Start it on one product; `values` are the arguments of product.cu, of which it reads a part.

    rows: keeps phi(raw) . gradient of every 64 columns.
    """
    problem = call.problem
    b, n, h, d = y.shape
    e = w.shape[3]
    angles, decay = problem.reweight == "cosine", problem.decay is not None
    consumers = 1 if e % 128 or angles else 2  # two states for angles take the registers of one
    feature, rows = sources.FEATURES[problem.feature_map], rows and gradient
    reads_raw = gradient and (feature > 0 or rows)
    stages = (3 if d == 128 else 4) - (reads_raw and consumers == 2)
    numbers = (d, consumers, stages, feature, angles, decay, reverse, normalize, gradient, rows)
    multiprocessors = call.run.multiprocessors(y)
    units = b * h * (e // (64 * consumers))
    cut = 1 if problem.batch_invariant else pieces(units, -(-n // BLOCK), multiprocessors)
    if cut > 1:
        states = (2 if angles else 1) * d
        partial = room(y, (b, h, cut - 1, states, e), "float32")
        sums = room(y, (b, h, cut - 1, 8 * d), "float32") if normalize else None
        values = values | {"partial": address(partial), "partial_den": address(sums)}
    arguments = (
        call.run.maps(x, y, w, raw if reads_raw and raw is not None else w, out)
        + sources.packed("product.cu", "Arguments", values)
        + cut.to_bytes(8, "little")
    )
    arguments += bytes(-len(arguments) % 64)
    for output in (False, True) if cut > 1 else (True,):
        kernel = sources.expression("hopper", (), (*numbers, output), "Tiled")
        grid = min(units * (cut - (not output)), multiprocessors)
        call.run("hopper.cu", kernel, arguments, grid, 128 * (1 + consumers), shared(*numbers, output), y)


def shared(
    d: int, consumers: int, stages: int, feature: int, angles: int, decay: int, reverse: int, normalize: int,
    gradient: int, rows: int, output: int,
) -> int:  # fmt: skip
    """Bytes of shared memory, as `Places` of stages.cuh counts them."""
    tiles, states = d // 64, 2 if angles else 1
    reads_raw = output and gradient and (feature or rows)
    stage = (2 * tiles + (2 if reads_raw else 1) * consumers) * TILE + normalize * tiles * 1024
    stage += 2 * states * 4 * BLOCK if decay or angles else 0
    stage = -(-stage // 1024) * 1024
    own = states * tiles * TILE + TILE + 1024
    return stages * stage + consumers * own + 24 * stages
