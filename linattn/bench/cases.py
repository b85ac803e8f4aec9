"""What is measured, what it is compared with, and what is required of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from linattn.errors import OptionError

HEADS, WIDTH = 8, 64  # H, and D = E; B = 1 and float32 everywhere
ITEM = 4  # bytes of a float32
OF_MODELS = "training", "decoding", "generating", "layer", "attention", "norm"  # what `--models` measures

Implementation = Literal["torch", "numpy", "softmax", "released cosFormer"]
Call = Literal["decay", "plain", "cosformer", "softmax"]
Quantity = Literal["time", "time per token", "extra memory", "extra memory per token"]


@dataclass(frozen=True)
class Figure:
    """One causal call to measure: whose, which, and how many tokens."""

    implementation: Implementation
    call: Call
    n: int
    backward: bool = False

    @property
    def label(self) -> str:
        call = "" if self.implementation in ("softmax", "released cosFormer") else f" {self.call}"
        return f"{self.implementation}{call}{' forward + backward' if self.backward else ''}, N={self.n}"

    @property
    def needs_torch(self) -> bool:
        return self.implementation != "numpy"


@dataclass(frozen=True)
class Limit:
    """What a ratio has to be: "at least" for speedups, "at most" for ratios of ours to a peer's."""

    kind: Literal["at least", "at most"]
    value: float

    def met_by(self, ratio: float) -> bool:
        return ratio >= self.value if self.kind == "at least" else ratio <= self.value

    def __str__(self) -> str:
        if self.kind == "at least":
            return f"at least {self.value:g} times as fast"
        return f"at most {self.value:g}" if self.value >= 0.1 else f"under 1/{1 / self.value:g}"


@dataclass(frozen=True)
class Comparison:
    """Two figures side by side. `peer` None stands for one array of N·D·E per head, as its size alone.

    speedup: the ratio is the peer's over ours (how many times as fast we are), not ours over the peer's.
    """

    quantity: Quantity
    ours: Figure
    peer: Figure | None
    limit: Limit | None = None
    speedup: bool = False


@dataclass(frozen=True)
class Case:
    """Comparisons that belong together, under the name that `--case` takes."""

    name: str
    comparisons: tuple[Comparison, ...]
    figures: tuple[Figure, ...] = ()  # measured besides those that are compared

    def measured(self) -> list[Figure]:
        """Every figure of the case, each once."""
        pairs = [figure for c in self.comparisons for figure in (c.ours, c.peer) if figure is not None]
        return list(dict.fromkeys([*pairs, *self.figures]))


def ndes(figure: Figure) -> int:
    """Bytes of the array that a causal sum needs when it keeps the state of every token: N·H·D·E floats."""
    return figure.n * HEADS * WIDTH * WIDTH * ITEM


LINEAR: tuple[tuple[Implementation, Call, bool], ...] = (
    ("torch", "decay", False),
    ("torch", "plain", False),
    ("numpy", "decay", False),
    ("numpy", "plain", False),
    ("torch", "decay", True),
    ("torch", "plain", True),
)


def _linear(long: Figure, short: Figure) -> Case:
    """Time and memory per token do not grow with N, and no array of N·D·E per head is kept."""
    return Case(
        f"{long.implementation}-{long.call}{'-backward' if long.backward else ''}",
        (
            Comparison("time per token", long, short, Limit("at most", 1.5)),
            Comparison("extra memory per token", long, short, Limit("at most", 1.1)),
            # such an array alone would make this ratio 1
            Comparison("extra memory", long, None, Limit("at most", 0.25)),
        ),
    )


def _all(divide: int) -> list[Case]:
    """Every case, its lengths divided by `divide`."""

    def figure(who: Implementation, call: Call, n: int, backward: bool = False) -> Figure:
        return Figure(who, call, max(1, n // divide), backward)

    ours, released = figure("torch", "cosformer", 2048), figure("released cosFormer", "cosformer", 2048)
    train, softmax = figure("torch", "decay", 4096, True), figure("softmax", "softmax", 4096, True)
    same_call = [
        (figure("numpy", call, n), figure("torch", call, n))
        for call in ("decay", "plain")
        for n in (16384, 65536)
    ]
    against_softmax = [
        (figure("torch", "decay", n), figure("softmax", "softmax", n), Limit("at least", times))
        for n, times in ((4096, 5), (32768, 25))
    ]
    return [
        *(_linear(figure(*line[:2], 65536, line[2]), figure(*line[:2], 16384, line[2])) for line in LINEAR),
        Case("numpy-torch", tuple(Comparison("time", *pair, Limit("at most", 1.5)) for pair in same_call)),
        Case(
            "cosformer",
            (
                Comparison("time", ours, released, Limit("at least", 50), speedup=True),
                Comparison("extra memory", ours, released, Limit("at most", 0.01)),
            ),
        ),
        Case("softmax", tuple(Comparison("time", *row, speedup=True) for row in against_softmax)),
        Case(
            "softmax-backward",
            (
                Comparison("time", train, softmax, speedup=True),
                Comparison("extra memory", train, softmax),
            ),
        ),
    ]


CASES = tuple(case.name for case in _all(1))


def cases(names: Sequence[str] = (), *, divide: int = 1) -> list[Case]:
    """Return the named cases (all of them for none), in their own order, with lengths divided by `divide`.

    Raises OptionError for a name that does not exist.
    """
    for name in names:
        if name not in CASES:
            raise OptionError(f"no case named {name!r}; known: {', '.join(CASES)}")
    return [case for case in _all(divide) if not names or case.name in names]


def curves(*, divide: int = 1) -> Case:
    """The figures of the picture: forward passes over many lengths, as far as each goes within seconds."""
    lines: tuple[tuple[Implementation, Call, int], ...] = (
        ("torch", "decay", 65536),
        ("numpy", "decay", 65536),
        ("softmax", "softmax", 32768),
        ("released cosFormer", "cosformer", 2048),
    )
    return Case(
        "curves",
        (),
        tuple(
            Figure(implementation, call, 2**power // divide)
            for implementation, call, longest in lines
            for power in range(9, 17)
            if 2**power <= longest
        ),
    )
