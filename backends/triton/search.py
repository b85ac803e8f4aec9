"""Which launch configurations are tried for which calls, and which of them is kept. No GPU is needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from linattn.backends.triton import plan
from linattn.backends.triton.plan import Blocks
from linattn.backends.triton.tuned import SLICES, STAGES, TOKENS, WARPS, Family
from linattn.errors import LinattnError, OptionError

BETTER = 0.97  # a configuration is kept if it takes less than this share of the shipped one's time
FINALISTS = 5  # of the fastest configurations that are checked on further calls, one after the other
QUICK = 8  # what --quick divides lengths by
DTYPES = ("bfloat16", "float16", "float32")

# what a case is called -> options of its calls; with "-backward", the gradients' kernels are tuned
KINDS: dict[str, dict[str, Any]] = {
    "forward": {"decay": "head"},
    "cosformer": {"reweight": "cosine", "feature_map": "relu", "normalize": True},
    "lrpe": {"reweight": "lrpe", "decay": "head"},
}
BACKWARD = "backward"
DEFAULT = (
    "forward 128",
    "forward 64",
    "cosformer 64",
    "lrpe 128",
    "backward 128",
    "backward 64",
    "cosformer-backward 64",
    "lrpe-backward 128",
)


@dataclass(frozen=True)
class Sample:
    """One call of `attention` on random tensors, described.

    grad: "no"; "only" times the gradients alone; "both" also looks at the output.
    """

    b: int
    h: int
    n: int
    d: int
    e: int
    dtype: str
    decay: str | None = None
    reweight: str | None = None
    feature_map: str | None = None
    normalize: bool = False
    causal: bool = True
    masked: bool = False
    state: bool = False
    precision: str = "ieee"
    grad: str = "no"


@dataclass(frozen=True)
class Target:
    """One family, the calls that are timed for it, and further ones that have to come out right."""

    family: Family
    cases: tuple[str, ...]
    timed: tuple[Sample, ...]
    checked: tuple[Sample, ...]

    @property
    def shipped(self) -> Blocks:
        """The configuration of the library."""
        of = self.family
        return plan.blocks(of.operand, of.d, of.e, of.two, of.gradient)


def targets(names: Sequence[str] = (), dtype: str = "bfloat16", *, quick: bool = False) -> list[Target]:
    """What to search for the cases of these names; cases of one family are timed together. None: `DEFAULT`.

    A name is a kind and D, or D and E: "forward 128", "lrpe-backward 128 64" (hyphens do as well as spaces).

    Raises OptionError for a case that does not exist.
    """
    found: dict[Family, Target] = {}
    for name in names or DEFAULT:
        kind, d, e = _case(name)
        back = kind.endswith(BACKWARD)
        options = KINDS[kind.removesuffix(BACKWARD).removesuffix("-") or "forward"]
        two = "reweight" in options
        operand = "bfloat16" if dtype == "bfloat16" else "float32"
        family = Family.of(operand, *((e, d) if back else (d, e)), two, back)
        b, h, n = (4, 32, 8192) if max(d, e) > 64 or two else (8, 16, 4096)
        sample = Sample(b, h, n // QUICK if quick else n, d, e, dtype, grad="only" if back else "no")
        sample = replace(sample, **options)
        known = found.get(family) or Target(family, (), (), checks(family, d, e, dtype))
        found[family] = replace(known, cases=(*known.cases, name), timed=(*known.timed, sample))
    return list(found.values())


def _case(name: str) -> tuple[str, int, int]:
    kinds = [*KINDS, BACKWARD, *(f"{kind}-{BACKWARD}" for kind in KINDS if kind != "forward")]
    words = name.replace("-", " ").split()
    sizes = [int(word) for word in words if word.isdecimal()]
    kind = "-".join(word for word in words if not word.isdecimal())
    exact = all(size in (16, 32, 64, 128, 256) for size in sizes)
    if kind not in kinds or len(sizes) not in (1, 2) or not exact or words[: -len(sizes)] != kind.split("-"):
        raise OptionError(
            f"no case named {name!r}; a case is one of {', '.join(kinds)}, and D, or D and E, out of "
            f"16, 32, 64, 128, 256: {DEFAULT[0]!r}"
        )
    return kind, sizes[0], sizes[-1]


def checks(family: Family, d: int, e: int, dtype: str) -> tuple[Sample, ...]:
    """Short calls that use the family's kernels in other ways: a configuration has to be right in all."""
    base = Sample(2, 3, 333, d, e, dtype, grad="both")
    long = replace(base, b=1, h=1, n=4133, decay="head")  # cut into segments
    names = ("cosine", "lrpe") if family.two else (None,)
    found = []
    for name in names:
        found += [
            replace(base, reweight=name),
            replace(base, reweight=name, decay="token", feature_map="elu+1", normalize=True),
            replace(base, reweight=name, decay="head", feature_map="silu", state=True),
            replace(base, reweight=name, feature_map="relu", normalize=True, causal=False, masked=True),
            replace(base, reweight=name, decay="head", causal=False),
            replace(long, reweight=name, feature_map="relu", normalize=True),
        ]
    if dtype != "bfloat16":  # families of float32 products are shared by both dtypes and by tf32
        other = "float16" if dtype == "float32" else "float32"
        found += [replace(sample, dtype=other) for sample in found[1:3]]
        found += [replace(sample, dtype="float32", precision="tf32") for sample in found[1:3]]
    return tuple(found)


def candidates(family: Family, *, quick: bool = False) -> list[Blocks]:
    """Every configuration that is tried, without those that never fit into registers."""
    tokens = [c for c in TOKENS if c > 16 or family.operand == "float32"]
    slices = [size for size in SLICES if size <= family.e]
    stages = STAGES[:2] if quick else STAGES
    ways = (True,) if family.operand == "float32" else (True, False)
    found = itertools.starmap(Blocks, itertools.product(tokens, slices, WARPS, stages, ways))
    return [blocks for blocks in found if _fits(blocks, family, quick)]


def _fits(blocks: Blocks, family: Family, quick: bool) -> bool:
    if blocks.c == 128 and (quick or blocks.warps < 8 or blocks.stages > 3 - blocks.across or family.two):
        return False
    if not blocks.across and blocks.block_e != plan.UPRIGHT:
        return False
    if blocks.warps == 8 and blocks.c * blocks.block_e < 2048:
        return False
    return not (quick and blocks.block_e < min(32, family.e))


class Died(Exception):
    """A worker is gone: what it was doing is not tried again.

    done: why a configuration does not compile, or None, for those that were finished; begun: those that were
    not.
    """

    def __init__(self, why: str, done: dict[Blocks, str | None], begun: Sequence[Blocks]) -> None:
        super().__init__(why)
        self.done, self.begun = done, tuple(begun)


@dataclass(frozen=True)
class Answer:
    """Milliseconds of every timed call, beside the shipped configuration's; or why there are none."""

    ms: tuple[float, ...] = ()
    shipped: tuple[float, ...] = ()
    why: str | None = None

    @property
    def share(self) -> float:
        """The mean share of the shipped configuration's time."""
        return sum(ours / theirs for ours, theirs in zip(self.ms, self.shipped, strict=True)) / len(self.ms)


class Worker(Protocol):
    """What runs configurations of one target. Every method but `close` raises Died."""

    def compile(self, blocks: Sequence[Blocks]) -> dict[Blocks, str | None]:
        """Compile configurations side by side; why one does not, or None."""

    def time(self, blocks: Blocks) -> Answer:
        """Compare the timed calls' results with the shipped configuration's, and time them."""

    def check(self, blocks: Blocks) -> Answer:
        """Compare the further calls' results too, and time both configurations again, in turns."""

    def close(self) -> None:
        """End it."""


@dataclass
class Outcome:
    """What was found for one target. why: the reason for which there is nothing."""

    target: Target
    shipped: Blocks
    best: Blocks | None = None  # None: the shipped one stays
    answer: Answer | None = None  # of `best`, or of the fastest that was checked
    skipped: dict[Blocks, str] = field(default_factory=dict)
    tried: int = 0
    why: str | None = None

    def entry(self) -> dict[str, object] | None:
        """What the file says about the family; None: nothing, as the shipped configuration stays."""
        if self.best is None or self.answer is None:
            return None
        blocks = self.best
        sizes = asdict(blocks)
        ms = {"ms": [round(x, 5) for x in self.answer.ms]}
        return {**sizes, **ms, "shipped_ms": [round(x, 5) for x in self.answer.shipped]}


Start = Callable[[Target], Worker]
Step = Callable[[str], None]


class Search:
    """The search for one target: a worker at a time, a new one where one has died.

    start: makes a worker; it raises LinattnError where not even the shipped configuration works. step: told
    before each configuration.
    """

    def __init__(self, target: Target, start: Start, step: Step = lambda _: None) -> None:
        self.target, self.start, self.step = target, start, step
        self.worker: Worker | None = None

    def run(self, tried: Sequence[Blocks]) -> Outcome:
        """Return the best configuration; nothing that a configuration does is raised."""
        outcome = Outcome(self.target, self.target.shipped, tried=len(tried))
        tried = [blocks for blocks in tried if blocks != outcome.shipped]
        try:
            self._search(outcome, tried)
        except LinattnError as error:
            outcome.why, outcome.best = str(error), None
        finally:
            self._close()
        return outcome

    def _search(self, outcome: Outcome, tried: Sequence[Blocks]) -> None:
        self.step("compile")
        compiled = self._compile(tried)
        outcome.skipped = {blocks: why for blocks, why in compiled.items() if why is not None}
        ranked: list[tuple[float, Blocks]] = []
        for blocks in tried:
            self.step(text(blocks))
            if blocks not in outcome.skipped:
                answer = self._ask("time", blocks)
                if answer.why is not None:
                    outcome.skipped[blocks] = answer.why
                else:
                    ranked.append((answer.share, blocks))
        ranked.sort(key=lambda pair: pair[0])
        for share, blocks in ranked[:FINALISTS]:
            if share >= BETTER:
                return
            self.step(f"check {text(blocks)}")
            answer = self._ask("check", blocks)
            if answer.why is not None:
                outcome.skipped[blocks] = answer.why
                continue
            if outcome.answer is None:
                outcome.answer = answer
            if answer.share < BETTER:
                outcome.best, outcome.answer = blocks, answer
                return

    def _working(self) -> Worker:
        if self.worker is None:
            self.worker = self.start(self.target)
        return self.worker

    def _close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _ask(self, what: str, blocks: Blocks) -> Answer:
        worker = self._working()
        try:
            return worker.time(blocks) if what == "time" else worker.check(blocks)
        except Died as death:
            self._close()
            return Answer(why=str(death))

    def _compile(self, tried: Iterable[Blocks]) -> dict[Blocks, str | None]:
        """Compile all side by side; those among which a worker died, one by one."""
        found: dict[Blocks, str | None] = {}
        batches = [list(tried)]
        while batches:
            batch = batches.pop(0)
            if not batch:
                continue
            worker = self._working()
            try:
                found |= worker.compile(batch)
            except Died as death:
                self._close()
                found |= death.done
                left = [blocks for blocks in batch if blocks not in death.done]
                if len(batch) == 1:
                    found |= dict.fromkeys(left, str(death))
                    continue
                suspects = [blocks for blocks in left if blocks in death.begun] or left[:1]
                rest = [blocks for blocks in left if blocks not in suspects]
                batches = [*([blocks] for blocks in suspects), rest, *batches]
        return found


def text(blocks: Blocks) -> str:
    """A configuration in a word: "64x128, 8 warps, 3 stages, across"."""
    way = ", across" if blocks.across else ""
    return f"{blocks.c}x{blocks.block_e}, {blocks.warps} warps, {blocks.stages} stages{way}"
