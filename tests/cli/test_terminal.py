"""The command on a terminal: examples that run, completion, colours, JSON, what ends it early."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from linattn import cli, registry
from linattn.cli.device import check_name
from linattn.errors import OptionError
from linattn.testing.variants import VARIANTS

README = Path(__file__).parent.parent.parent / "README.md"
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")  # a foreground colour; bold is none


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def words(example: str) -> list[str]:
    first, *rest = shlex.split(example)
    assert first == "linattn"
    return rest


def on_terminal(*arguments: str, columns: int = 80, **surroundings: str) -> str:
    """What `linattn` prints where both outputs are a terminal."""
    main, other = pty.openpty()
    settings = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    settings |= {"TERM": "xterm-256color", "COLUMNS": str(columns), **surroundings}
    with subprocess.Popen(
        [sys.executable, "-m", "linattn", *arguments], stdout=other, stderr=other, env=settings
    ) as process:
        os.close(other)
        found = b""
        try:
            while piece := os.read(main, 4096):
                found += piece
        except OSError:  # how Linux says that the other end was closed
            pass
        os.close(main)
    assert process.returncode == 0, found.decode()
    return found.decode()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_ends_with_an_example_whose_options_exist(name):
    text = invoke(name, "--help").output
    assert text.rstrip().endswith(cli.EXAMPLES[name])
    first, *rest = words(cli.EXAMPLES[name])
    assert first == name
    assert typer.main.get_command(cli._typer(name)).make_context(name, rest)


def test_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(README, tmp_path)
    for name, example in cli.EXAMPLES.items():
        if name != "demo":  # trains by the clock; below, on less text
            result = invoke(*words(example))
            assert result.exit_code == 0, f"{example}\n{result.output}"
    assert json.loads((tmp_path / "figures.json").read_text())["figures"]


def test_the_list_of_commands_says_how_to_go_on():
    text = invoke("--help").output
    assert "linattn --install-completion" in text
    for line in re.findall(r"^    linattn (.+)$", text, re.M):
        assert line.split()[0] in cli.COMMANDS


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("linattn ex", {"explain"}),
        ("linattn explain --value", {"--value-dim"}),
        ("linattn explain --dtype bf", {"bfloat16", "bf16"}),
        ("linattn eval --con", {"--context"}),
        ("linattn verify --dtype bf", {"bfloat16", "bf16"}),
        ("linattn verify --variant cos", {name for name in VARIANTS if name.startswith("cos")}),
        ("linattn verify --backend n", {name for name in registry.known() if name.startswith("n")}),
        ("linattn explain --backend to", {"torch"}),
        ("linattn bench --case soft", {"softmax", "softmax-backward"}),
    ],
)
def test_shells_complete_commands_options_and_values(typed, expected):
    done = subprocess.run(
        [sys.executable, "-c", "from linattn.cli import main; main()"],
        env={
            **os.environ,
            "_LINATTN_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert set(done.stdout.split()) == expected, done.stderr


def test_no_color_takes_the_colours_from_a_terminal():
    assert COLOUR.search(on_terminal("verify", "--backend", "numpy", "--variant", "plain", "--quick"))
    plain = on_terminal("verify", "--backend", "numpy", "--variant", "plain", "--quick", NO_COLOR="1")
    assert not COLOUR.search(plain)
    assert "matches_the_reference" in plain


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(columns):
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_terminal("backends", columns=columns))
    table = text.replace("\r", "").split("backend ", 1)[1].splitlines()[1:]
    assert table and max(map(len, table)) <= columns


def test_ctrl_c_is_a_word_and_exit_status_130(monkeypatch):
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", lambda name: stopped)
    result = invoke("bench")
    assert result.exit_code == cli.INTERRUPTED
    assert (result.stdout, result.stderr.strip()) == ("", "interrupted")


@pytest.mark.parametrize("name", ["tpu", "", "cuda:", "cuda:x", "cpu cuda"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(OptionError, match="--device must be "):
        check_name(name)


def test_a_device_that_is_not_there_is_said_before_any_check(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("verify", "--backend", "torch", "--device", "cuda")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --device cuda: torch.cuda.is_available() is False\n"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_name("cuda:1")
    with pytest.raises(OptionError, match="there are 2 CUDA devices"):
        check_name("cuda:2")


def test_generated_text_as_json_is_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(README, tmp_path)
    assert invoke("train", "--text", "README.md", "--steps", "2", "--out", "run").exit_code == 0
    asked = ("generate", "--checkpoint", "run", "--prompt", "One", "--tokens", "30")
    printed, answer = invoke(*asked).stdout, json.loads(invoke(*asked, "--json").stdout)
    assert printed == answer["prompt"] + answer["text"] + "\n"
    assert answer["prompt"] == "One" and answer["seconds"] > 0


def test_demo_as_json_is_one_object_and_tells_the_rest_elsewhere(tmp_path, monkeypatch):
    from linattn.cli import demo
    from linattn.train import read_text

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_standard_library", lambda: read_text(README))
    result = invoke("demo", "--seconds", "1", "--no-verify", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verified"] is False
    assert found["sample"] == (tmp_path / "demo-output" / "sample.txt").read_text().removesuffix("\n")
    assert found["steps"] > 0 and 0 < found["bits_per_byte"] < 8 + 1
    assert Path(found["picture"]).is_file()
    for heading in ("1. What can run here", "2. A language model", "4. What the first layer looks at"):
        assert heading in result.stderr and heading not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("verify", "--backend", "numpy", "--variant", "plain", "--quick", "--json"), ("loading", "━")),
        (("backends", "--json"), ("looking for devices",)),
        (("explain", "--json"), ("asking the backends",)),
    ],
)
def test_a_terminal_shows_that_work_goes_on_and_a_file_gets_the_document(arguments, shown):
    text = on_terminal(*arguments)
    assert all(words in text for words in shown)
    done = subprocess.run(
        [sys.executable, "-m", "linattn", *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout)
    assert done.stderr == ""
