"""The comparisons assert; the bound bounds; the cases are what they say."""

from __future__ import annotations

import numpy as np
import pytest

import linattn
from linattn import reference, testing, tolerance
from linattn.testing import compare
from linattn.testing.check import check
from linattn.testing.variants import AXES, allowed, combinations
from tests.suite import lies_forward
from tests.suite.liars import LIES, Liar

ONES = np.ones((2, 3))
assert lies_forward


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -777.0, 1.0 + 1e-3])
def test_assert_within_asserts_and_returns_nothing(wrong: float) -> None:
    got = ONES.copy()
    assert compare.assert_within("x", "a b", got, ONES, 1e-4 * ONES) is None
    got[1, 2] = wrong
    with pytest.raises(AssertionError, match=r"x at \[a b\] \(1, 2\)"):
        compare.assert_within("x", "a b", got, ONES, 1e-4 * ONES)


def test_a_shape_is_not_broadcast_away() -> None:
    with pytest.raises(AssertionError, match="shape"):
        compare.assert_within("x", "a b", ONES[:1], ONES, ONES)
    with pytest.raises(AssertionError, match="shape"):
        compare.assert_same("x", "a b", ONES[:1], ONES)


def test_assert_same_sees_one_bit() -> None:
    assert compare.assert_same("x", "a b", ONES, ONES) is None
    with pytest.raises(AssertionError, match=r"at \[a b\] \(0, 0\)"):
        compare.assert_same("x", "a b", np.nextafter(ONES, 2), ONES)
    nan = ONES * np.nan
    assert compare.assert_same("x", "a b", nan, nan) is None
    with pytest.raises(AssertionError):
        compare.assert_same("x", "a b", nan, ONES)


def test_assert_finite_and_equal_assert() -> None:
    assert compare.assert_finite("x", "a b", ONES) is None
    with pytest.raises(AssertionError):
        compare.assert_finite("x", "a b", ONES * np.inf)
    with pytest.raises(AssertionError):
        compare.assert_equal("x", 1, 2)


def test_a_property_returns_nothing_and_raises_on_a_lie() -> None:
    case = testing.Case(n=7)
    for prove in (testing.properties.matches_the_reference, testing.properties.is_causal):
        assert prove("numpy", case) is None
    with pytest.raises(AssertionError, match=r"got -777"):
        testing.properties.matches_the_reference(Liar(LIES["returns_minus_777"]), case)


def test_a_failure_can_be_pasted() -> None:
    report = testing.check_backend("numpy", only=["matches_the_reference"], quick=True)
    assert report.ok
    bad = check(Liar(LIES["dead_token"]), only=["matches_the_reference"], examples=2)
    call = bad.failures[0].call
    names: dict = {}
    exec(call.replace("'dead_token'", "'numpy'"), names)  # runs: the honest backend passes the same case
    assert f"{bad.failures[0].property}(" in call
    assert " at [" in bad.failures[0].message


def test_a_crash_is_a_failure() -> None:
    def crashes(q, k, v):
        raise ZeroDivisionError("inside the kernel")

    kernel = testing.Kernel(crashes, arrays="numpy")
    report = testing.check_kernel(kernel, only=["matches_the_reference"], quick=True)
    assert not report.ok
    assert "ZeroDivisionError: inside the kernel" in report.failures[0].message


def test_what_a_kernel_does_not_claim_is_not_passed() -> None:
    def plain(q, k, v):
        return np.einsum("bihd,bjhd,bjhe->bihe", q, k, v)

    report = testing.check_kernel(
        testing.Kernel(plain, arrays="numpy", options={"causal": False}), quick=True, examples=1
    )
    status = {finding.property: finding.status for finding in report.findings}
    assert status["matches_the_reference"] == "pass"
    for name in ("gradients_match_the_reference", "splits_anywhere", "decodes_as_the_whole", "is_causal"):
        assert status[name] == "not offered"


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "feature_map": "relu"}, {"decay": "token"}, {"reweight": "lrpe"}]
)
@pytest.mark.parametrize("state", [False, True])
def test_far_bound_is_no_tighter_than_the_exact_one(options: dict, state: bool) -> None:
    x = testing.Case(n=200, heads=2, state=state, seed=3, **options).inputs()
    rounding = tolerance.Rounding("float32")
    exact = tolerance.bound(x.q, x.k, x.v, rounding=rounding, **x.options())
    o, (kv, z) = tolerance.far(x.q, x.k, x.v, rounding=rounding, **x.options())
    assert (o >= exact.o * (1 - 2**-20)).all()
    assert (kv >= exact.kv * (1 - 2**-20)).all()
    assert (z is None) == (exact.z is None)


def test_the_bound_sees_one_wrong_token() -> None:
    """A ratio over the whole tensor hides a dead head's last token; the bound does not."""
    x = testing.Case(n=200, batch=2, heads=3, d=8, e=8, decay="head", seed=1).inputs()
    want, _ = reference.attention(x.q, x.k, x.v, **x.options())
    got = want.copy()
    got[0, -1, 0] = 0
    limit = tolerance.bound(x.q, x.k, x.v, rounding=tolerance.Rounding("bfloat16"), **x.options()).o
    assert (abs(got - want) > limit).any()
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < np.sqrt(1 / (2 * 3 * 200)) * 4


def test_a_numerator_below_the_normal_numbers_may_be_divided_by_eps() -> None:
    rates = (0.001, 20.0, float("inf"))
    case = testing.Case(
        feature_map="relu", normalize=True, decay="head", reweight="cosine", scale=-0.37, key_mask=True,
        n=196, heads=2, d=1, e=6, rates=rates, values=1.0, seed=1294,
    )  # fmt: skip
    testing.properties.matches_the_reference("numpy", case)


def test_every_pair_of_options_is_covered() -> None:
    rows = combinations()
    names = list(AXES)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            met = {(row[a], row[b]) for row in rows}
            wanted = {(x, y) for x in AXES[a] for y in AXES[b] if allowed({a: x, b: y})}
            assert wanted <= met, (a, b, wanted - met)
    assert all(allowed(row) for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_inputs_are_numbers_of_their_dtype(dtype: str) -> None:
    x = testing.Case(n=40, dtype=dtype, seed=5).inputs()
    for part in (x.q, x.k, x.v):
        assert (testing.case.rounded(part, dtype) == part).all()
        assert abs(part).max() <= x.case.values


def test_a_case_prints_as_the_call_that_makes_it() -> None:
    case = testing.Case(decay="head", n=0, rates=(0.0, float("inf")), seed=4)
    assert eval(repr(case), {"Case": testing.Case}) == case


def test_a_lost_product_is_allowed_for_with_what_multiplies_it() -> None:
    """Decay times query may be no normal number in float32, and become 0 before it meets a large value."""
    q, k, v = np.full((1, 2, 1, 1), 1e-3), np.ones((1, 2, 1, 1)), np.full((1, 2, 1, 1), 300.0)
    k[:, 1] = 0.0
    g = np.array([-86.0])
    lost = 1e-3 * np.exp(-86.0) * 300.0
    assert 1e-3 * np.exp(-86.0) < tolerance.NORMAL["float32"]
    for bound in (tolerance.bound, tolerance.far):
        found = bound(q, k, v, rounding=tolerance.Rounding("float32"), log_decay=g)
        o = found[0] if isinstance(found, tuple) else found.o
        assert o[0, 1, 0, 0] >= lost


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_the_slope_of_silu_may_lose_what_is_left_of_a_rounded_gate(name: str) -> None:
    """Behind 16.6 the gate is 1 in float32: one of the numbers drawn here lies there."""
    case = testing.Case(feature_map="silu", batch=2, n=3, heads=3, d=1, e=1, values=300.0, seed=71)
    testing.properties.gradients_match_the_reference(name, case)


def test_a_rounded_factor_is_nobody_s_error() -> None:
    """A decay of 3e-5 as a factor is off by up to half a unit in the last place, 20 000 times over."""

    def right(q, k, v, factors):
        return linattn.attention(q, k, v, log_decay=np.log(factors))

    names, case = {"log_decay": "factors"}, testing.Case(decay="head", n=20000, d=1, rates=(3e-5,), seed=7)
    kernel = testing.Kernel(right, decay="factor", names=names, arrays="numpy", gradients=False)
    testing.properties.follows_the_closed_form(kernel, case)
    kernel = testing.Kernel(right, decay="factor", names=names, arrays="numpy", gradients=False, block=1)
    assert kernel.update_every == 1
