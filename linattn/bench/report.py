"""Results for people: cells of a table, a section of a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from linattn.bench.cases import Figure, Quantity
from linattn.bench.results import Results, Row
from linattn.errors import LinattnError, OptionError

BEGIN, END = "<!-- bench: `linattn bench --out` writes from here -->", "<!-- end of bench -->"
MARKS = (BEGIN, END)
COMPARISON_COLUMNS = ("case", "quantity", "ours", "peer", "ratio", "required", "met?")
FIGURE_COLUMNS = ("figure", "time", "per token", "slowest of the runs", "extra memory", "per token")
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
SIZE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
FACTS = ("command", "date", "commit", "processor", "cores", "memory", "busy", "python", "numpy", "torch")


def seconds(value: float) -> str:
    """A time with three digits: "13.2 ms"."""
    return _scaled(value, TIME_UNITS)


def size(value: float | None) -> str:
    """Bytes with three digits, in powers of 1000: "1.06 GB"."""
    return "not measured" if value is None else _scaled(value, SIZE_UNITS)


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, name = next(((scale, name) for scale, name in units if value >= scale), units[-1])
    return f"{_digits(value / scale)} {name}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _value(quantity: Quantity, value: float | None) -> str:
    if value is None:
        return "not measured"
    return seconds(value) if quantity.startswith("time") else size(value)


def comparison_cells(row: Row) -> tuple[str, ...]:
    """One comparison under COMPARISON_COLUMNS."""
    asked = row.comparison
    peer = "one N·D·E array per head" if asked.peer is None else asked.peer.label
    if row.ratio is None:
        ratio = "–"
    elif asked.speedup:
        ratio = f"{_digits(row.ratio)} times as fast"
    else:
        ratio = f"{row.ratio:.2f}" if row.ratio >= 0.1 else f"1/{1 / max(row.ratio, 1e-9):.0f}"
    return (
        row.case,
        asked.quantity,
        f"{_value(asked.quantity, row.ours)} ({asked.ours.label})",
        f"{_value(asked.quantity, row.peer)} ({peer})",
        ratio,
        "–" if asked.limit is None else str(asked.limit),
        {True: "yes", False: "NO", None: "–"}[row.met],
    )


def figure_cells(results: Results, figure: Figure) -> tuple[str, ...]:
    """One measurement under FIGURE_COLUMNS."""
    found = results.measured[figure]
    extra = found.extra_bytes
    return (
        figure.label,
        seconds(found.best),
        seconds(found.best / figure.n),
        seconds(max(found.seconds)),
        size(extra),
        size(None if extra is None else extra / figure.n),
    )


def verdict(results: Results) -> str:
    """One sentence: which requirements are met."""
    judged = [row for row in results.rows() if row.met is not None]
    if not judged:
        return "Nothing is judged: the requirements are about the full lengths."
    unmet = results.unmet()
    if not unmet:
        return f"All {len(judged)} requirements are met."
    names = ", ".join(f"{row.case} ({row.comparison.quantity}, N={row.comparison.ours.n})" for row in unmet)
    return f"{len(judged) - len(unmet)} of {len(judged)} requirements are met; not met: {names}."


def markdown(results: Results) -> str:
    """The section of a page that `replace_section` writes: facts, comparisons, figures."""
    facts = [f"- {name}: {results.facts[name]}" for name in FACTS if name in results.facts]
    facts.append(f"- timed calls per figure: {results.runs}, the fastest counts")
    comparisons = table(COMPARISON_COLUMNS, [comparison_cells(row) for row in results.rows()])
    figures = table(FIGURE_COLUMNS, [figure_cells(results, figure) for figure in results.measured])
    every = folded(f"{len(results.measured)} figures", figures)
    return "\n\n".join(
        ["\n".join(facts), verdict(results), "### Compared", comparisons, "### Every figure", every]
    )


def folded(summary: str, text: str) -> str:
    """Markdown that a page shows when its summary is clicked: blank lines around it let it be Markdown."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines: list[Sequence[str]] = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_page(path: Path, marks: tuple[str, str] = MARKS) -> None:
    """Refuse a page that has no place for the section, before anything is measured.

    Raises OptionError.
    """
    if path.exists() and not all(mark in path.read_text().splitlines() for mark in marks):
        raise OptionError(
            f"{path} has no place for the figures: it needs the lines {marks[0]} and {marks[1]}"
        )


def replace_section(path: Path, results: Results, picture: Path | None = None) -> None:
    """Write the section between its two marks in a Markdown page, or a page of its own where there is none.

    picture: a file beside the page that the section shows first.

    Raises OptionError where a page has no marks, LinattnError when it cannot be written.
    """
    shown = (
        ""
        if picture is None
        else f"![Time and extra memory against the number of tokens]({picture.name})\n\n"
    )
    section_of(path, MARKS, shown + markdown(results))


def section_of(path: Path, marks: tuple[str, str], text: str) -> None:
    """Write a text between two marks in a Markdown page, or a page of its own where there is none.

    Raises OptionError where a page has no marks, LinattnError when it cannot be written.
    """
    check_page(path, marks)
    before, after = ("# Benchmarks\n\n", "\n")
    if path.exists():
        page = path.read_text()
        before, after = page.partition(marks[0])[0], page.partition(marks[1])[2]
    write_text(path, f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}")


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises LinattnError when that fails.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise LinattnError(f"cannot write {path}: {error.strerror or error}") from error
