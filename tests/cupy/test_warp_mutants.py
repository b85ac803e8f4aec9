"""Kernels for tensor cores made wrong, one line each: the suite notices every one of them."""

from __future__ import annotations

import pytest

from linattn import testing
from tests.cupy.hosted import COMPILER
from tests.cupy.test_mutants import changed
from tests.cupy.test_warps import (
    LENGTHS,
    WIDE,
    subject,
    test_a_decay_of_0_forgets_nan,
    test_gradients_with_fixed_angles,
    wide_case,
)
from tests.triton.drawing import check, drawn, rows

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="g++ is not installed, by which the kernels run on a CPU"
)

# what is wrong: the source, the right line, the wrong one, whose kernels, and the property that must notice
MUTANTS: dict[str, tuple[str, str, str, str, str]] = {
    "copies are not waited for": (
        "tensor.cu", "    wait_for_copies();\n", "", "bfloat16", "matches_the_reference",
    ),
    "pairs on the diagonal are left out": (
        "tensor.cu", "m < warp : m > warp) continue;", "m < warp : m >= warp) continue;",
        "bfloat16", "matches_the_reference",
    ),
    "tables are those of the next step": (
        "tensor.cu", "      parity ^= 1;\n", "", "bfloat16", "matches_the_reference",
    ),
    "keys do not decay to the end of a block": (
        "tensor.cu", "if (O::DECAY) Op::weigh(y, of(FAR) + k * Op::K, lane);", "",
        "bfloat16", "splits_anywhere",
    ),
    "the second half of a block forgets the first": (
        "tensor.cu", "highs = __shfl_sync(~0u, high, 31), lows = __shfl_sync(~0u, low, 31);", "",
        "bfloat16", "matches_the_reference",
    ),
    "rows of the state lie as they come": (
        "tensor.cuh", "return r % 4 * 2 + r / 4;", "return r;", "tf32", "matches_the_reference",
    ),
    "all chunks of the state lie in one place": (
        "tensor.cu", "(chunk * groups * P::THREADS + thread) * 16;", "thread * 16;",
        "bfloat16 in shared memory", "columns",
    ),
    "a slice's angles are the first slice's": (
        "tensor.cu", "const int feature = OUTER ? slice * SLICE + i : i,", "const int feature = i,",
        "bfloat16", "fixed angles",
    ),
    "sums of weights are a lane's own": (
        "results.cuh", "b.lane & ~3);", "b.lane);", "bfloat16", "matches_the_reference",
    ),
    "features that are not there are mapped": (
        "ahead.cuh", "    if (feature == ELU && v >= count) x[v] = 0;\n", "",
        "bfloat16", "matches_the_reference",
    ),
    "hidden keys count": (
        "tensor.cu", "return O::MASK == 1 ? shown(j) : j < span.here_y;", "return j < span.here_y;",
        "bfloat16", "matches_the_reference",
    ),
    "gradients are those of mapped features": (
        "results.cuh", "found[v] *= quick_slope(O::FEATURE, before);", ";", "tf32", "columns",
    ),
    "a warp's rows are the first warp's": (
        "results.cuh", "first(16 * of.warp + of.lane / of.E_GROUPS)", "first(of.lane / of.E_GROUPS)",
        "float16", "matches_the_reference",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_noticed(name: str) -> None:
    file, right, wrong, kind, prop = MUTANTS[name]
    of = subject(kind)
    with changed(file, right, wrong), pytest.raises(AssertionError):
        if prop == "fixed angles":
            test_gradients_with_fixed_angles(kind)
        elif prop in WIDE:
            for each in ("matches_the_reference", "gradients_match_the_reference"):
                testing.PROPERTIES[each].check(of, wide_case(of, prop))
        else:
            check(of, prop, (drawn(prop, row, LENGTHS, 0) for row in rows(of, prop)))


def test_a_decay_of_0_is_no_factor() -> None:
    with (
        changed("common.cuh", "return decay != 0 ? x * decay : A(0);", "return x * decay;"),
        pytest.raises(AssertionError),
    ):
        test_a_decay_of_0_forgets_nan()
