"""What every subcommand prints with: tables for people, JSON for programs, colours only on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linattn.errors import LinattnError

PIPED_WIDTH = 1000  # columns where nobody sees a screen: lines stay whole, for grep


def console() -> Console:
    """Return a console on standard output, as wide as the terminal; piped, lines are not folded."""
    on_screen = Console(highlight=False)
    return on_screen if on_screen.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print rows of plain text under column heads; nothing in a cell is read as markup."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def print_lines(facts: Mapping[str, object]) -> None:
    """Print `name  value` lines, the values under each other; a list's items are joined."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        console().print(Text(f"{name:<{width}}  {text}"), soft_wrap=True)


def print_json(value: object) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2))


class Bar:
    """How much of something is done: a bar on standard error where that is a terminal, lines elsewhere."""

    def __init__(self, total: float) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True, highlight=False)
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        told = TextColumn("{task.description}", markup=False)
        self._console, self.shown = console, console.is_terminal
        self._bar = Progress(*columns, told, console=console, transient=True, disable=not self.shown)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def at(self, what: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=what)

    def advance(self, steps: float = 1, *, to: float | None = None) -> None:
        """Go on by some steps, or to a number of them."""
        self._bar.update(self._task, advance=steps if to is None else None, completed=to)

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Something that moves on a terminal's standard error while work goes on; nothing elsewhere."""
    on_screen = Console(stderr=True, highlight=False)
    if not on_screen.is_terminal:
        yield
        return
    with on_screen.status(Text(text)):
        yield


class Output(io.TextIOWrapper):
    """Text to a stream that says in a sentence why the system takes no more; a closed pipe stays one."""

    def write(self, text: str) -> int:
        """Write text. Raises LinattnError where it cannot be."""
        with _said():
            return super().write(text)

    def flush(self) -> None:
        """Write what waits. Raises LinattnError where it cannot be."""
        with _said():
            super().flush()

    def end(self) -> None:
        """Write what waits, or drop it where it cannot be: Python would tell of it once more at its end."""
        try:
            self.flush()
        except (BrokenPipeError, LinattnError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # who reads has read enough, which the command's frame takes for an end
        raise
    except OSError as error:
        raise LinattnError(f"standard output: {error.strerror}") from error


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Make standard output an `Output`, where it is a stream of the system, as long as a command runs."""
    plain = sys.stdout
    if not isinstance(plain, io.TextIOWrapper):  # None where it is closed
        yield
        return
    settings = {
        name: getattr(plain, name) for name in ("encoding", "errors", "line_buffering", "write_through")
    }
    if settings["errors"] == "strict":  # letters that the stream's encoding lacks do not end a command
        settings["errors"] = "backslashreplace"
    sys.stdout = output = Output(plain.buffer, **settings)
    try:
        yield
    finally:
        output.end()
