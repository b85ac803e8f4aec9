"""Launches that share the GPU: which do, in which order, and what their kernels wait for."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

from linattn.backends.triton import launch, overlap
from linattn.backends.triton.overlap import ALONE, BEHIND, BESIDE, FIRST
from tests.triton.launches import Launch, compiled, launches

BEGIN, WAIT = "griddepcontrol.launch_dependents", "griddepcontrol.wait"
MOVES = re.compile(r"\b(?:ld|st)\.global|\bcp\.async|\bred\.|\batom\.")


def passes(early: bool = True, **options: Any) -> list[Launch]:
    with mock.patch.object(launch, "possible", lambda device: early):
        return [one for one in launches(**options) if one.kernel.__name__ == "product"]


def how(found: list[Launch]) -> list[int]:
    return [one.flags["OVERLAP"] for one in found]


FEW: dict[str, Any] = {"b": 1, "h": 8, "n": 2048, "d": 64, "e": 64}
SEGMENTS = [ALONE, ALONE, FIRST, BESIDE, BEHIND, BESIDE, BESIDE]  # states, outputs; both states, dq, dk, dv
WHOLE = [ALONE, FIRST, BESIDE, BESIDE]


@pytest.mark.parametrize(
    "options", [{"decay": "head"}, {"decay": "token"}, {"reweight": "cosine"}, {}], ids=str
)
def test_gradients_of_few_heads_run_side_by_side(options: dict[str, Any]) -> None:
    assert how(passes(**FEW, **options)) == SEGMENTS
    assert how(passes(**{**FEW, "n": 200}, **options)) == WHOLE


def test_each_direction_begins_by_itself() -> None:
    """The second direction adds to what the first has written."""
    found = how(passes(**FEW, decay="head", causal=False))
    assert found == [ALONE, ALONE, *2 * SEGMENTS[2:]]


@pytest.mark.parametrize("options", [{"early": False}, {"b": 17}, {"h": 136}, {"causal": False}], ids=str)
def test_elsewhere_nothing_overlaps(options: dict[str, Any]) -> None:
    assert set(how(passes(**{**FEW, **options}))) == {ALONE}


def test_processors_and_older_gpus_start_nothing_early() -> None:
    assert not overlap.possible("cpu")
    assert not overlap.possible("meta")
    for capability, early in (((8, 0), False), ((9, 0), True), ((10, 0), True)):
        overlap.possible.cache_clear()
        with mock.patch("torch.cuda.get_device_capability", lambda device, c=capability: c):
            assert overlap.possible("cuda:0") == early
    overlap.possible.cache_clear()


def test_kernels_wait_where_they_say() -> None:
    """BEHIND waits before it moves anything; FIRST and BESIDE let the next begin, and wait at their end."""
    seen = set()
    for one in passes(**FEW, decay="head"):
        text = compiled(one, 90).asm["ptx"]
        moves = [found.start() for found in MOVES.finditer(text)]
        begin, wait = ([found.start() for found in re.finditer(what, text)] for what in (BEGIN, WAIT))
        overlap_of = one.flags["OVERLAP"]
        seen.add(overlap_of)
        if overlap_of == ALONE:
            assert not begin
            assert not wait
        elif overlap_of == BEHIND:
            assert max(wait) < min(begin) < min(moves)
        else:
            assert max(begin) < min(moves)
            assert max(moves) < min(wait)
    assert seen == {ALONE, FIRST, BESIDE, BEHIND}
