"""Pieces of sources that pages show, found by their first and last words, as literalinclude finds them.

A notebook of a page comes without the repository: it has these pieces, and the records that its cells read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

FENCE = re.compile(r"^```\{literalinclude\} (\S+)\n((?::[\w-]+:.*\n)*)```$", re.M)
OPTION = re.compile(r"^:([\w-]+): *(.*)$", re.M)
RECORDS = re.compile(r'^recorded = .*"docs/(benchmarks\.md)".*$', re.M)
SECTION = re.compile(r"^## On a GPU\n.*?(?=^## |\Z)", re.M | re.S)
FACT = re.compile(r"^- [\w -]+: .*$")
TABLES = ("| case | floor ms |", "| case | who |")
PEER = re.compile(r"^\| [^|]+ \| (?!linattn)[A-Za-z]")  # a row of a time that is not ours


def excerpt(match: re.Match[str], page: Path) -> tuple[str, str]:
    """Return the language and the lines that a fence of a page shows.

    Raises ValueError unless exactly one line of the file has the first words, and a later one the last; with
    end-at that may be the same line.
    """
    path = page.parent / match[1]
    options = {name: value.strip() for name, value in OPTION.findall(match[2])}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    begins = [number for number, line in enumerate(lines) if options["start-at"] in line]
    if len(begins) != 1:
        raise ValueError(f"{len(begins)} lines of {match[1]} have {options['start-at']!r}, not one")
    ends = "end-at" in options
    mark = options["end-at" if ends else "end-before"]
    after = [number for number in range(begins[0] + (not ends), len(lines)) if mark in lines[number]]
    if not after:
        raise ValueError(f"{match[1]} has no {mark!r} after {options['start-at']!r}")
    return options["language"], dedent("".join(lines[begins[0] : after[0] + ends])).rstrip() + "\n"


def excerpts(page: Path) -> Iterator[tuple[str, str]]:
    """Yield what `excerpt` says of each fence of a page."""
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield excerpt(match, page)


def records(text: str) -> str:
    """Return facts and tables of the section of `docs/benchmarks.md` on GPUs, without rows of peers.

    Raises ValueError if one of the tables is not there.
    """
    section = SECTION.search(text)
    lines, absent, shown = section[0].splitlines() if section else [], set(TABLES), False
    kept = lines[:1]
    for line in lines[1:]:
        if begins := [table for table in TABLES if line.startswith(table)]:
            absent -= set(begins)
            kept.append("")  # a table ends where none of its lines follows
        shown = bool(begins) or (shown and line.startswith("|"))
        if FACT.match(line) or begins or (shown and not PEER.match(line)):
            kept.append(line)
    if absent:
        raise ValueError(f"no GPU section with tables that begin {', '.join(sorted(absent))}")
    return "\n".join(kept) + "\n"


def inlined(text: str, page: Path) -> str:
    """Return a page's text with the sources and records themselves instead of what names them."""

    def code(match: re.Match[str]) -> str:
        language, lines = excerpt(match, page)
        return f"```{language}\n{lines}```"

    def literal(match: re.Match[str]) -> str:
        found = records((page.parent.parent / match[1]).read_text(encoding="utf-8"))
        if '"""' in found or "\\" in found:
            raise ValueError(f"{match[1]} has a quote or a backslash that would end a literal")
        return f'recorded = """\\\n{found}"""'

    return RECORDS.sub(literal, FENCE.sub(code, text))
