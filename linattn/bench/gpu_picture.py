"""A picture of time against length on a GPU, the floor that memory sets, and how near calls come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linattn.bench.gpu_cases import Kind
from linattn.bench.gpu_results import GpuResults, GpuRow
from linattn.bench.gpu_runner import OURS
from linattn.bench.picture import MARKERS, Theme, both, legend, length_axes, line

KINDS: dict[Kind, str] = {"forward": "Forward", "forward-backward": "Forward + backward"}
LINES = (OURS, "fla chunk", "softmax")
SHARED = ("fla chunk", OURS)  # compared with the floor: the same function; ours is drawn on top
STYLES = {"forward": "-", "forward-backward": ":"}


def draw(results: GpuResults, path: Path) -> None:
    """Write a PNG of the time of each computation against N, and of how much of it moving the bytes takes.

    Beside it, the same on black under the name that `picture.dark` gives. Raises LinattnError when a file
    cannot be written.
    """
    rows = {
        kind: sorted((row for row in results.curves if row.case.kind == kind), key=lambda row: row.case.n)
        for kind in KINDS
    }

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

    both(path, f"Causal attention, {_shape(results)}bfloat16, on {_device(results)}", 3, paint)


def _points(rows: list[GpuRow], name: str) -> list[tuple[int, float]]:
    """Lengths and milliseconds of one computation, where it was measured."""
    return [
        (row.case.n, entry.timing.ms)
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
