"""`linattn bench --gpu`: the part of `linattn bench` that times a CUDA device, in this process."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from linattn.cli.output import Bar, print_json, print_lines, print_table

if TYPE_CHECKING:
    from linattn.bench.gpu_results import Cost, GpuResults, GpuRow

QUICK_REP = 5.0  # milliseconds over which --quick takes a median


def bench_gpu(
    names: Sequence[str], outputs: list[Path], *, as_json: bool, quick: bool, peer_seconds: float
) -> None:
    """Measure, print and write; interrupted, what was measured until then, with exit status 130.

    Raises LinattnError where there is no CUDA device, OptionError for a case that does not exist.
    """
    from linattn.bench.gpu_cases import chosen, curves
    from linattn.bench.gpu_measure import Cuda, check_device

    cases, extras = chosen(names, quick=quick)
    check_device()
    import torch

    from linattn.bench.gpu_machine import gpu_machine
    from linattn.bench.gpu_runner import INTERRUPTED, Bench

    drawn = any(path.suffix == ".png" for path in outputs)
    lines = curves(torch.cuda.mem_get_info()[0], quick=quick) if drawn else []
    facts = {**gpu_machine(), "command": _command(names, quick=quick, peer_seconds=peer_seconds)}
    bench = Bench(
        Cuda(QUICK_REP) if quick else Cuda(), device="cuda", peer_seconds=peer_seconds, full=not quick
    )
    with _stoppable(), Bar(len({*cases, *lines})) as bar:
        told = functools.partial(_told, bar)
        results = bench.run(cases, extras, lines, facts=facts, progress=told)
    _write(results, outputs)
    if as_json:
        print_json(results.as_json())
    else:
        _print(results)
    if INTERRUPTED in results.facts:
        raise typer.Exit(130)


def _told(bar: Bar, found: GpuRow | Cost) -> None:
    from linattn.bench.gpu_report import line
    from linattn.bench.gpu_results import GpuRow

    bar.line(line(found))
    bar.advance(isinstance(found, GpuRow))


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A request to end, as `timeout` and job schedulers send it, stops a run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(names: Sequence[str], *, quick: bool, peer_seconds: float) -> str:
    from linattn.bench.gpu_runner import PEER_SECONDS

    options = ["--quick"] * quick + [f"--case {name.replace(' ', '-')}" for name in names]
    options += [f"--peer-seconds {peer_seconds:g}"] * (peer_seconds != PEER_SECONDS)
    return " ".join(["linattn bench --gpu", *options])


def _write(results: GpuResults, outputs: list[Path]) -> None:
    from linattn.bench.gpu_picture import draw
    from linattn.bench.gpu_report import replace_section
    from linattn.bench.report import write_text

    pictures = [path for path in outputs if path.suffix == ".png"]
    for path in outputs:
        if path.suffix == ".json":
            write_text(path, json.dumps(results.as_json(), indent=2) + "\n")
        elif path.suffix == ".md":
            beside = [picture for picture in pictures if picture.parent == path.parent]
            replace_section(path, results, beside[0] if beside else None)
        else:
            draw(results, path)


def _print(results: GpuResults) -> None:
    from linattn.bench.gpu_machine import FACTS
    from linattn.bench.gpu_report import (
        COLUMNS,
        COST_COLUMNS,
        PEER_COLUMNS,
        all_rows,
        cells,
        cost_cells,
        entries,
        reasons,
        verdict,
    )

    print_lines({name: results.facts[name] for name in FACTS if name in results.facts})
    for columns, rows in (
        (PEER_COLUMNS, entries(all_rows(results))),
        (COST_COLUMNS, [cost_cells(cost) for cost in results.costs]),
        (COLUMNS, [cells(row) for row in results.rows]),
    ):
        if rows:
            typer.echo()
            print_table(columns, rows)
    missing = reasons(results)
    if missing:
        typer.echo("\nNot measured:\n  " + "\n  ".join(missing))
    typer.echo(f"\n{verdict(results)}")
