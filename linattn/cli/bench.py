"""`linattn bench`: time and memory, beside the computations that linear attention replaces."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linattn.cli import names
from linattn.cli.bench_gpu import bench_gpu
from linattn.cli.bench_models import bench_models
from linattn.cli.output import Bar, print_json, print_lines, print_table
from linattn.errors import OptionError

if TYPE_CHECKING:
    from linattn.bench import Figure, Measurement, Results

QUICK = 16  # what --quick divides the lengths by
SUFFIXES = (".json", ".md", ".png")


def bench(
    cpu: Annotated[bool, typer.Option("--cpu", help="The processor; the default.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="A CUDA device, beside flash-linear-attention.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Whole models: training, decoding, MiniMax's layer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Lengths divided by 16, few runs, nothing judged.")
    ] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<name>",
            help="Only this case (repeatable); of --models: training, decoding, generating, layer, "
            "attention or norm.",
            autocompletion=names.cases,
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Processor: timed calls per figure; the fastest counts.")
    ] = 7,
    peer_seconds: Annotated[
        float, typer.Option(min=0, help="GPU: what the peers may take in all; 0 leaves them out.")
    ] = 150.0,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>",
            help="Also write .json, .png (against N: time, memory or the floor's share; a second one, "
            "-dark.png, for dark pages), or the tables into a .md (repeatable).",
        ),
    ] = None,
) -> None:
    """Measure time and extra memory, and set them beside softmax attention and the released cosFormer.

    On the processor, every figure is measured in a process of its own, with the libraries' default threads:
    the memory of the first call (the rise of the process's high-water mark above what it holds with the
    inputs made), then the fastest of 7 calls. On a GPU, everything is measured in one process, by device
    events: medians with a cold cache, beside the time that moving the bytes takes and beside every peer that
    is installed. Use a machine that does nothing else. What is required is judged at full length; a
    requirement that is missed does not change the exit status.
    """
    from linattn.bench import cases, run
    from linattn.bench.cases import curves

    outputs = list(out or ())
    asked_for = [f"--{name}" for name, on in (("cpu", cpu), ("gpu", gpu), ("models", models)) if on]
    if len(asked_for) > 1:
        raise OptionError(f"give {' or '.join(asked_for)}, not {'both' if len(asked_for) == 2 else 'all'}")
    if models:
        bench_models(outputs, case or (), as_json=as_json, quick=quick)
        return
    _check(outputs, gpu=gpu)
    if gpu:
        bench_gpu(case or (), outputs, as_json=as_json, quick=quick, peer_seconds=peer_seconds)
        return
    asked = cases(case or (), divide=QUICK if quick else 1)
    if any(path.suffix == ".png" for path in outputs):
        asked.append(curves(divide=QUICK if quick else 1))
    runs = min(runs, 3) if quick else runs
    with Bar(len({figure for case in asked for figure in case.measured()})) as bar:
        results = run(asked, runs=runs, full=not quick, progress=functools.partial(_told, bar))
    options = ["--cpu"] * cpu + ["--quick"] * quick + [f"--case {name}" for name in case or ()]
    results.facts["command"] = " ".join(["linattn bench", *options])
    pictures = [path for path in outputs if path.suffix == ".png"]
    for path in outputs:
        beside = [picture for picture in pictures if picture.parent == path.parent]
        _write(results, path, beside[0] if beside else None)
    if as_json:
        print_json(results.as_json())
    else:
        _print(results)


def _told(bar: Bar, figure: Figure, found: Measurement | None) -> None:
    """A figure is being measured, or that is what came out."""
    from linattn.bench.report import seconds, size

    if found is None:
        bar.at(figure.label)
        return
    bar.advance()
    if not bar.shown:
        bar.line(f"{figure.label}: {seconds(found.best)}, extra memory {size(found.extra_bytes)}")


def _check(outputs: list[Path], *, gpu: bool) -> None:
    """Refuse what could not be written, before minutes of measuring."""
    from linattn.bench.gpu_report import MARKS as GPU_MARKS
    from linattn.bench.report import MARKS, check_page

    for path in outputs:
        if path.suffix not in SUFFIXES:
            raise OptionError(f"--out must end in {', '.join(SUFFIXES)}; got {path}")
        if not path.parent.is_dir():
            raise OptionError(f"--out {path}: there is no folder {path.parent}")
        if path.suffix == ".md":
            check_page(path, GPU_MARKS if gpu else MARKS)
        if path.suffix == ".png":
            import matplotlib.figure  # noqa: F401  (what is missing is said now)


def _write(results: Results, path: Path, picture: Path | None) -> None:
    from linattn.bench.report import replace_section, write_text

    if path.suffix == ".json":
        write_text(path, json.dumps(results.as_json(), indent=2) + "\n")
    elif path.suffix == ".md":
        replace_section(path, results, picture)
    else:
        from linattn.bench.picture import draw

        draw(results, path)


def _print(results: Results) -> None:
    from linattn.bench.report import (
        COMPARISON_COLUMNS,
        FACTS,
        FIGURE_COLUMNS,
        comparison_cells,
        figure_cells,
        verdict,
    )

    print_lines({name: results.facts[name] for name in FACTS if name in results.facts})
    typer.echo()
    print_table(FIGURE_COLUMNS, [figure_cells(results, figure) for figure in results.measured])
    typer.echo()
    print_table(COMPARISON_COLUMNS, [comparison_cells(row) for row in results.rows()])
    typer.echo(f"\n{verdict(results)}")
