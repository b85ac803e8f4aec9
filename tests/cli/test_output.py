"""Standard output that is full, closed or read no further, and memory that is full: a sentence or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from linattn import cli
from linattn.errors import LinattnError

FULL = Path("/dev/full")
PRINTS = """
import sys, typer
from rich.console import Console
from linattn import cli
def bench() -> None:
    {}
cli._load = lambda name: bench
sys.argv = ["linattn", "bench"]
cli.main()
"""
WAYS = {
    "echo": "typer.echo('text')",
    "rich": "Console().print('text')",
    "much": "typer.echo('text' * 100000)",
    "print": "print('text', flush=True)",
}


def start(code, *, buffered=True, **streams):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
        **streams,
    )


@pytest.mark.skipif(not FULL.exists(), reason="the system has no device that is full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_behind_standard_output_is_a_sentence(way, buffered):
    with FULL.open("w") as full:
        done = start(PRINTS.format(WAYS[way]), buffered=buffered, stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no device that is full")
def test_help_and_version_say_so_too():
    for option in ("--version", "--help"):
        with FULL.open("w") as full:
            done = start(
                f"import sys; from linattn import cli; sys.argv[1:] = ['{option}']; cli.main()", stdout=full
            )
        assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_standard_output_is_quiet(way):
    lines = PRINTS.format(WAYS[way])
    again = f"os.execv(sys.executable, [sys.executable, '-c', {lines!r}])"
    done = start(f"import os, sys\nos.close(1)\n{again}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_read_enough_is_quiet():
    code = PRINTS.format("[typer.echo('text') for _ in range(100000)]")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "text\n"
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_letters_that_an_encoding_lacks_do_not_end_a_command(encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = start(PRINTS.format(r"typer.echo('a\u20ac\udce9b')"), stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("a") and "b" in done.stdout


CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 38400000000 bytes. Error code 12 (Cannot allocate memory)"
)
MEMORY = [
    (MemoryError(), "out of memory: give"),
    (MemoryError("Unable to allocate 2.32 GiB for an array"), "out of memory, 2.32 GiB more"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU"), "memory, 2.00 GiB more"),
    (RuntimeError(CPU), "38400000000 bytes more were asked for: give a smaller model, batch, length or text"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "8 bytes more"),
    (RuntimeError("CUDA error: out of memory"), "out of memory: give"),
]


@pytest.mark.parametrize(("error", "sentence"), MEMORY, ids=[repr(error)[:40] for error, _ in MEMORY])
def test_memory_that_is_full_is_a_sentence(error, sentence, monkeypatch):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "_load", lambda name: fail)
    result = CliRunner().invoke(cli.app, ["bench"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert CliRunner().invoke(cli.app, ["--debug", "bench"]).exception is error


def test_other_errors_of_torch_stay_what_they_are(monkeypatch):
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(cli, "_load", lambda name: fail)
    found = CliRunner().invoke(cli.app, ["bench"]).exception
    assert isinstance(found, RuntimeError) and not isinstance(found, LinattnError)


def test_what_torch_says_where_memory_is_full_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert cli._sentence(caught.value) is not None
