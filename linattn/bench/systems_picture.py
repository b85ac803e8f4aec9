"""A picture of whole models: tokens trained a second, and memory, against the length of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linattn.bench.picture import MARKERS, Theme, both, legend, length_axes, line
from linattn.bench.systems import LLAMA, OURS, Row

LINES = ((OURS, 0), (LLAMA, 2))  # and which colour: softmax attention's in the other pictures, too


def draw(rows: Sequence[Row], facts: dict[str, str], path: Path) -> None:
    """Write a PNG of the rate of training steps and of the most memory that they hold, of both models.

    A hollow mark is a step that is noted to be unlike the others: activations were formed twice. Beside the
    picture, the same on black under the name that `picture.dark` gives. Raises LinattnError when a file
    cannot be written.
    """
    steps = sorted((row for row in rows if row.what == "training" and not row.failed), key=lambda row: row.n)

    def paint(theme: Theme, panels: Sequence[Any]) -> None:
        for axis, title, of in zip(
            panels, ("Training, tokens/s", "Peak memory, GB"), (_rate, _gigabytes), strict=True
        ):
            for who, index in LINES:
                found = [(row, value) for row in steps if row.who == who and (value := of(row)) is not None]
                line(axis, theme, index, who, [(row.n, value) for row, value in found])
                for note in dict.fromkeys(row.note for row, _ in found if row.note):
                    marked = [(row.n, value) for row, value in found if row.note == note]
                    axis.plot(
                        *zip(*marked, strict=True), color=theme.lines[index], marker=MARKERS[index],
                        markerfacecolor=theme.page, linestyle="", label=note.partition(":")[0],
                    )  # fmt: skip
            length_axes(axis, theme, title, linear=True)
            axis.set_xticks(sorted({row.n for row in steps}))
            axis.minorticks_off()
        legend(panels[0], theme)

    both(path, f"Training, {_tokens(steps)}on {_device(facts)}", 2, paint)


def _rate(row: Row) -> float | None:
    return row.rate


def _gigabytes(row: Row) -> float | None:
    return None if row.peak is None else row.peak / 1e9


def _tokens(steps: list[Row]) -> str:
    if not steps:
        return ""
    return f"{min(row.batch * row.n for row in steps):,} tokens a step or one longer text, "


def _device(facts: dict[str, str]) -> str:
    return facts.get("GPU", "a processor").partition(",")[0]
