"""A token of one text through all layers, in one kernel that stays on the device (persistent.cu).

Blocks wait for what others computed, so all of them are on the device at once, or none is. What they leave
for each other lies in memory that begins as zeros and belongs to one stream and one inner width: `room`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from linattn.arrays import Array
from linattn.backends.cupy import gpu, sources
from linattn.backends.cupy.memory import address

FILE = "persistent.cu"
CAPABILITY = 90  # times ten, as `sm_90a` asks for
WIDTH, HEADS, BLOCKS, THREADS = 1024, 8, 128, 384  # the kernel's
D, GROUPS = WIDTH // HEADS, 4
MOST = 40  # layers, which a launch is told of at once
STEP, WIDEST = 256, 3072  # inner widths of the channel mixer: multiples of STEP up to WIDEST


class Layer(NamedTuple):
    """What one layer reads and writes: weights [N, K] in bfloat16, everything else in float32.

    kv [8, F, 128] is its state, length [1] in int64 the tokens in it. log_decay [8], and theta [8, 128] where
    F is 256 and not 128, or None. All without gaps. eps: of the norms in front of both mixers; gate_eps: of
    the norm of o.
    """

    qkvu: Array
    out: Array
    l1: Array
    l2: Array
    l3: Array
    kv: Array
    log_decay: Array | None
    theta: Array | None
    length: Array
    eps: float
    gate_eps: float


def refusal(width: int, heads: int, inner: int, layers: int) -> str | None:
    """None if the kernel takes a decoder of these sizes, else what it does not."""
    if (width, heads) != (WIDTH, HEADS):
        return f"takes width {WIDTH} with {HEADS} heads, got {width} with {heads}"
    if inner % STEP or not 0 < inner <= WIDEST:
        return f"takes inner widths in multiples of {STEP} up to {WIDEST}, got {inner}"
    if not 0 < layers <= MOST:
        return f"takes 1 to {MOST} layers, got {layers}"
    return None


@functools.cache
def runs(index: int) -> bool:
    """Whether device number `index` has what the kernel needs."""
    if gpu.unavailable() is not None:
        return False
    shared, multiprocessors, capability = gpu.limits(index)
    return capability == CAPABILITY and multiprocessors >= BLOCKS and shared >= SHARED


@functools.cache
def compiles(feature_map: str | None, inner: int, index: int) -> bool:
    """Whether NVRTC makes the kernel and device number `index` loads it; where not, a warning says why."""
    try:
        gpu.function(FILE, _name(feature_map, inner), index)
    except RuntimeError as error:
        warnings.warn(
            f"{FILE} does not compile here, so steps take five kernels a layer: {gpu.first_line(error)}",
            stacklevel=2,
        )
        return False
    return True


def _name(feature_map: str | None, inner: int) -> str:
    return sources.expression("persistent", (), (sources.FEATURES[feature_map], inner))


def room(inner: int) -> int:
    """Bytes of the memory that blocks meet in (`Exchange` in persistent.cu)."""
    words = 32 + (1 + 2 + GROUPS) * WIDTH + HEADS * 16 * D + HEADS * 16 + BLOCKS + inner
    return 4 * words


SHARED = 228_624
"""Bytes of shared memory: 12 stages of weights, and the struct `Shared`."""


class End(NamedTuple):
    """What comes behind the layers: the norm, and a head [N, 1024] in bfloat16, whose outputs are logits."""

    head: Array
    logits: Array
    eps: float


def launch(
    x: Array, y: Array, layers: Sequence[Layer], feature_map: str | None, exchange: Array, end: End | None
) -> None:
    """Start it on rows x and y [1, 1024] in bfloat16; the states move on in place.

    end: then y is the last row normed, and its logits [1, N] are written as well. exchange: `room` bytes that
    were 0 before the first call, which only calls behind each other use, all of this inner width.
    """
    kernel = _name(feature_map, layers[0].l1.shape[0])
    gpu.start_together(FILE, kernel, told(x, y, layers, exchange, end), BLOCKS, THREADS, SHARED, x)


def told(x: Array, y: Array, layers: Sequence[Layer], exchange: Array, end: End | None = None) -> bytes:
    """The kernel's argument, `Call` in persistent.cu."""
    values: dict[str, float] = {
        "x": address(x), "y": address(y), "exchange": address(exchange), "layers": len(layers)
    }  # fmt: skip
    if end is not None:
        values |= {
            "head": address(end.head), "outputs": end.head.shape[0], "logits": address(end.logits),
            "eps": end.eps,
        }  # fmt: skip
    parts = [sources.packed(FILE, "Token", values)]
    for layer in layers:
        values = {
            name: value if isinstance(value, float) else address(value)
            for name, value in zip(Layer._fields, layer, strict=True)
        }
        parts.append(sources.packed(FILE, "Layer", values))
    parts += [sources.packed(FILE, "Layer", {})] * (MOST - len(layers))
    return b"".join(parts)
