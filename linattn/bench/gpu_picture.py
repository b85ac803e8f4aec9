"""A picture of time and memory against length on a GPU, and of how near calls come to the floor of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linattn.bench.gpu_cases import Kind
from linattn.bench.gpu_results import GpuResults, GpuRow, Timing
from linattn.bench.gpu_runner import OURS
from linattn.bench.picture import MARKERS, Theme, both, legend, length_axes, line

KINDS: dict[Kind, str] = {"forward": "Forward", "forward-backward": "Forward + backward"}
LINES = (OURS, "fla chunk", "softmax")
SHARED = ("fla chunk", OURS)  # compared with the floor: the same function; ours is drawn on top
STYLES = {"forward": "-", "forward-backward": ":"}


def draw(results: GpuResults, path: Path) -> None:
    """Write a PNG of the time of each computation against N, of how much of it moving the bytes takes, and of
    the extra memory of a forward pass where that was recorded.

    Beside it, the same on black under the name that `picture.dark` gives. Raises LinattnError when a file
    cannot be written.
    """
    rows = {
        kind: sorted((row for row in results.curves if row.case.kind == kind), key=lambda row: row.case.n)
        for kind in KINDS
    }

    extra = {name: _megabytes(rows["forward"], name) for name in LINES}
    recorded = any(extra.values())

    def paint(theme: Theme, panels: Sequence[Any]) -> None:
        for axis, (kind, title) in zip(panels, KINDS.items(), strict=False):
            for index, name in enumerate(LINES):
                line(axis, theme, index, name, _points(rows[kind], name))
            if rows[kind]:
                floor = [(row.case.n, row.floor) for row in rows[kind]]
                words = "floor: bytes moved once"
                axis.plot(*zip(*floor, strict=True), color=theme.quiet, linestyle="--", label=words)
            length_axes(axis, theme, f"{title}, ms")
        for kind, title in KINDS.items():
            if rows[kind]:  # colours are those of the first panel
                panels[2].plot([], [], color=theme.quiet, linestyle=STYLES[kind], label=title.lower())
            floors = {row.case.n: row.floor for row in rows[kind]}
            for name in SHARED:
                shares = [(n, 100 * floors[n] / ms) for n, ms in _points(rows[kind], name)]
                if shares:
                    index = LINES.index(name)
                    panels[2].plot(
                        *zip(*shares, strict=True), color=theme.lines[index], linestyle=STYLES[kind],
                        marker=MARKERS[index], markersize=5,
                    )  # fmt: skip
        length_axes(panels[2], theme, "Floor, as a share of the time", share=True)
        legend(panels[0], theme)
        legend(panels[2], theme)
        if recorded:
            for index, name in reversed([*enumerate(LINES)]):  # ours on top
                line(panels[3], theme, index, name, extra[name])
            alone = [(row.case.n, row.case.array / 1e6) for row in rows["forward"]]
            quiet = {"color": theme.quiet, "linestyle": "--"}
            (result,) = panels[3].plot(*zip(*alone, strict=True), **quiet, label="the result alone")
            length_axes(panels[3], theme, "Extra memory, forward, MB")
            panels[3].legend(handles=[result], frameon=False, labelcolor=theme.ink)

    title = f"Causal attention, {_shape(results)}bfloat16, on {_device(results)}"
    both(path, title, 4 if recorded else 3, paint)


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
