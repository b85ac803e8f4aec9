"""A picture of time against length on a GPU, with the floor that memory sets."""

from __future__ import annotations

from pathlib import Path

from linattn.bench.gpu_cases import Kind
from linattn.bench.gpu_results import GpuResults, GpuRow
from linattn.bench.gpu_runner import OURS
from linattn.bench.picture import length_axes, save

PANELS: tuple[tuple[Kind, str], ...] = (
    ("forward", "Forward, ms"),
    ("forward-backward", "Forward + backward, ms"),
)
# whose line -> how it is drawn
LINES = {
    OURS: ("#0b6e99", "o"),
    "fla chunk": ("#6aa84f", "s"),
    "softmax": ("#c0392b", "^"),
}


def draw(results: GpuResults, path: Path) -> None:
    """Write a PNG of the time of each computation against N, with the least time that the bytes take.

    Raises LinattnError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(1, 2)
    for axis, (kind, title) in zip(panels, PANELS, strict=True):
        rows = sorted((row for row in results.curves if row.case.kind == kind), key=lambda row: row.case.n)
        for name, (color, marker) in LINES.items():
            points = [(row.case.n, ms) for row in rows if (ms := _milliseconds(row, name)) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=name)
        if rows:
            floor = [(row.case.n, row.floor) for row in rows]
            axis.plot(
                *zip(*floor, strict=True), color="#777777", linestyle="--", label="floor: bytes moved once"
            )
        length_axes(axis, title)
    if results.curves:
        panels[0].legend(frameon=False)
    canvas.suptitle(f"Causal attention, {_shape(results)}bfloat16, on {_device(results)}", fontsize=12)
    save(canvas, path)


def _milliseconds(row: GpuRow, name: str) -> float | None:
    entry = next((entry for entry in (row.ours, *row.peers) if entry.name == name), None)
    return None if entry is None or entry.timing is None else entry.timing.ms


def _shape(results: GpuResults) -> str:
    if not results.curves:
        return ""
    case = results.curves[0].case
    return f"B={case.b} H={case.h} D={case.d} "


def _device(results: GpuResults) -> str:
    return results.facts.get("GPU", "a GPU").partition(",")[0]
