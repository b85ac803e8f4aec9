"""Pictures of time and memory against length on a GPU, and of how near calls come to the floor of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linattn.bench.gpu_cases import Kind
from linattn.bench.gpu_results import GpuResults, GpuRow, Timing
from linattn.bench.gpu_runner import OURS
from linattn.bench.picture import MARKERS, Theme, both, length_axes, line, one

KINDS: dict[Kind, str] = {"forward": "Forward", "forward-backward": "Forward + backward"}
CUPY = "linattn cupy"
LINES = (OURS, "fla chunk", "softmax", CUPY)  # Llama's attention is the third in the picture of models, too
SHARED = ("fla chunk", OURS, CUPY)  # compared with the floor: the same function; ours are drawn on top
STYLES = {"forward": "-", "forward-backward": ":"}
FLOOR = "floor: bytes moved once"
LABELS = {
    OURS: "linattn, Triton",
    CUPY: "linattn, CuPy",
    "fla chunk": "flash-linear-\nattention",
    FLOOR: "floor: each\nbyte moved once",
}
"""Of the picture with one panel, which has them at the ends of its lines."""
APART = 13.0  # points from one line of letters to the next
TALL, WIDE = 3.0, 6.0  # inches of the picture with one panel
PLOT = 0.7  # of its height, which the axis takes


def draw(results: GpuResults, path: Path) -> None:
    """Write a PNG of the time of each computation against N, of how much of it moving the bytes takes, and of
    the extra memory of a forward pass where that was recorded.

    Beside it, the same on black under the name that `picture.dark` gives. Raises LinattnError when a file
    cannot be written.
    """
    rows = {kind: _rows(results, kind) for kind in KINDS}
    extra = {name: _megabytes(rows["forward"], name) for name in LINES}
    recorded = any(extra.values())

    def paint(theme: Theme, panels: Sequence[Any]) -> None:
        for axis, (kind, title) in zip(panels, KINDS.items(), strict=False):
            for index, name in enumerate(LINES):
                points = _points(rows[kind], name)
                line(axis, theme, index, name, points)
                if len(points) == 1:
                    words = {"textcoords": "offset points", "ha": "right", "va": "center"}
                    axis.annotate(
                        f"{name}, one length timed", points[0], (-8, 0), color=theme.lines[index], **words
                    )
            if rows[kind]:
                floor = _floors(rows[kind])
                axis.plot(*zip(*floor, strict=True), color=theme.quiet, linestyle="--", label=FLOOR)
            length_axes(axis, theme, f"{title}, ms")
        for kind, title in KINDS.items():
            if rows[kind]:  # colours are those of the legend below
                panels[2].plot([], [], color=theme.quiet, linestyle=STYLES[kind], label=title.lower())
            floors = dict(_floors(rows[kind]))
            for name in SHARED:
                shares = [(n, 100 * floors[n] / ms) for n, ms in _points(rows[kind], name)]
                if shares:
                    index = LINES.index(name)
                    panels[2].plot(
                        *zip(*shares, strict=True), color=theme.lines[index], linestyle=STYLES[kind],
                        marker=MARKERS[index], markersize=5,
                    )  # fmt: skip
        length_axes(panels[2], theme, "Floor, as a share of the time", share=True)
        plain = {"frameon": False, "labelcolor": theme.ink}
        names = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
        if names:
            panels[0].figure.legend(
                names.values(), names, loc="outside lower center", ncols=len(names), **plain
            )
            panels[2].legend(**plain)
        if recorded:
            for index, name in reversed([*enumerate(LINES)]):  # ours on top
                line(panels[3], theme, index, name, extra[name])
            alone = [(row.case.n, row.case.array / 1e6) for row in _lengths(rows["forward"])]
            quiet = {"color": theme.quiet, "linestyle": "--"}
            (result,) = panels[3].plot(*zip(*alone, strict=True), **quiet, label="the result alone")
            length_axes(panels[3], theme, "Extra memory, forward, MB")
            panels[3].legend(handles=[result], **plain)

    title = f"Causal attention, {_shape(results)}bfloat16, on {_device(results)}"
    both(path, title, 4 if recorded else 3, paint)


def draw_forward(results: GpuResults, path: Path) -> None:
    """Write a PNG with one panel: time of a forward pass against N, of what computes the same function.

    Names stand at the ends of the lines. Beside it, the same on black under the name that `picture.dark`
    gives. Raises LinattnError when a file cannot be written.
    """
    rows = _rows(results, "forward")
    found = {name: _points(rows, name) for name in SHARED} | {FLOOR: sorted(_floors(rows))}
    found = {name: points for name, points in found.items() if points}

    def paint(theme: Theme, axis: Any) -> None:
        for name, points in found.items():
            if name == FLOOR:
                axis.plot(*zip(*points, strict=True), color=theme.quiet, linestyle="--", label=name)
            else:
                line(axis, theme, LINES.index(name), name, points)
        length_axes(axis, theme, "Causal linear attention, forward, ms", upright=True)
        axis.set_xlabel(f"tokens ({_shape(results)}bfloat16, on {_device(results)})", color=theme.ink)
        if found:
            _name_ends(axis, theme, found)

    one(path, (WIDE, TALL), paint)


def _name_ends(axis: Any, theme: Theme, found: dict[str, list[tuple[int, float]]]) -> None:
    """Each line's name right of its end, moved up or down until none stands on another."""
    low, high = (math.log(y) for y in axis.get_ylim())
    per_unit = 72 * TALL * PLOT / (high - low)
    ends = sorted(found, key=lambda name: found[name][-1][1])
    wanted = [math.log(found[name][-1][1]) * per_unit for name in ends]
    places: list[float] = []
    for at, name, below in zip(wanted, ends, [None, *ends], strict=False):
        gap = 0.0 if below is None else APART * (_lines(name) + _lines(below)) / 2
        places.append(at if below is None else max(at, places[-1] + gap))
    lowered = APART * sum(place > at for at, place in zip(wanted, places, strict=True)) / 2
    for name, at, place in zip(ends, wanted, places, strict=True):
        pushed = place > at or name == ends[0]
        color = theme.lines[LINES.index(name)] if name in LINES else theme.quiet
        axis.annotate(
            LABELS[name], found[name][-1], (9, place - at - lowered * pushed), textcoords="offset points",
            color=color, va="center", annotation_clip=False,
        )  # fmt: skip


def _lines(name: str) -> int:
    return LABELS[name].count("\n") + 1


def _rows(results: GpuResults, kind: Kind) -> list[GpuRow]:
    """The lengths of one kind, and CuPy's calls of the same shape."""
    lines = [row for row in results.curves if row.case.kind == kind]
    shapes = {(case.b, case.h, case.d, case.dtype) for case in (row.case for row in lines)}
    beside = [
        row
        for row in results.rows
        if row.case.kind == kind
        and row.case.backend == "cupy"
        and (row.case.b, row.case.h, row.case.d, row.case.dtype) in shapes
    ]
    return sorted([*lines, *beside], key=lambda row: row.case.n)


def _lengths(rows: list[GpuRow]) -> list[GpuRow]:
    """One row for each length."""
    return list({row.case.n: row for row in rows}.values())


def _floors(rows: list[GpuRow]) -> list[tuple[int, float]]:
    return [(row.case.n, row.floor) for row in _lengths(rows)]


def _points(rows: list[GpuRow], name: str) -> list[tuple[int, float]]:
    """Lengths and milliseconds of one computation, where it was measured."""
    return [(n, timing.ms) for n, timing in _timings(rows, name)]


def _megabytes(rows: list[GpuRow], name: str) -> list[tuple[int, float]]:
    """Lengths and megabytes beyond the inputs of one computation, where they were recorded."""
    return [(n, timing.extra / 1e6) for n, timing in _timings(rows, name) if timing.extra]


def _timings(rows: list[GpuRow], name: str) -> list[tuple[int, Timing]]:
    return [
        (row.case.n, entry.timing)
        for row in rows
        for entry in (row.ours, *row.peers)
        if entry.name == name and entry.timing is not None
    ]


def _shape(results: GpuResults) -> str:
    if not results.curves:
        return ""
    case = results.curves[0].case
    return f"B={case.b} H={case.h} D={case.d} "


def _device(results: GpuResults) -> str:
    return results.facts.get("GPU", "a GPU").partition(",")[0]
