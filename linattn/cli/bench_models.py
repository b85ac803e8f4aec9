"""`linattn bench --models`: whole models on one device, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from linattn.cli.output import print_json, print_lines, print_table
from linattn.errors import OptionError

MARKS = (
    "<!-- models bench: `linattn bench --models --out` writes from here -->",
    "<!-- end of models bench -->",
)
COLUMNS = ("what", "who", "B", "N", "ms", "tokens/s", "peak memory")
REQUIRED = ("required, on an H200", "found", "met?")


def check(outputs: list[Path]) -> None:
    """Raise OptionError for files that cannot be written, before anything is measured."""
    from linattn.bench.report import check_page

    for path in outputs:
        if path.suffix not in (".json", ".md"):
            raise OptionError(f"--out of --models must end in .json or .md; got {path}")
        if path.suffix == ".md":
            check_page(path, MARKS)


def bench_models(outputs: list[Path], *, as_json: bool, quick: bool) -> None:
    """Measure on CUDA where it is, else, quickly only, on the processor; print and write.

    Raises OptionError without CUDA and without --quick.
    """
    import torch

    from linattn.bench.gpu_machine import gpu_machine
    from linattn.bench.gpu_measure import Cuda
    from linattn.bench.machine import machine
    from linattn.bench.report import section_of, size, table, write_text
    from linattn.bench.systems import as_json as dumped
    from linattn.bench.systems import measure, verdicts

    check(outputs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        raise OptionError("--models needs a CUDA device; with --quick, small models run on the processor")
    facts = gpu_machine() if device.type == "cuda" else machine()
    facts["command"] = "linattn bench --models" + " --quick" * quick
    bandwidth = 0.0
    if device.type == "cuda":
        bandwidth = Cuda().gigabytes_per_second() * 1e9
        facts["copy bandwidth"] = f"{bandwidth / 1e9:.0f} GB/s read and written"
    console = Console(stderr=True, highlight=False)
    rows = []
    for row in measure(device, quick=quick):
        rows.append(row)
        console.print(f"{row.what} {row.who} {row.batch} {row.n}: {1e3 * row.seconds:.3g} ms", markup=False)
    judged = [] if quick else verdicts(rows, bandwidth)
    cells = [
        (row.what, row.who, str(row.batch), str(row.n), f"{1e3 * row.seconds:.3g}", f"{row.rate:,.0f}",
         "–" if row.peak is None else size(row.peak))
        for row in rows
    ]  # fmt: skip
    met = [(one.required, one.found, "yes" if one.met else "NO") for one in judged]
    for path in outputs:
        if path.suffix == ".json":
            write_text(path, json.dumps({"facts": facts, "rows": dumped(rows)}, indent=2) + "\n")
        else:
            lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
            section_of(path, MARKS, "\n\n".join([lines, table(COLUMNS, cells), table(REQUIRED, met)]))
    if as_json:
        print_json({"facts": facts, "rows": dumped(rows)})
        return
    print_lines(facts)
    typer.echo()
    print_table(COLUMNS, cells)
    if met:
        print_table(REQUIRED, met)
