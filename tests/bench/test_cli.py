"""`linattn bench`: what it prints and writes, and what it refuses before it measures."""

import json

import pytest
from typer.testing import CliRunner

from linattn import cli
from linattn.bench import CASES, Measurement, runner
from linattn.bench.report import BEGIN, END


def bench(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


@pytest.fixture
def instant(monkeypatch):
    """Measurements without measuring, and a list of what was asked for."""
    asked = []

    def one(figure, runs):
        asked.append((figure, runs))
        return Measurement((1e-6 * figure.n,) * runs, 1000 * figure.n, 2)

    monkeypatch.setattr(runner, "one", one)
    return asked


def test_a_real_run_from_end_to_end(tmp_path):
    result = bench(
        "--cpu", "--quick", "--runs", 1, "--case", "numpy-plain", "--json", "--out", tmp_path / "a.json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "a.json").read_text())
    assert found["facts"]["command"] == "linattn bench --cpu --quick --case numpy-plain"
    assert [figure["n"] for figure in found["figures"]] == [4096, 1024]
    assert all(figure["best_seconds"] > 0 for figure in found["figures"])
    assert all(row["met"] is None for row in found["comparisons"])
    assert len(result.stderr.splitlines()) == 2  # a line for each figure, beside the JSON


def test_the_tables_name_every_case_and_what_is_not_met(instant):
    result = bench("--cpu")
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in CASES)
    assert "at least 50 times as fast" in result.stdout
    assert "NO" in result.stdout
    assert "requirements are met; not met: " in result.stdout
    assert {runs for _, runs in instant} == {7}
    assert len(instant) == len(set(instant))


def test_page_and_picture(instant, tmp_path):
    page, picture = tmp_path / "page.md", tmp_path / "picture.png"
    page.write_text(f"Before.\n{BEGIN}\n{END}\nAfter.\n")
    result = bench("--cpu", "--case", "softmax", "--out", page, "--out", picture)
    assert result.exit_code == 0, result.output
    assert "| softmax | time |" in page.read_text()
    assert "](picture.png)\n" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {figure.n for figure, _ in instant} >= {512, 65536}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--case", "nonsense"), "no case named 'nonsense'"),
        (("--out", "figures.txt"), "--out must end in .json, .md, .png; got figures.txt"),
        (("--out", "nowhere/figures.json"), "there is no folder nowhere"),
        (("--out", "page.md"), "page.md has no place for the figures"),
    ],
)
def test_refusals_come_before_the_work(arguments, sentence, instant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("no marks\n")
    result = bench("--cpu", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not instant
