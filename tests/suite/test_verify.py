"""`linattn verify` and `check_kernel`, as a stranger calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linattn import testing
from linattn.cli import app
from linattn.errors import OptionError, UnknownBackendError

KERNELS = '''
"""Two kernels, one right."""
import torch
from linattn.testing import Kernel

def decayed(q, k, v, slopes, wrong=0):
    n = torch.arange(q.shape[2])
    lag = (n[:, None] - n).clamp(min=0)
    weight = torch.exp(-slopes[:, None, None].clamp(max=1e30) * lag).where(lag > 0, 1.0)
    w = (q @ k.mT) * weight * (n[:, None] >= n)
    o = w @ v
    return o if not wrong else o * (n[:, None] != wrong)

right = Kernel(decayed, layout="bhnd", decay="slope", names={"log_decay": "slopes"}, block=1)
wrong = Kernel(decayed, layout="bhnd", decay="slope", names={"log_decay": "slopes"}, arguments={"wrong": 3})
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stranger.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *arguments])
    return result.exit_code, result.output


def test_a_right_kernel_passes(here: Path) -> None:
    status, output = verify("--kernel", "stranger:right", "--quick", "--variant", "lightning")
    assert status == 0, output
    assert "not offered" in output
    assert "gradients_match_the_reference" in output


def test_a_wrong_kernel_fails_with_a_call_that_can_be_pasted(here: Path) -> None:
    status, output = verify("--kernel", "stranger:wrong", "--quick")
    assert status == 1
    line = next(line.strip() for line in output.splitlines() if "properties.matches_the_reference(" in line)
    with pytest.raises(AssertionError, match=r"o at \[b n h e\]"):
        exec(line, {})


def test_json(here: Path) -> None:
    status, output = verify("--backend", "numpy", "--quick", "--json", "--dtype", "float64")
    document = json.loads(output)
    assert status == 0
    report = document["reports"][0]
    assert report["subject"] == "numpy"
    assert {finding["property"] for finding in report["findings"]} == set(testing.PROPERTIES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kernel", "stranger"], "package.module:object"),
        (["--kernel", "no_such_module:x"], "no module named"),
        (["--kernel", "stranger:nothing"], "has no"),
        (["--backend", "no-such"], "no-such"),
        (["--backend", "numpy", "--variant", "no-such"], "no variant"),
        (["--backend", "numpy", "--dtype", "bfloat16"], "offers nothing"),
        (["--backend", "numpy", "--kernel", "stranger:right"], "not both"),
    ],
)
def test_refusals_say_what_is_wrong(here: Path, arguments: list[str], says: str) -> None:
    status, output = verify(*arguments)
    assert status == 2
    assert says in output


def test_descriptions_that_mean_nothing_are_refused() -> None:
    for wrong in (
        {"layout": "nbhd"},
        {"decay": "ln"},
        {"arrays": "jax"},
        {"names": {"x": "y"}},
        {"options": {"x": 1}},
    ):
        with pytest.raises(OptionError):
            testing.Kernel(len, **wrong)
    with pytest.raises(UnknownBackendError):
        testing.check_backend("no-such")
    with pytest.raises(OptionError):
        testing.check_backend("numpy", only=["no-such"])


def test_several_processes_say_what_one_says() -> None:
    asked = ("--backend", "numpy", "--dtype", "float64", "--variant", "lightning", "--quick", "--json")
    reports = []
    for jobs in ("1", "2"):
        status, output = verify(*asked, "--jobs", jobs)
        assert status == 0, output
        reports.append(json.loads(output)["reports"])
        for finding in reports[-1][0]["findings"]:
            del finding["seconds"]
    assert reports[0] == reports[1]
