"""What is measured on a GPU: shapes, the bytes that none can avoid, the milliseconds required."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from linattn.errors import OptionError

Kind = Literal[
    "forward",
    "forward-backward",
    "cosformer",
    "cosformer-backward",
    "cosformer-not-causal",
    "lrpe",
    "decode",
]
SIZES = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes
SINGLE = SIZES["float32"]  # of states
LITTLE, MEDIANS = 300 * 10**6, 3  # bytes; a host that is late for a moment shows in calls that move less
QUICK = 16  # what --quick divides lengths (of decode, batches) by
CURVE = range(9, 16)  # powers of two: the lengths of the picture

WORDS: dict[Kind, str] = {
    "forward": "forward, decay per head",
    "forward-backward": "forward + backward, decay per head",
    "cosformer": "cosFormer, causal, forward",
    "cosformer-backward": "cosFormer, causal, forward + backward",
    "cosformer-not-causal": "cosFormer, not causal, forward",
    "lrpe": "LRPE with decay, forward",
    "decode": "decode step",
}


@dataclass(frozen=True)
class GpuCase:
    """One call on tensors of one dtype, D = E; a decode step has N = 1 and a float32 state.

    required: milliseconds, or None where nothing is asked for; of a decode step `replayed`, in a CUDA graph.
    share: of the floor, required on any card.
    """

    kind: Kind
    b: int
    h: int
    n: int
    d: int
    required: float | None = None
    backend: str = "triton"
    dtype: str = "bfloat16"
    replayed: bool = False
    share: float | None = None

    @property
    def shape(self) -> str:
        """B H N D, or B H D for a decode step."""
        sizes = (self.b, self.h, self.d) if self.kind == "decode" else (self.b, self.h, self.n, self.d)
        return " ".join(map(str, sizes))

    @property
    def name(self) -> str:
        words = [self.kind, self.shape]
        words += [
            word for word, usual in ((self.dtype, "bfloat16"), (self.backend, "triton")) if word != usual
        ]
        return " ".join(words)

    @property
    def backward(self) -> bool:
        return self.kind in ("forward-backward", "cosformer-backward")

    @property
    def array(self) -> int:
        """Bytes of one of q, k, v, o and their gradients."""
        return self.b * self.h * self.n * self.d * SIZES[self.dtype]

    @property
    def bytes(self) -> int:
        """What any implementation moves: q, k, v in and o out; backward, q, k, v, do in and three gradients
        out; a decode step reads and writes its state.
        """
        if self.kind == "decode":
            return 2 * self.b * self.h * self.d * self.d * SINGLE
        return self.array * (4 + 7 * self.backward)

    @property
    def medians(self) -> int:
        """How many medians the smallest is taken of, for ours and the peers alike."""
        return MEDIANS if self.bytes <= LITTLE else 1


def _decode(b: int, h: int, d: int, required: float) -> GpuCase:
    return GpuCase("decode", b, h, 1, d, required)


ALL: tuple[GpuCase, ...] = (
    GpuCase("forward", 4, 32, 2048, 128, 0.095),
    GpuCase("forward", 4, 32, 8192, 128, 0.35),
    GpuCase("forward", 4, 32, 32768, 128, 1.40),
    GpuCase("forward", 1, 32, 8192, 128, 0.135),
    GpuCase("forward", 1, 32, 131072, 128, 2.0),
    GpuCase("forward", 1, 8, 131072, 128, 0.62),
    GpuCase("forward", 8, 16, 4096, 64, 0.083),
    GpuCase("forward-backward", 4, 32, 8192, 128, 1.50),
    GpuCase("forward-backward", 4, 32, 32768, 128, 6.0),
    GpuCase("forward-backward", 1, 32, 131072, 128, 8.0),
    GpuCase("forward-backward", 1, 8, 131072, 128, 2.6),
    GpuCase("forward-backward", 8, 16, 4096, 64, 0.34),
    GpuCase("cosformer", 4, 32, 8192, 64, 0.40),
    GpuCase("cosformer", 1, 16, 65536, 64, 0.60),
    GpuCase("cosformer-backward", 4, 32, 8192, 64, 1.8),
    GpuCase("cosformer-not-causal", 4, 32, 8192, 64, 0.35),
    GpuCase("cosformer-not-causal", 1, 16, 65536, 64, 0.35),
    GpuCase("lrpe", 4, 32, 8192, 128, 0.95),
    _decode(1, 32, 128, 0.0065),
    _decode(16, 32, 128, 0.0230),
    _decode(128, 64, 128, 0.275),
    _decode(512, 32, 128, 0.540),
)
CUPY = (
    GpuCase("forward", 4, 32, 8192, 128, 0.33),
    GpuCase("forward", 4, 32, 32768, 128, 1.30),
    GpuCase("forward", 1, 32, 8192, 128, 0.12),
    GpuCase("forward", 8, 16, 4096, 64),
    GpuCase("forward-backward", 4, 32, 8192, 128),
    GpuCase("forward-backward", 4, 32, 32768, 128, 5.9),
    GpuCase("cosformer", 4, 32, 8192, 64, 0.30),
    GpuCase("forward", 4, 32, 2048, 64, 0.256, dtype="float32"),
    GpuCase("forward", 4, 32, 2048, 64, 0.52, dtype="float64"),
    GpuCase("decode", 1, 32, 1, 128, 0.005, replayed=True),
    GpuCase("decode", 128, 64, 1, 128, share=0.94),
)
"""Of the CuPy backend: kernels of its own, with requirements of their own."""
ALL += tuple(replace(case, backend="cupy") for case in CUPY)
KINDS: tuple[Kind, ...] = tuple(dict.fromkeys(case.kind for case in ALL))

# what is not a time on the device
HOST, MEMORY = "host", "memory"
HOST_SHAPE = (1, 16, 128, 64)  # B H N D: so small that only the way to the launch takes time
HOST_REQUIRED = 40.0  # microseconds of a forward call
MEMORY_CASE = GpuCase("cosformer-backward", 4, 32, 8192, 64)
MEMORY_REQUIRED = 2**30  # bytes beyond inputs and gradients


def chosen(names: Sequence[str] = (), *, quick: bool = False) -> tuple[list[GpuCase], list[str]]:
    """The cases of these names, in their own order, and which of "host" and "memory" are asked for.

    A name is a kind, a kind and a shape, or a backend: "forward", "forward 4 32 2048 128" (hyphens do as
    well), "cupy". None means all. quick: lengths and decode batches divided by 16.

    Raises OptionError for a name that does not exist.
    """
    asked = {name.replace(" ", "-") for name in names}
    ours = {case: {case.kind, case.backend, case.name.replace(" ", "-")} for case in ALL}
    known = {HOST, MEMORY}.union(*ours.values())
    for name in names:
        if name.replace(" ", "-") not in known:
            shown = ", ".join([*KINDS, HOST, MEMORY])
            raise OptionError(
                f"no case named {name!r} on a GPU; known: {shown}, and a kind with a shape: {ALL[0].name!r}"
            )
    cases = [case for case, own in ours.items() if not asked or asked & own]
    extras = [name for name in (HOST, MEMORY) if not asked or name in asked]
    return [shorter(case) if quick else case for case in cases], extras


def shorter(case: GpuCase) -> GpuCase:
    """A case that shows that everything works, of which nothing is required."""
    if case.kind == "decode":
        return replace(case, b=max(1, case.b // QUICK), required=None, share=None)
    return replace(case, n=case.n // QUICK, required=None, share=None)


def curves(free: int, *, quick: bool = False) -> list[GpuCase]:
    """The lines of the picture, B = 4, H = 32, D = 128: lengths whose arrays fit three times into `free`
    bytes.
    """
    lines = [
        GpuCase(kind, 4, 32, 2**power // (QUICK if quick else 1), 128)
        for kind in ("forward", "forward-backward")
        for power in CURVE
    ]
    return [case for case in lines if case.array * 11 * 3 <= free]
