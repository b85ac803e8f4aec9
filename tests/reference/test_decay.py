"""The decay schedules against numbers worked out by hand from their formulas."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from linattn.reference import decay
from linattn.tolerance import UNIT

SCHEDULES = {
    "released": decay.transnormer,
    "paper": lambda heads, layer, layers: decay.transnormer(heads, layer, layers, schedule="paper"),
    "minimax": decay.minimax,
    "fla": decay.fla,
}


def assert_rates(log_decay: np.ndarray, rates: list[float | Fraction]) -> None:
    """Equal up to the rounding of a handful of operations."""
    want = np.array([-float(rate) for rate in rates])
    assert (abs(log_decay - want) <= 16 * UNIT["float64"] * abs(want)).all(), (log_decay, want)
    assert log_decay.dtype == np.float64


def test_alibi():
    assert decay.alibi(1).tolist() == [-(2.0**-8)]
    assert decay.alibi(8).tolist() == [-1 / 2, -1 / 4, -1 / 8, -1 / 16, -1 / 32, -1 / 64, -1 / 128, -1 / 256]
    assert_rates(decay.alibi(16)[:3], [2**-0.5, 2**-1, 2**-1.5])
    # not powers of two: those of the next one below, then the odd ones of the next one above
    assert decay.alibi(3).tolist() == [-(2.0**-4), -(2.0**-8), -(2.0**-2)]
    assert decay.alibi(6).tolist() == [-(2.0**-power) for power in (2, 4, 6, 8, 1, 3)]
    assert_rates(decay.alibi(12), [2.0**-power for power in (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5)])


def test_transnormer_as_released():
    # layer 1 of 4: 1 - 1/3 + 1e-5 = 0.66667666...
    factor = Fraction(2, 3) + Fraction(1, 10**5)
    assert_rates(decay.transnormer(8, 1, 4), [factor / 2**power for power in range(1, 9)])
    assert (-decay.transnormer(8, 1, 4)[:2]).round(3).tolist() == [0.333, 0.167]
    assert (-decay.transnormer(8, 1, 4)[-1:]).round(4).tolist() == [0.0026]
    assert_rates(decay.transnormer(2, 0, 4), [1.00001 / 16, 1.00001 / 256])
    assert_rates(decay.transnormer(2, 0, 1), [1.00001 / 16, 1.00001 / 256])
    # the last layer: 1 - 1 + 1e-5
    assert_rates(decay.transnormer(2, 3, 4), [1e-5 / 16, 1e-5 / 256])
    assert_rates(decay.transnormer(6, 2, 5), [(0.5 + 1e-5) / 2**power for power in (2, 4, 6, 8, 1, 3)])


def test_transnormer_as_in_the_paper():
    assert_rates(decay.transnormer(8, 0, 4, schedule="paper"), [1, 2, 3, 4, 5, 6, 7, 8])
    assert_rates(decay.transnormer(8, 1, 4, schedule="paper"), [0.75, 1.5, 2.25, 3, 3.75, 4.5, 5.25, 6])
    assert_rates(decay.transnormer(2, 3, 4, schedule="paper"), [1, 2])
    assert_rates(decay.transnormer(4, 0, 1, schedule="paper"), [2, 4, 6, 8])


def test_minimax():
    factor = 1 - 1 / (3 + Fraction(1, 10**5)) + Fraction(1, 10**5)
    assert_rates(decay.minimax(8, 1, 4), [factor / 2**power for power in range(1, 9)])
    assert_rates(decay.minimax(3, 0, 4)[2:], [1.00001 / 256])  # -8 (2 + 1) / 3 = -8: no rule for odd H
    assert_rates(decay.minimax(2, 0, 1), [1.00001 / 16, 1.00001 / 256])


def test_fla():
    assert decay.fla(8, 1, 4).tolist() == [0, -0.75, -1.5, -2.25, -3, -3.75, -4.5, -5.25]
    assert not np.signbit(decay.fla(8, 1, 4)[0])
    assert decay.fla(4, 0, 1).tolist() == [0, -2, -4, -6]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_a_log_decay(name):
    for heads in range(1, 20):
        for layers in range(1, 5):
            for layer in range(layers):
                log_decay = SCHEDULES[name](heads, layer, layers)
                assert log_decay.shape == (heads,)
                assert log_decay.dtype == np.float64
                assert (log_decay <= 0).all()
                assert np.isfinite(log_decay).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_has_no_meaning_is_refused(name):
    for heads, layer, layers, message in (
        (0, 0, 1, "heads must be a whole number of at least 1, got 0"),
        (2.0, 0, 1, "heads must be a whole number of at least 1, got 2.0"),
        (2, 0, 0, "layers must be a whole number of at least 1, got 0"),
        (2, 4, 4, "layer must be a whole number from 0 to layers - 1 = 3, got 4"),
        (2, -1, 4, "layer must be a whole number from 0 to layers - 1 = 3, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            SCHEDULES[name](heads, layer, layers)
    with pytest.raises(ValueError, match="schedule must be"):
        decay.transnormer(2, 0, 1, schedule="ours")
    with pytest.raises(ValueError, match="heads"):
        decay.alibi(-1)
