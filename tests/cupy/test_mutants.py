"""Kernels made wrong, one line each: the suite notices every one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest

from linattn.backends.cupy import sources
from tests.cupy import hosted
from tests.cupy.test_hosted import EXAMPLES, LENGTHS, Hosted, forgotten, turned_for_long
from tests.triton.drawing import check, drawn, rows

pytestmark = pytest.mark.skipif(
    hosted.COMPILER is None, reason="g++ is not installed, by which the kernels run on a CPU"
)

# what is wrong: the source, the right line, the wrong one, and properties of which one must notice
MUTANTS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "a block's last token is forgotten": (
        "product.cu", "step < 0 ? 0 : (int)clamped(tokens - t, 0, C);",
        "step < 0 ? 0 : (int)clamped(tokens - t, 0, C - 1);",
        ("matches_the_reference",),
    ),
    "the state decays by a whole block where it is ragged": (
        "product.cu", "int before = i + 1, after = i < here ? here - 1 - i : 0;",
        "int before = i + 1, after = C - 1 - i;", ("matches_the_reference", "splits_anywhere"),
    ),
    "angles lose their rest": (
        "common.cuh", "(uint64_t)(int64_t)(rest * 18446744073709551616.0);", "0;",
        ("follows_the_closed_form",),
    ),
    "a masked key counts": (
        "product.cu", "return O::MASK == 1 ? shown[j] : j < here_y;", "return j < here_y;",
        ("matches_the_reference", "takes_masked_keys_as_zero"),
    ),
    "a band of rows sees no pairs of its own": (
        "product.cu", "n * GAP < (m + 1) * BAND;", "n * GAP < m * BAND;", ("matches_the_reference",),
    ),
    "lines asked for ahead are of the step itself": (
        "product.cu", "block.enter(last ? step + onward : step);", "block.enter(step);",
        ("matches_the_reference",),
    ),
    "strict pairs see themselves": (
        "product.cu", "(i == j && !O::STRICT)", "(i == j)", ("matches_the_reference",),
    ),
    "a state leaves in the frame of the beginning": (
        "state.cuh", "if (store != (bool)O::REVERSE)", "if (false)",
        ("splits_anywhere", "merges_into_the_whole"),
    ),
    "gradients of angles count tokens from 0": (
        "out.cuh", "(double)(b.t + i + 1) * mapped", "(double)(b.t + i) * mapped",
        ("gradients_match_the_reference",),
    ),
    "a clamped denominator has a gradient": (
        "between.cu", "den <= (S)a.eps ? S(0) : -sum / den", "-sum / den", ("gradients_match_the_reference",),
    ),
    "padding's output is not written": (
        "decode.cu", "o[c] = narrowed<T>(0.0f);", ";", ("decodes_only_named_rows",),
    ),
    "a step is not counted": ("decode.cu", "*length += 1;", ";", ("decodes_as_the_whole",)),
    "z is the one of the row before": (
        "between.cu", "((const S*)a.from)[s * a.F + f];", "((const S*)a.from)[(s ? s - 1 : 0) * a.F + f];",
        ("continues_only_named_rows",),
    ),
}  # fmt: skip


@contextlib.contextmanager
def changed(file: str, right: str, wrong: str) -> Iterator[None]:
    """While active, one source has another line."""
    plain = sources.text
    assert (sources.FOLDER / file).read_text(encoding="utf-8").count(right) == 1
    folder = mock.patch.object(hosted, "CHANGES", {file: (right, wrong)})
    with folder, mock.patch.object(sources, "text", lambda name: plain(name).replace(right, wrong)):
        hosted.library.cache_clear()
        yield
    hosted.library.cache_clear()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_noticed(name: str) -> None:
    file, right, wrong, properties = MUTANTS[name]
    of = Hosted()
    with changed(file, right, wrong), pytest.raises((AssertionError, RuntimeWarning)):
        for prop in properties:
            lengths = (1000,) if prop == "follows_the_closed_form" else LENGTHS
            chosen = rows(of, prop)
            check(of, prop, (drawn(prop, row, lengths, i) for row in chosen for i in range(EXAMPLES)))


def test_a_decay_of_0_is_no_factor() -> None:
    with changed("common.cuh", "return decay != 0 ? x * decay : A(0);", "return x * decay;"):
        assert np.isnan(forgotten()).any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("fmaf(y, d.high, fmaf(x, c.low, ", "fmaf(x, c.low, fmaf(y, d.high, "),  # lost in y's product
        ("fabs(sine) > fabs(cosine)", "false"),
        ("(float)(x - cut.number + x * 8.673617379884035e-19)", "0"),
    ],
)
def test_roundings_that_lean_are_noticed(right: str, wrong: str) -> None:
    with changed("twice.cuh", right, wrong):
        assert turned_for_long(0.0) > 4
