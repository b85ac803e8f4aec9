"""A pass that was recorded gives the bits of one that is worked out."""

from __future__ import annotations

import pytest

from tests.triton.programs import interpret

pytest.importorskip("triton", reason="Triton is not installed")


def test_played_passes_equal_worked_out_ones() -> None:
    assert interpret("played.py").startswith("played ")
