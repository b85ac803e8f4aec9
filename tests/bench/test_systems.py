"""`linattn bench --models`: small models on the processor, and what is said of measured rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from linattn.bench.systems import LLAMA, OURS, Row, verdicts
from linattn.cli import app
from linattn.cli.bench_models import MARKS

GIB = 2**30
ROWS = [
    Row("training", OURS, 4, 8192, 0.2, 30 * GIB),
    Row("training", LLAMA, 4, 8192, 0.35, 40 * GIB),
    Row("training", OURS, 1, 32768, 0.2, 30 * GIB),
    Row("training", LLAMA, 1, 32768, 0.65, 40 * GIB),
    Row("training", OURS, 1, 131072, 0.82),
    Row("decoding", OURS, 1, 1024, 0.0002, weights=800_000_000),
    Row("decoding", OURS, 1, 131072, 0.000202, weights=800_000_000),
    Row("decoding", OURS, 64, 1024, 0.00024, weights=800_000_000),
    Row("layer", "MiniMax, patched", 1, 65536, 0.0215),
]
WORSE = {
    0: {"seconds": 0.24, "peak": 41 * GIB},  # then 131072 is above 95 % of it
    2: {"seconds": 0.22},
    4: {"seconds": 0.85},
    6: {"seconds": 0.00021},
    7: {"seconds": 0.0003},
    8: {"seconds": 0.023},
}


def test_what_is_required_is_judged():
    assert all(one.met for one in verdicts(ROWS, 4.2e12)) and len(verdicts(ROWS, 4.2e12)) == 8
    assert len(verdicts(ROWS)) == 6  # without a bandwidth nothing is said of reading weights
    assert verdicts([]) == []
    missed = {0: 2, 2: 1, 4: 1, 6: 1, 7: 1, 8: 1}
    for index, change in WORSE.items():
        rows = [replace(row, **change) if at == index else row for at, row in enumerate(ROWS)]
        assert sum(not one.met for one in verdicts(rows, 4.2e12)) == missed[index], index
    assert ROWS[0].rate == pytest.approx(163840) and ROWS[7].rate == pytest.approx(64 / 0.00024)


def test_small_models_on_the_processor(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    found = CliRunner().invoke(app, ["bench", "--models", "--quick", "--json", "--out", str(page)])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["rows"]
    assert {row["what"] for row in rows} == {"training", "decoding", "layer"} and len(rows) == 11
    assert all(row["seconds"] > 0 for row in rows)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| MiniMax, patched |" in text
    refused = CliRunner().invoke(app, ["bench", "--models", "--quick", "--out", str(tmp_path / "x.png")])
    assert refused.exit_code == 2 and ".json or .md" in refused.output
