"""`linattn tune`: what it prints and writes, with a search that is made up."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linattn import cli
from linattn.backends.triton import search, tuned, worker
from linattn.backends.triton.plan import Blocks
from linattn.backends.triton.search import Answer
from linattn.cli import tune as command
from linattn.errors import LinattnError

GPU = tuned.key("NVIDIA H100", (9, 0), "3.6.0")
FASTER = Blocks(32, 64, 8, 2)


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["tune", *arguments])


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path / ".cache" / "linattn" / "tuned.json"


class Worker:
    """Everything compiles and is right; one configuration is faster. Gradients fail altogether."""

    def __init__(self, target):
        if target.family.gradient:
            raise LinattnError("the shipped configuration did not run: oh")

    def compile(self, blocks):
        return {one: "PTXASError: no" if one.stages == 4 else None for one in blocks}

    def time(self, blocks):
        return Answer((0.5 if blocks == FASTER else 1.1,), (1.0,))

    check = time

    def close(self):
        pass


@pytest.fixture
def gpu(file, monkeypatch):
    monkeypatch.setattr(command, "_check_device", lambda target: None)
    monkeypatch.setattr(tuned, "key_of", lambda device="cuda": GPU)
    monkeypatch.setattr(worker, "Process", Worker)
    return file


def test_without_a_gpu_it_is_one_sentence_and_exit_status_2(file, monkeypatch):
    from linattn.backends.triton import backend

    monkeypatch.setattr(type(backend), "unavailable", lambda self: "no CUDA device")
    result = invoke()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: `linattn tune` needs a CUDA GPU: no CUDA device\n"
    assert not file.exists()


def test_a_dry_run_says_what_and_where(file):
    result = invoke("--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"file  {file}\n")
    for case in search.DEFAULT:
        assert case in result.stdout
    (family,) = json.loads(invoke("--dry-run", "--json", "--case", "lrpe-64", "--quick").stdout)["families"]
    assert family["family"] == "bfloat16 64 64 angles value"
    assert 0 < family["configurations"] < 30
    assert not file.exists()


def test_what_is_faster_is_written_and_said(gpu):
    result = invoke("--case", "forward 128")
    assert result.exit_code == 0, result.output
    assert tuned.load(gpu) == {GPU: {"bfloat16 128 128 plain value": FASTER}}
    assert "32x64, 8 warps, 2 stages" in result.stdout
    assert "1 of 1 families" in result.stdout
    assert result.stderr.startswith("bfloat16 128 128 plain value: ")
    assert result.stderr.endswith("configurations, faster\n")


def test_a_family_that_fails_is_exit_status_1_and_the_others_are_written(gpu):
    result = invoke("--case", "backward 64", "--case", "forward 64", "--json", "--out", str(gpu.name))
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    failed, found = answer["families"]
    assert failed["why"] == "the shipped configuration did not run: oh"
    assert found["best"]["block_e"] == 64
    assert all(entry["why"] == "PTXASError: no" for entry in found["skipped"])
    assert set(tuned.load(gpu.name)[GPU]) == {"bfloat16 64 64 plain value"}
    assert not gpu.exists()


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_file_of_somebody_else_is_refused_before_any_work(gpu, tmp_path):
    (tmp_path / "data.json").write_text("{}")
    result = invoke("--out", "data.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: data.json is not a file of `linattn tune`")
    assert (tmp_path / "data.json").read_text() == "{}"


def test_a_case_that_does_not_exist_is_refused(gpu):
    result = invoke("--case", "backwards 64")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no case named 'backwards 64'; a case is one of forward, ")


def test_other_commands_say_when_a_tuned_file_is_in_use(monkeypatch):
    monkeypatch.setattr(tuned, "in_use", lambda device="cuda": "2 launch configurations from tuned.json")
    result = CliRunner().invoke(cli.app, ["backends"])
    assert "2 launch configurations from tuned.json" in result.stdout
    result = CliRunner().invoke(cli.app, ["explain", "--json"])
    assert json.loads(result.stdout)["tuned"] is None  # the call runs on a processor
