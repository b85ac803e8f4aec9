"""The command's frame: quick, quiet about tracebacks, plain when piped."""

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import linattn
from linattn import cli
from linattn.errors import LinattnError

HEAVY = ("torch", "triton", "cupy", "hypothesis", "matplotlib", "safetensors")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "linattn", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def subcommand(monkeypatch):
    """Put a function in the place of `linattn bench`."""

    def replace(function):
        monkeypatch.setattr(cli, "_load", lambda name: function)

    return replace


def test_help_names_every_subcommand_and_imports_no_framework():
    code = """
import sys
from linattn.cli import main
sys.argv = ["linattn", "--help"]
try:
    main()
finally:
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *text, modules = done.stdout.strip().splitlines()
    assert not set(HEAVY) & set(modules.split())
    for name, summary in cli.COMMANDS.items():
        assert any(re.match(rf"\s+{name}\s+{re.escape(summary)}", line) for line in text), name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_subcommand_exists_and_has_help(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.output
    assert f"linattn {name}" in result.output


def test_version_is_the_library_s():
    assert invoke("--version").output.split() == ["linattn", linattn.__version__]


def test_a_refusal_is_one_line_and_exit_status_2(subcommand):
    def refuse() -> None:
        raise LinattnError("the sentence")

    subcommand(refuse)
    result = invoke("bench")
    assert (result.exit_code, result.stderr, result.stdout) == (2, "error: the sentence\n", "")


@pytest.mark.parametrize("arguments", [("--debug", "bench"), ("bench", "--debug")])
def test_debug_shows_the_error_itself(subcommand, arguments):
    def refuse() -> None:
        raise LinattnError("the sentence")

    subcommand(refuse)
    assert isinstance(invoke(*arguments).exception, LinattnError)


def test_a_bug_is_not_dressed_up_as_a_refusal(subcommand):
    def fail() -> None:
        raise ZeroDivisionError

    subcommand(fail)
    assert isinstance(invoke("bench").exception, ZeroDivisionError)


def test_the_exit_status_of_a_subcommand_is_the_command_s(subcommand):
    def one() -> None:
        raise typer.Exit(1)

    subcommand(one)
    assert invoke("bench").exit_code == 1


@pytest.mark.parametrize(("name", "extra"), [("bench", "torch"), ("train", "models")])
def test_a_missing_package_is_named_with_what_brings_it(subcommand, name, extra):
    def needs_torch() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    subcommand(needs_torch)
    assert invoke(name).stderr == f"error: `linattn {name}` needs torch: pip install 'linattn[{extra}]'\n"


def test_an_unknown_option_or_subcommand_is_a_usage_error(subcommand):
    subcommand(lambda: None)
    for arguments in (("bench", "--nonsense"), ("nonsense",)):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert arguments[-1] in result.stderr
        assert "Traceback" not in result.stderr


def test_piped_output_has_no_colours_and_whole_lines():
    done = run("backends")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for name, why in linattn.available_backends().items():
        assert any(name in line and (why or "usable") in line for line in done.stdout.splitlines()), name


def test_backends_as_json():
    done = run("backends", "--json")
    answer = json.loads(done.stdout)
    assert {row["name"]: row["unavailable"] for row in answer["backends"]} == linattn.available_backends()
    assert answer["environment"]["linattn"] == linattn.__version__
