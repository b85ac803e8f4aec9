"""Pictures of time and memory against length, for light pages and for dark ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linattn.bench.cases import Figure
from linattn.bench.results import Results
from linattn.errors import LinattnError

DPI = 200
PANELS = {2: (1, 2), 3: (1, 3), 4: (2, 2)}  # rows and columns of so many
WIDTH = {2: 11.0, 3: 13.0}  # inches of so many columns: wider ones have small letters on a page
HEIGHT = {1: 4.8, 2: 8.4}  # inches of so many rows


@dataclass(frozen=True)
class Theme:
    """Colours of a picture: of the page behind it, of letters, of the grid, of what is no measurement."""

    page: str
    ink: str
    grid: str
    quiet: str
    lines: tuple[str, ...]  # told apart without colour by their markers


LIGHT = Theme("white", "#1f2328", "#dddddd", "#6b7280", ("#0b6e99", "#3f7d1f", "#c0392b", "#7d4fa8"))
DARK = Theme("#0d1117", "#e6edf3", "#30363d", "#9aa4af", ("#4cb8e6", "#7fc45f", "#f0776b", "#bb93e0"))
MARKERS = ("o", "s", "^", "D")

# whose forward figures make a line -> what it is called
LINES = {
    ("torch", "decay"): "linattn, torch",
    ("numpy", "decay"): "linattn, NumPy",
    ("softmax", "softmax"): "softmax, torch",
    ("released cosFormer", "cosformer"): "released cosFormer",
}


def draw(results: Results, path: Path) -> None:
    """Write a PNG of the fastest forward pass of each computation against N, and of its extra memory.

    Beside it, the same on black under the name that `dark` gives. Raises LinattnError when a file cannot be
    written.
    """
    title = (
        f"Causal attention, B=1 H=8 D=64 float32, on {results.facts.get('cores', '?')} cores of "
        f"{results.facts.get('processor', 'a processor')}"
    )

    def paint(theme: Theme, panels: Sequence[Any]) -> None:
        for axis, heading, of in zip(
            panels, ("Time, ms", "Extra memory, MB"), (_milliseconds, _megabytes), strict=True
        ):
            for (who, call), name in LINES.items():
                points = [
                    (figure.n, value)
                    for figure in results.measured
                    if (figure.implementation, figure.call, figure.backward) == (who, call, False)
                    and (value := of(results, figure)) is not None
                ]
                line(axis, theme, list(LINES.values()).index(name), name, points)
            length_axes(axis, theme, heading)
        legend(panels[0], theme)

    both(path, title, 2, paint)


def dark(path: Path) -> Path:
    """The name of the dark picture beside a light one: a-dark.png for a.png."""
    return path.with_name(f"{path.stem}-dark{path.suffix}")


def both(path: Path, title: str, count: int, paint: Callable[[Theme, Sequence[Any]], None]) -> None:
    """Write a picture of `count` panels, light and dark; `paint` fills the panels.

    Raises LinattnError when a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    for theme, to in ((LIGHT, path), (DARK, dark(path))):
        rows, columns = PANELS[count]
        size = (WIDTH[columns], HEIGHT[rows])
        canvas = Canvas(figsize=size, layout="constrained", facecolor=theme.page)
        FigureCanvasAgg(canvas)
        paint(theme, list(canvas.subplots(rows, columns).flat))
        canvas.suptitle(title, fontsize=12, color=theme.ink)
        save(canvas, to)


def one(path: Path, size: tuple[float, float], paint: Callable[[Theme, Any], None]) -> None:
    """Write a picture of one panel and so many inches, light and dark; `paint` fills the panel.

    Raises LinattnError when a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    for theme, to in ((LIGHT, path), (DARK, dark(path))):
        canvas = Canvas(figsize=size, layout="constrained", facecolor=theme.page)
        FigureCanvasAgg(canvas)
        paint(theme, canvas.subplots())
        save(canvas, to)


def line(axis: Any, theme: Theme, index: int, name: str, points: list[tuple[int, float]]) -> None:
    """One computation's points against N; nothing where there are none."""
    if points:
        color, marker = theme.lines[index], MARKERS[index]
        axis.plot(*zip(*sorted(points), strict=True), color=color, marker=marker, markersize=5, label=name)


def legend(axis: Any, theme: Theme) -> None:
    """Names of the lines, where there are lines."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, labelcolor=theme.ink)


def length_axes(
    axis: Any, theme: Theme, title: str, *, share: bool = False, linear: bool = False, upright: bool = False
) -> None:
    """Logarithmic axes, the number of tokens across.

    share: percent upwards, from 0 to 100 at least. linear: numbers upwards from 0. upright: numbers of tokens
    are not slanted.
    """
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    axis.set_facecolor(theme.page)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    if share:
        axis.set_ylim(0, max(100, axis.get_ylim()[1]))
        axis.yaxis.set_major_formatter(PercentFormatter())
    elif linear:
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.tick_params(axis="both", which="both", colors=theme.ink)
    axis.tick_params(axis="x", labelrotation=0 if upright else 45)
    axis.set_xlabel("tokens N", color=theme.ink)
    axis.set_title(title, loc="left", color=theme.ink)
    axis.grid(True, which="major", color=theme.grid, linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(theme.quiet)


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
