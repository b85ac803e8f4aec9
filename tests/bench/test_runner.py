"""Figures come from processes of their own, and a process that fails says why."""

import importlib.util
import subprocess

import pytest

from linattn.bench import Figure, cases, machine, run, runner
from linattn.bench.cases import HEADS, ITEM, WIDTH
from linattn.errors import LinattnError

SMALL = Figure("numpy", "decay", 300)
OUTPUT = 300 * HEADS * WIDTH * ITEM


def test_a_figure_has_each_run_and_the_memory_of_its_result():
    found = runner.one(SMALL, 3)
    assert len(found.seconds) == 3
    assert found.best == min(found.seconds) > 0
    assert found.threads is None
    if found.extra_bytes is not None:
        assert found.extra_bytes >= OUTPUT


def test_memory_is_what_the_computation_is_known_to_need():
    """The released cosFormer keeps two arrays of N·2D·E; this process, larger, hides nothing of them."""
    n = 96
    found = runner.one(Figure("released cosFormer", "cosformer", n), 1)
    array = n * HEADS * 2 * WIDTH * WIDTH * ITEM
    assert found.threads >= 1
    if found.extra_bytes is None:
        pytest.skip("this system does not say how much memory was resident")
    assert 2 * array <= found.extra_bytes < 3 * array


def test_a_failed_process_is_named_with_what_it_said():
    with pytest.raises(LinattnError) as caught:
        runner.one(Figure("numpy", "decay", 10, backward=True), 1)
    what, *said = str(caught.value).splitlines()
    assert what == "measuring numpy decay forward + backward, N=10: the process failed"
    assert "OptionError: forward and backward are timed together for torch only" in said[-1]


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(LinattnError, match=r"measuring numpy decay, N=300 took more than 0\.001 seconds"):
        runner.one(SMALL, 1, timeout=0.001)


def test_a_killed_process_is_told_from_a_failed_one(monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(LinattnError, match=r"ended by SIGKILL; is there memory enough\?"):
        runner.one(SMALL, 1)


def test_every_figure_is_measured_once_and_told(monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(runner, "one", lambda figure, runs: asked.append((figure, runs)) or "measured")
    chosen = cases(["numpy-decay", "numpy-plain", "numpy-torch"])
    found = run(chosen, runs=5, progress=lambda figure, result: told.append((figure, result)))
    assert len(asked) == len(set(asked)) == 8
    assert {runs for _, runs in asked} == {5}
    assert set(found.measured) == {figure for figure, _ in asked}
    assert told[:2] == [(asked[0][0], None), (asked[0][0], "measured")]


def test_without_torch_only_numpy_is_measured(monkeypatch):
    monkeypatch.setattr(runner, "one", lambda figure, runs: "measured")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(cases(["numpy-decay"])).measured
    with pytest.raises(LinattnError, match=r"pip install 'linattn\[torch\]'"):
        run(cases(["softmax"]))


def test_the_facts_say_where_a_number_comes_from(tmp_path):
    facts = machine.machine()
    for name in ("date", "commit", "processor", "cores", "memory", "busy", "linattn", "numpy", "torch"):
        assert facts[name], name
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor 9\n")
    assert machine.processor(tmp_path / "cpuinfo") == "A Processor 9"


def test_the_commit_is_the_checkout_s_own(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    package = tmp_path / "linattn"
    package.mkdir()
    assert machine.commit(package).startswith("none: ")
    for folder in ("linattn", "backends", "reference"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.py").write_text("")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    clean = machine.commit(package)
    assert len(clean) == 12
    (package / "a.py").write_text("x = 1\n")
    assert machine.commit(package) == f"{clean} with changes"
    nested = tmp_path / "lib" / "linattn"  # installed inside somebody else's checkout
    nested.mkdir(parents=True)
    assert machine.commit(nested).startswith("none: ")
