"""The tables of what goes with what are what the library says, in the README and on the site."""

import re
from pathlib import Path

import numpy as np

import linattn
from docs._ext import combinations

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_table_is_what_the_backends_say():
    found = re.search(r"<!-- support: .*-->\n(.*?)\n*<!-- end of support -->", README.read_text(), re.S)
    assert found
    assert found[1] == combinations.table(), f"README.md should have\n{combinations.table()}"


def test_a_width_that_is_refused_is_not_listed_as_taken():
    lines = combinations.widths().splitlines()
    triton = {
        row.split("|")[1].strip(): row.split("|")[2].strip()
        for row in lines[2 : 2 + len(combinations.DTYPES)]
    }
    assert triton == {"bfloat16": "256", "float16": "256", "float32": "256", "float64": "none"}
    assert any(line.startswith("- `triton`, float64: *has no float64") for line in lines)


def test_pairs_are_refused_for_what_the_table_says():
    refused = {(first, second): why for first, second, why in combinations.refused_pairs()}
    assert ("lengths", "cu_seqlens") in refused
    assert ("causal=False", "log_decay [B, N, H]") in refused
    assert ("Cosine(max_len)", "return_state") not in refused
    assert ("log_decay [H]", "log_decay [B, N, H]") not in refused, "two values of one argument are no pair"


def test_every_option_is_a_call_that_runs_alone():
    q, k, v = np.ones((3, 1, 6, 2, 4))
    for option in combinations.OPTIONS:
        assert linattn.attention(q, k, v, **combinations._call(option)) is not None, option
