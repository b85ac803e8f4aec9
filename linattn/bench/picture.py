"""A picture of time against length, on logarithmic axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linattn.bench.cases import Figure
from linattn.bench.results import Results
from linattn.errors import LinattnError

DPI = 200
# whose forward figures make a line -> how it is called and drawn
LINES = {
    ("torch", "decay"): ("linattn, torch", "#0b6e99", "o"),
    ("numpy", "decay"): ("linattn, NumPy", "#6aa84f", "s"),
    ("softmax", "softmax"): ("softmax, torch", "#c0392b", "^"),
    ("released cosFormer", "cosformer"): ("released cosFormer", "#8e6bb0", "D"),
}


def draw(results: Results, path: Path) -> None:
    """Write a PNG of the fastest forward pass of each computation against N, and of its extra memory.

    Raises LinattnError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(1, 2)
    for axis, title, of in zip(
        panels, ("Time, ms", "Extra memory, MB"), (_milliseconds, _megabytes), strict=True
    ):
        for (who, call), (name, color, marker) in LINES.items():
            points = sorted(
                (figure.n, value)
                for figure in results.measured
                if (figure.implementation, figure.call, figure.backward) == (who, call, False)
                and (value := of(results, figure)) is not None
            )
            if points:
                axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=name)
        length_axes(axis, title)
    panels[0].legend(frameon=False)
    canvas.suptitle(
        f"Causal attention, B=1 H=8 D=64 float32, on {results.facts.get('cores', '?')} cores of "
        f"{results.facts.get('processor', 'a processor')}",
        fontsize=12,
    )
    save(canvas, path)


def length_axes(axis: Any, title: str) -> None:
    """Logarithmic axes, the number of tokens across."""
    from matplotlib.ticker import FuncFormatter

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.tick_params(axis="x", labelrotation=45)
    axis.set_xlabel("tokens N")
    axis.set_title(title, loc="left")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)


def save(canvas: Any, path: Path) -> None:
    """Write a figure as a PNG.

    Raises LinattnError when that fails.
    """
    try:
        canvas.savefig(path, dpi=DPI, metadata={"Software": None})
    except OSError as error:
        raise LinattnError(f"cannot write {path}: {error.strerror or error}") from error


def _milliseconds(results: Results, figure: Figure) -> float | None:
    return results.measured[figure].best * 1e3


def _megabytes(results: Results, figure: Figure) -> float | None:
    extra = results.measured[figure].extra_bytes
    return extra / 1e6 if extra else None
