"""Results of a GPU for people: cells of tables, a section of a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from linattn.bench.gpu_cases import WORDS
from linattn.bench.gpu_machine import FACTS
from linattn.bench.gpu_measure import STEPS
from linattn.bench.gpu_results import MICROSECONDS, Cost, Entry, GpuResults, GpuRow, Timing
from linattn.bench.report import folded, section_of, size, table

BEGIN, END = (
    "<!-- gpu bench: `linattn bench --gpu --out` writes from here -->",
    "<!-- end of gpu bench -->",
)
MARKS = (BEGIN, END)
COLUMNS = (
    "case",
    "floor ms",
    "ours ms",
    "% of floor",
    "extra memory",
    "best peer ms",
    "times as fast",
    "softmax ms",
    "required ms",
    "met?",
)
PEER_COLUMNS = (
    "case",
    "who",
    "ms",
    f"one of {STEPS} in a CUDA graph, ms",
    "error",
    "extra memory",
    "first call, s",
)
COST_COLUMNS = ("what", "who", "measured", "required", "met?")
NOTHING = "–"
MET = {True: "yes", False: "NO", None: NOTHING}


def digits(ms: float) -> str:
    """Milliseconds with three digits, four below a hundredth."""
    if ms >= 100:
        return f"{ms:.0f}"
    places = 4 if ms < 0.1 else 3 if ms < 1 else 2
    return f"{ms:.{places}f}"


def label(row: GpuRow) -> str:
    """A case in words, with its shape: B H N D, of a decode step B H D; and what is not usual about it."""
    case = row.case
    words = [WORDS[case.kind], case.shape]
    words += [word for word, usual in ((case.dtype, "bfloat16"), (case.backend, "triton")) if word != usual]
    return ", ".join(words)


def cells(row: GpuRow) -> tuple[str, ...]:
    """One case under COLUMNS."""
    best, ours = row.best, row.ours.timing
    faster = best.timing.ms / ours.ms if best and best.timing and ours else None
    return (
        label(row),
        digits(row.floor),
        _ms(row.ours),
        NOTHING if row.fraction is None else f"{100 * row.fraction:.0f} %",
        _extra(ours),
        NOTHING if best is None else f"{_ms(best)} ({best.name})",
        NOTHING if faster is None else f"{faster:.2f}",
        NOTHING if row.other is None else _ms(row.other),
        NOTHING if row.required is None else f"{row.required:.3g}",
        "wrong" if ours and not ours.right else MET[row.met],
    )


def _ms(entry: Entry) -> str:
    return NOTHING if entry.timing is None else digits(entry.timing.ms)


def _extra(timing: Timing | None) -> str:
    return NOTHING if timing is None or timing.extra is None else size(timing.extra)


def entry_cells(row: GpuRow, entry: Entry) -> tuple[str, ...]:
    """One measurement under PEER_COLUMNS."""
    timing = entry.timing
    if timing is None:
        return (label(row), entry.name, *(NOTHING,) * 5)
    error = NOTHING if timing.error is None else f"{timing.error:.1e}" + ("" if timing.right else " (wrong)")
    return (
        label(row),
        entry.name,
        digits(timing.ms),
        NOTHING if timing.replayed is None else digits(timing.replayed),
        error,
        _extra(timing),
        NOTHING if timing.first is None else f"{timing.first:.2f}",
    )


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """One host time or memory under COST_COLUMNS."""
    return (
        cost.what,
        cost.who,
        NOTHING if cost.value is None else _cost(cost, cost.value),
        NOTHING if cost.required is None else f"at most {_cost(cost, cost.required)}",
        MET[cost.met],
    )


def _cost(cost: Cost, value: float) -> str:
    return f"{value:.1f} {cost.unit}" if cost.unit == MICROSECONDS else f"{size(value)} of memory"


def entries(rows: Iterable[GpuRow]) -> list[tuple[str, ...]]:
    """Every measurement of some rows under PEER_COLUMNS, ours first."""
    return [entry_cells(row, entry) for row in rows for entry in (row.ours, *row.peers)]


def reasons(results: GpuResults) -> list[str]:
    """One line for each reason for which something was not measured: what, or in how many cases."""
    found = [
        (entry.why, entry.name, label(row))
        for row in (*results.rows, *results.curves)
        for entry in (row.ours, *row.peers)
    ]
    found += [(cost.why, cost.who, cost.what) for cost in results.costs]
    lines: dict[str, dict[str, list[str]]] = {}
    for why, who, what in dict.fromkeys(found):
        if why is not None:
            lines.setdefault(why, {}).setdefault(who, []).append(what)
    return [f"{_missing(whom)}: {why}" for why, whom in lines.items()]


def _missing(whom: dict[str, list[str]]) -> str:
    if sum(map(len, whom.values())) == 1:
        return next(f"{what[0]}, {who}" for who, what in whom.items())
    return "; ".join(f"{who} in {len(what)} case{'s' * (len(what) > 1)}" for who, what in whom.items())


def verdict(results: GpuResults) -> str:
    """One sentence: which requirements are met."""
    judged = results.judged()
    if not judged:
        return "Nothing is judged: the requirements are about the full shapes."
    unmet = [name for name, met in judged if not met]
    if not unmet:
        return f"All {len(judged)} requirements are met."
    return f"{len(judged) - len(unmet)} of {len(judged)} requirements are met; not met: {', '.join(unmet)}."


def line(found: GpuRow | Cost) -> str:
    """What is told when something has been measured."""
    if isinstance(found, Cost):
        what, who, value, *_ = cost_cells(found)
        return f"{what}, {who}: {found.why or value}"
    others = ", ".join(f"{peer.name} {_ms(peer)}" for peer in found.peers)
    ours = found.ours.why or f"{_ms(found.ours)} ms"
    return f"{label(found)}: {ours}, floor {digits(found.floor)}" + (f"; {others}" if others else "")


def markdown(results: GpuResults) -> str:
    """The section of a page: facts, cases, costs, every measurement, what was not measured."""
    parts = ["\n".join(f"- {name}: {results.facts[name]}" for name in FACTS if name in results.facts)]
    parts.append(verdict(results))
    if results.rows:
        parts.append(table(COLUMNS, [cells(row) for row in results.rows]))
    if results.costs:
        parts += ["### Time on the host, memory", table(COST_COLUMNS, [cost_cells(c) for c in results.costs])]
    every = entries(all_rows(results))
    made = [found for found in every if found[2] != NOTHING]
    parts += ["### Every measurement", folded(f"{len(made)} measurements", table(PEER_COLUMNS, made))]
    if missing := reasons(results):
        absent = (
            f"{len(every) - len(made)} of {len(every)} measurements were not made, and have no row above."
        )
        parts += ["### Not measured", absent, "\n".join(f"- {reason}" for reason in missing)]
    return "\n\n".join(parts)


def all_rows(results: GpuResults) -> list[GpuRow]:
    """The cases, and what the picture has besides them."""
    return list({row.case.name: row for row in (*results.curves, *results.rows)}.values())


def replace_section(path: Path, results: GpuResults, picture: Path | None = None) -> None:
    """Write the GPU's section of a Markdown page, or a page of its own where there is none.

    Raises OptionError where a page has no marks, LinattnError when it cannot be written.
    """
    shown = "" if picture is None else f"![Time against the number of tokens]({picture.name})\n\n"
    section_of(path, MARKS, shown + markdown(results))
