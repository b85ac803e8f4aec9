"""Results of a GPU read back from the tables of a page, and its pictures drawn from them again.

    python -m linattn.bench.gpu_page docs/benchmarks.md

draws docs/benchmarks-gpu.png and docs/benchmarks-forward.png, each with its dark twin, without a GPU.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from linattn.bench.gpu_cases import ALL, SIZES, WORDS, GpuCase, curves
from linattn.bench.gpu_machine import FACTS
from linattn.bench.gpu_picture import draw, draw_forward
from linattn.bench.gpu_report import COLUMNS, COST_COLUMNS, MARKS, NOTHING, PEER_COLUMNS
from linattn.bench.gpu_results import BYTES, MICROSECONDS, Cost, Entry, GpuResults, GpuRow, Timing
from linattn.bench.report import SIZE_UNITS
from linattn.errors import OptionError

ANYTHING = 10**15  # bytes of a GPU that holds every length of the picture
ANOTHER = "softmax"  # the peer that computes another function


def read(page: str) -> GpuResults:
    """What the section of a page says, with as many digits as it has; floors are computed from the bandwidth.

    Of what was not measured a page keeps no row. Raises OptionError for a page without the section.
    """
    _, begun, rest = page.partition(MARKS[0])
    section, ended, _ = rest.partition(MARKS[1])
    if not (begun and ended):
        raise OptionError(f"the page has no figures of a GPU: it needs the lines {MARKS[0]} and {MARKS[1]}")
    facts = {name: said for name, said in re.findall(r"^- ([\w -]+): (.+)$", section, re.M) if name in FACTS}
    bandwidth = float(facts["copy bandwidth"].split()[0])
    entries: dict[str, list[Entry]] = {}
    for label, *cells in _table(section, PEER_COLUMNS):
        if cells[1] != NOTHING:
            entries.setdefault(label, []).append(_entry(*cells))
    found = {label: _row(_case(label), bandwidth, measured) for label, measured in entries.items()}
    rows = tuple(found[label] for label, *_ in _table(section, COLUMNS))
    drawn = {case.name for case in curves(ANYTHING)}
    lines = tuple(row for row in found.values() if row.case.name in drawn)
    costs = tuple(_cost(*cells) for cells in _table(section, COST_COLUMNS))
    return GpuResults(facts, bandwidth, True, rows, costs, lines)


def _table(section: str, columns: tuple[str, ...]) -> Iterator[list[str]]:
    """The cells of every row below these columns."""
    lines = iter(section.splitlines())
    for line in lines:
        if line == f"| {' | '.join(columns)} |":
            next(lines)
            break
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def _case(label: str) -> GpuCase:
    """The case that `gpu_report.label` names, with what is required of it."""
    found = re.fullmatch(r"(.+?), ([\d ]+)((?:, \w+)*)", label)
    if found is None:
        raise OptionError(f"no case is named {label!r}")
    kind = next(kind for kind, words in WORDS.items() if words == found[1])
    b, h, *n, d = map(int, found[2].split())
    case = GpuCase(kind, b, h, n[0] if n else 1, d)
    for word in found[3].split(", ")[1:]:
        case = replace(case, dtype=word) if word in SIZES else replace(case, backend=word)
    return next((known for known in ALL if known.name == case.name), case)


def _row(case: GpuCase, bandwidth: float, measured: list[Entry]) -> GpuRow:
    ours, *peers = measured
    return GpuRow(case, case.bytes / bandwidth / 1e6, ours, tuple(peers))


def _entry(who: str, ms: str, replayed: str, error: str, extra: str, first: str) -> Entry:
    def some(cell: str, of: Callable[[str], float] = float) -> float | None:
        return None if cell == NOTHING else of(cell)

    wrong = some(error.removesuffix(" (wrong)"))
    held = some(extra, _bytes)
    timing = Timing(float(ms), wrong, some(first), some(replayed), None if held is None else int(held))
    return Entry(who, timing, same=who != ANOTHER)


def _cost(what: str, who: str, measured: str, required: str, _: str) -> Cost:
    memory = measured.endswith(" of memory")

    def value(cell: str) -> float | None:
        said = cell.removeprefix("at most ")
        if said == NOTHING:
            return None
        return _bytes(said.removesuffix(" of memory")) if memory else float(said.split()[0])

    return Cost(what, who, BYTES if memory else MICROSECONDS, value(measured), value(required))


def _bytes(cell: str) -> float:
    """What `report.size` wrote."""
    number, unit = cell.split()
    return round(float(number) * {name: scale for scale, name in SIZE_UNITS}[unit])


def main(page: str) -> None:
    """Draw the pictures of a page beside it."""
    path = Path(page)
    results = read(path.read_text())
    draw(results, path.with_name(f"{path.stem}-gpu.png"))
    draw_forward(results, path.with_name(f"{path.stem}-forward.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
