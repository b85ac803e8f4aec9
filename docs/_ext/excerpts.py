"""Pieces of sources that pages show, found by their first and last words, as literalinclude finds them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

FENCE = re.compile(r"^```\{literalinclude\} (\S+)\n((?::[\w-]+:.*\n)*)```$", re.M)
OPTION = re.compile(r"^:([\w-]+): *(.*)$", re.M)


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


def inlined(text: str, page: Path) -> str:
    """Return a page's text with the sources themselves instead of fences that name them."""

    def code(match: re.Match[str]) -> str:
        language, lines = excerpt(match, page)
        return f"```{language}\n{lines}```"

    return FENCE.sub(code, text)
