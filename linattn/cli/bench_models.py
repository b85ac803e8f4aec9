"""`linattn bench --models`: whole models, and claims of papers about their parts, on one device."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from linattn.cli.output import Bar, print_json, print_lines, print_table
from linattn.errors import OptionError

if TYPE_CHECKING:
    from linattn.bench.systems import Row, Verdict

MARKS = (
    "<!-- models bench: `linattn bench --models --out` writes from here -->",
    "<!-- end of models bench -->",
)
COLUMNS = ("what", "who", "B", "N", "ms", "tokens/s", "peak memory", "bytes to move", "remark")
REQUIRED = ("required, on an H200", "found", "met?")


def check(outputs: list[Path]) -> None:
    """Raise OptionError for files that cannot be written, before anything is measured."""
    from linattn.bench.report import check_page

    for path in outputs:
        if path.suffix not in (".json", ".md", ".png"):
            raise OptionError(f"--out of --models must end in .json, .md or .png; got {path}")
        if not path.parent.is_dir():
            raise OptionError(f"--out {path}: there is no folder {path.parent}")
        if path.suffix == ".md":
            check_page(path, MARKS)
        if path.suffix == ".png":
            import matplotlib.figure  # noqa: F401  (what is missing is said now)


def bench_models(outputs: list[Path], kinds: Sequence[str] = (), *, as_json: bool, quick: bool) -> None:
    """Measure on CUDA where it is, else, quickly only, on the processor; print, and write after every row.

    kinds: of rows, none for all. Raises OptionError without CUDA and without --quick, and for other kinds.
    """
    import torch

    from linattn.bench import claims, systems, systems_rows
    from linattn.bench.cases import OF_MODELS
    from linattn.bench.gpu_machine import gpu_machine
    from linattn.bench.gpu_measure import Cuda
    from linattn.bench.machine import machine

    check(outputs)
    for kind in kinds:
        if kind not in OF_MODELS:
            raise OptionError(f"--case of --models is one of {', '.join(OF_MODELS)}; got {kind}")
    if kinds and "training" not in kinds and any(path.suffix == ".png" for path in outputs):
        raise OptionError("the picture of --models shows training: add --case training, or leave it out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        raise OptionError("--models needs a CUDA device; with --quick, small models run on the processor")
    facts = gpu_machine() if device.type == "cuda" else machine()
    options = ["--quick"] * quick + [f"--case {kind}" for kind in kinds]
    facts["command"] = " ".join(["linattn bench --models", *options])
    bandwidth = 0.0
    if device.type == "cuda":
        bandwidth = Cuda().gigabytes_per_second() * 1e9
        facts["copy bandwidth"] = f"{bandwidth / 1e9:.0f} GB/s read and written"
    rows: list[Row] = []
    judged: list[Verdict] = []
    tasks = functools.partial(systems_rows.chosen, device, kinds, quick=quick)

    def begins(row: Row) -> None:
        bar.at(_name(row))
        if not bar.shown:
            bar.line(f"{_name(row)}: begins")

    # counted on another pass: tasks hold their models, and go before the next ones are made
    with Bar(sum(1 for _ in tasks())) as bar:
        for row in systems.measure(tasks(), device, begins):
            rows.append(row)
            judged = [] if quick else [*systems.verdicts(rows, bandwidth), *claims.verdicts(rows)]
            said = "; ".join(part for part in (_ms(row), row.failed, row.note) if part)
            bar.line(f"{_name(row)}: {said}")
            bar.advance()
            for path in outputs:
                pictures = [one for one in outputs if one.suffix == ".png" and one.parent == path.parent]
                write(path, facts, rows, judged, pictures[0] if pictures else None)
    if as_json:
        print_json(_fields(facts, rows, judged))
        return
    print_lines(facts)
    typer.echo()
    print_table(COLUMNS, map(cells, rows))
    if judged:
        print_table(REQUIRED, map(judgement, judged))


def write(
    path: Path,
    facts: dict[str, Any],
    rows: Sequence[Row],
    judged: Sequence[Verdict],
    picture: Path | None = None,
) -> None:
    """Write what is known so far, as JSON, as a picture, or as a section of a page that shows a picture."""
    from linattn.bench.report import section_of, table, write_text

    if path.suffix == ".json":
        write_text(path, json.dumps(_fields(facts, rows, judged), indent=2) + "\n")
        return
    if path.suffix == ".png":
        from linattn.bench.systems_picture import draw

        if rows[-1].what == "training":  # nothing else is in it
            draw(rows, facts, path)
        return
    parts = [
        *(
            [f"![Training: tokens per second and memory against the length]({picture.name})"]
            if picture
            else []
        ),
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        table(COLUMNS, map(cells, rows)),
    ]
    if judged:
        parts.append(table(REQUIRED, map(judgement, judged)))
    section_of(path, MARKS, "\n\n".join(parts))


def cells(row: Row) -> tuple[str, ...]:
    """A row under COLUMNS."""
    from linattn.bench.report import size

    rate = "–" if row.rate is None else f"{row.rate:,.0f}"
    peak = "–" if row.peak is None else size(row.peak)
    moved = size(row.bytes) if row.bytes else "–"
    sizes = (str(row.batch), str(row.n), _ms(row, unit="") or "–")
    return (row.what, row.who, *sizes, rate, peak, moved, row.remark)


def judgement(one: Verdict) -> tuple[str, str, str]:
    """A verdict under REQUIRED."""
    return one.required, one.found, {True: "yes", False: "NO", None: "–"}[one.met]


def _name(row: Row) -> str:
    return f"{row.what}, {row.who}, {row.batch} x {row.n}"


def _ms(row: Row, unit: str = " ms") -> str:
    return "" if row.seconds is None else f"{1e3 * row.seconds:.3g}{unit}"


def _fields(facts: dict[str, Any], rows: Sequence[Row], judged: Sequence[Verdict]) -> dict[str, Any]:
    from dataclasses import asdict

    from linattn.bench.systems import as_json

    return {"facts": facts, "rows": as_json([*rows]), "verdicts": [asdict(one) for one in judged]}
