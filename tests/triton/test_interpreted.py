"""The kernels' logic without a GPU: properties in Triton's interpreter, and kernels made wrong."""

from __future__ import annotations

import pytest

from linattn import testing
from tests.triton.programs import interpret

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

# In groups of about equal time, each a process of its own: what interprets kernels cannot compile them.
# With each, how much of it is left out: every second combination of options is tried, or every third.
GROUPS = {
    ("matches_the_reference", "cuts_at_lengths"): 2,
    ("gradients_match_the_reference",): 2,
    ("reads_any_strides",): 3,
    ("takes_masked_keys_as_zero", "follows_the_closed_form"): 3,
    ("splits_anywhere", "continues_only_named_rows", "packs_as_if_separate"): 3,
    ("keeps_nan_in_its_sequence", "is_causal"): 3,
    ("writes_every_output",): 3,
}
MODES = ("whole", "cut")
ELSEWHERE = {"decodes_as_the_whole", "decodes_only_named_rows"}  # test_decode.py


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_properties_hold(mode: str, names: tuple[str, ...]) -> None:
    interpret("interpreted.py", mode, str(GROUPS[names]), *names)


UPRIGHT = ("matches_the_reference", "gradients_match_the_reference", "splits_anywhere", "is_causal")


def test_properties_hold_upright() -> None:
    interpret("interpreted.py", "upright", "3", *UPRIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("mode", (*MODES, "upright"))
@pytest.mark.parametrize("name", sorted(testing.PROPERTIES.keys() - ELSEWHERE))
def test_every_property_holds(mode: str, name: str) -> None:
    interpret("interpreted.py", mode, "1", name)


def test_wrong_kernels_are_noticed() -> None:
    interpret("mutants.py")


def test_segments_add_up_what_lies_before_them() -> None:
    interpret("folded.py")


def test_pools_change_in_place_and_nowhere_else() -> None:
    interpret("pooled.py")
