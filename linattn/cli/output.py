"""What every subcommand prints with: tables for people, JSON for programs, colours only on a terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

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


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Something that moves on a terminal's standard error while work goes on; nothing elsewhere."""
    on_screen = Console(stderr=True, highlight=False)
    if not on_screen.is_terminal:
        yield
        return
    with on_screen.status(Text(text)):
        yield
