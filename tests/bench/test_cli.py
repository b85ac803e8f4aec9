"""`linattn bench`: what it prints and writes, and what it refuses before it measures."""

import json
import os
import signal

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


@pytest.fixture
def device(monkeypatch):
    """A CUDA device that is not there: small cases by the torch backend, and a clock that is made up."""
    import torch

    from linattn.bench import gpu_cases, gpu_machine, gpu_measure, gpu_runner
    from tests.bench.clock import SMALL, Clock

    def bench_on_cpu(meter, *, full, **_):
        return gpu_runner.Bench.__wrapped__(meter, device="cpu", backend="torch", peer_seconds=0, full=full)

    bench_on_cpu.__wrapped__ = gpu_runner.Bench
    monkeypatch.setattr(gpu_cases, "ALL", (*SMALL[:2], SMALL[-1]))
    monkeypatch.setattr(gpu_cases, "curves", lambda free, quick: SMALL[:2])
    monkeypatch.setattr(gpu_measure, "check_device", lambda: None)
    monkeypatch.setattr(gpu_measure, "Cuda", lambda *_: Clock())
    monkeypatch.setattr(gpu_machine, "gpu_machine", lambda: {"GPU": "A Device, old"})
    monkeypatch.setattr(gpu_runner, "Bench", bench_on_cpu)
    monkeypatch.setattr(gpu_runner, "MEMORY_CASE", SMALL[3])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**10, 10**10))


def test_a_gpu_from_end_to_end(device, tmp_path):
    page, picture, data = (tmp_path / name for name in ("page.md", "picture.png", "data.json"))
    result = bench("--gpu", "--out", page, "--out", picture, "--out", data)
    assert result.exit_code == 0, result.output
    assert "4 of 6 requirements are met; not met: forward-backward 2 2 70 16, " in result.stdout
    assert len(result.stderr.splitlines()) == 3 + 2 * 4 + 1
    assert "command: linattn bench --gpu\n" in page.read_text()
    assert "](picture.png)\n" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(data.read_text())["facts"]["GPU"] == "A Device, old"


def test_an_interrupted_run_keeps_what_it_measured(device, monkeypatch, tmp_path):
    from linattn.bench import gpu_runner
    from tests.bench.clock import SMALL

    kind = gpu_runner.Bench.__wrapped__
    row, rows = kind.row, []

    def stopped(self, case, bandwidth):
        if rows:
            os.kill(os.getpid(), signal.SIGTERM)
        rows.append(row(self, case, bandwidth))
        return rows[-1]

    monkeypatch.setattr(kind, "row", stopped)
    handler, data = signal.getsignal(signal.SIGTERM), tmp_path / "data.json"
    result = bench("--gpu", "--out", data)
    assert result.exit_code == 130
    found = json.loads(data.read_text())
    assert [one["name"] for one in found["rows"]] == [SMALL[0].name]
    assert found["facts"]["interrupted"] == "after 1 of 3 cases"
    assert "interrupted after 1 of 3 cases" in " ".join(result.stdout.split())
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_gpu_s_chosen_cases_as_json(device):
    result = bench("--gpu", "--case", "decode", "--case", "host", "--quick", "--json", "--peer-seconds", 7)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    command = "linattn bench --gpu --quick --case decode --case host --peer-seconds 7"
    assert found["facts"]["command"] == command
    assert [row["kind"] for row in found["rows"]] == ["decode"]
    assert all(row["met"] is None for row in found["rows"] + found["costs"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--cpu",), "give --cpu or --gpu, not both"),
        (("--case", "numpy-torch"), "no case named 'numpy-torch' on a GPU"),
        ((), "`linattn bench --gpu` needs a CUDA GPU: torch.cuda.is_available() is False"),
    ],
)
def test_a_gpu_is_refused_in_one_sentence(arguments, sentence, monkeypatch):
    import torch

    from linattn.bench import gpu_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_machine.importlib.util, "find_spec", lambda name: name)
    result = bench("--gpu", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
