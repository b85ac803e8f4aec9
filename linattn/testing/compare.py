"""Comparisons: each raises AssertionError or returns nothing, so that no result can be dropped."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from linattn.arrays import Array

LARGEST = {
    "float64": np.finfo(np.float64).max,
    "float32": np.finfo(np.float32).max,
    "float16": 65504.0,
    "bfloat16": 3.3e38,
}


class Mismatch(AssertionError):
    """Two results that had to agree do not."""


class NotOffered(Exception):
    """The kernel or backend does not claim to do this: neither a success nor a failure."""


@dataclass
class Worst:
    """The largest error seen, as a share of what was allowed, by the name of the result."""

    ratios: dict[str, float] = field(default_factory=dict)

    def note(self, what: str, ratio: float) -> None:
        self.ratios[what] = max(ratio, self.ratios.get(what, 0.0))

    @property
    def ratio(self) -> float | None:
        return max(self.ratios.values(), default=None)


_worst: contextvars.ContextVar[Worst | None] = contextvars.ContextVar("linattn_worst", default=None)


@contextlib.contextmanager
def recording() -> Iterator[Worst]:
    """Collect the ratios of every `assert_within` inside the block."""
    worst = Worst()
    token = _worst.set(worst)
    try:
        yield worst
    finally:
        _worst.reset(token)


def assert_within(
    what: str, letters: str, got: Array, want: Array, allowed: Array, dtype: str = "float64"
) -> None:
    """Assert |got - want| <= allowed at every index; NaN is never within. `letters` names the axes in the
    message.

    Values beyond the largest number of `dtype` cannot be told from each other and are not compared.
    """
    if got.shape != want.shape:
        raise Mismatch(f"{what}: shape {got.shape}, expected {want.shape}")
    if not got.size:
        return
    allowed = np.broadcast_to(allowed, want.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        error = abs(got - want)
        fits = abs(want) + allowed <= LARGEST[dtype]
        bad = fits & ~(error <= allowed)
        share = np.where(fits, error / np.where(allowed > 0, allowed, 1.0), 0.0)
    worst = _worst.get()
    if worst is not None and not bad.any():
        worst.note(what, float(share.max()))
    if bad.any():
        over = np.where(bad, np.where(np.isnan(share), np.inf, share), -1.0)
        at = tuple(int(i) for i in np.unravel_index(int(over.argmax()), over.shape))
        raise Mismatch(
            f"{what} at [{letters}] {at}: got {got[at]:.9g}, want {want[at]:.9g}: "
            f"error {error[at]:.3e} > {allowed[at]:.3e} allowed "
            f"({int(bad.sum())} of {bad.size} elements are off)"
        )


def assert_same(what: str, letters: str, got: Array, want: Array) -> None:
    """Assert equal bits at every index; any NaN equals any NaN, and zeros may differ in sign."""
    if got.shape != want.shape:
        raise Mismatch(f"{what}: shape {got.shape}, expected {want.shape}")
    bad = (got != want) & ~((got != got) & (want != want))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise Mismatch(
            f"{what} at [{letters}] {at}: {got[at]!r} is not {want[at]!r} "
            f"({int(bad.sum())} of {bad.size} elements differ)"
        )


def assert_finite(what: str, letters: str, got: Array) -> None:
    """Assert that nothing is NaN or infinite."""
    bad = ~np.isfinite(got)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise Mismatch(
            f"{what} at [{letters}] {at}: {got[at]} ({int(bad.sum())} of {bad.size} elements are not finite)"
        )


def assert_equal(what: str, got: Any, want: Any) -> None:
    """Assert that two plain Python values are equal."""
    if got != want:
        raise Mismatch(f"{what}: got {got!r}, expected {want!r}")
