"""No races in shared memory; and what looks for them sees them where a barrier is taken out."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linattn import testing
from linattn.backends.cupy import sources
from tests.cupy import hosted, test_persistent
from tests.cupy.test_hosted import Hosted
from tests.cupy.test_mutants import changed
from tests.cupy.test_warps import SUBJECTS, subject
from tests.triton.drawing import check, drawn, rows

pytestmark = pytest.mark.skipif(
    hosted.COMPILER is None, reason="g++ is not installed, by which the kernels run on a CPU"
)

ROOT = Path(__file__).parents[2]
LENGTHS = 33, 70, 130
BARRIER = r"(?:meet\(1, READERS\)|__syncthreads\(\)|__syncwarp\(\));"
# of a source, barriers without which threads race, and whose calls tell
NEEDED = {
    # without the first two nothing runs; the fifth one holds looks back, the last one is for other blocks
    "persistent.cu": ("persistent", [2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
    "product.cu": ("product", [0, 3, 4, 5, 6]),
    "tensor.cu": ("bfloat16", [0, 1, 2, 3, 4, 5, 6]),
}
QUICK = ("product.cu", 5), ("tensor.cu", 3)
ALL = [(file, i) for file, (_, found) in NEEDED.items() for i in found]


@contextlib.contextmanager
def watched() -> Iterator[None]:
    hosted.ALSO[:] = hosted.RACES
    hosted.library.cache_clear()
    yield
    hosted.ALSO.clear()
    hosted.library.cache_clear()


def run(kind: str, step: int = 4) -> None:
    """Calls of kernels, forward and backward, that end the process where they race: each `step`-th of all."""
    with watched():
        if kind == "persistent":
            for seed in range(1 if step > 1 else 8):  # which says what block is looked at
                layers = [test_persistent.layer(i, 2816, turned=i == 0) for i in range(2)]
                test_persistent.check(layers, outputs=9000, seed=seed)
            return
        of: testing.BackendSubject = Hosted() if kind == "product" else subject(kind)
        name = "gradients_match_the_reference"
        assert check(of, name, (drawn(name, row, LENGTHS, 0) for row in [*rows(of, name)][::step]))


MUTANTS: list[tuple[str, str, str]] = [
    # a lane that arrives for its warp has not heard what the others have read
    (
        "persistent.cuh", "i < stages; ++i) arrive((uint64_t*)((char*)(ring.empty + slot(i))",
        "i < 32 * stages; ++i) if (!lane) arrive((uint64_t*)((char*)(ring.empty + slot(i / 32))",
    ),
    # one place for numbers that lie in two by turns
    ("persistent.cu", "parts + i % 2 * PARTS", "parts"),
    ("persistent.cu", "first += TOGETHER, turn ^= 1", "first += TOGETHER"),
]  # fmt: skip


def mutated(which: int) -> None:
    with changed(*MUTANTS[which]):
        run("persistent")


def without(file: str, which: int) -> None:
    """The same, without one barrier."""
    text = (sources.FOLDER / file).read_text(encoding="utf-8")
    found = [*re.finditer(BARRIER, text)][which]
    around = text[found.start() - 60 : found.end() + 60]
    with changed(file, around, around.replace(text[found.start() : found.end()], ";")):
        run(NEEDED[file][0])


def outcome(call: str) -> subprocess.CompletedProcess[str]:
    code = f"from tests.cupy.test_races import mutated, run, without; {call}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


KINDS = "persistent", "product", *SUBJECTS


@pytest.mark.parametrize("kind", KINDS)
def test_no_race(kind: str) -> None:
    done = outcome(f"run({kind!r})")
    assert not done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_race_in_any_call(kind: str) -> None:
    done = outcome(f"run({kind!r}, 1)")
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("file", "which"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in ALL]
)
def test_a_barrier_that_is_missing(file: str, which: int) -> None:
    done = outcome(f"without({file!r}, {which})")
    assert done.returncode and "a race at byte" in done.stderr, done.stderr


@pytest.mark.parametrize("which", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_a_place_that_is_used_too_soon(which: int) -> None:
    done = outcome(f"mutated({which})")
    assert done.returncode and "a race at byte" in done.stderr, done.stderr
