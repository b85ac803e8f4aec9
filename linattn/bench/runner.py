"""Measure figures one after the other, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import linattn
from linattn.bench.cases import Case, Figure
from linattn.bench.machine import machine
from linattn.bench.measure import Measurement
from linattn.bench.results import Results
from linattn.errors import LinattnError

TIMEOUT = 1800.0  # seconds for one figure: far more than the slowest takes
LAST_LINES = 5  # of what a failed process wrote that are shown
Progress = Callable[[Figure, Measurement | None], None]


def run(
    cases: Sequence[Case], *, runs: int = 7, full: bool = True, progress: Progress | None = None
) -> Results:
    """Measure every figure of the cases, `runs` timed calls each, and return them with the machine's facts.

    full: the lengths are those that the requirements are about. progress: called with a figure before it is
    measured (and None), and again with its measurement.

    Raises LinattnError when torch is needed and missing, or when a process fails.
    """
    figures = list(dict.fromkeys(figure for case in cases for figure in case.measured()))
    if any(figure.needs_torch for figure in figures) and importlib.util.find_spec("torch") is None:
        raise LinattnError("these cases need torch: pip install 'linattn[torch]'")
    facts = machine()
    measured = {}
    for figure in figures:
        if progress is not None:
            progress(figure, None)
        measured[figure] = one(figure, runs)
        if progress is not None:
            progress(figure, measured[figure])
    return Results(tuple(cases), measured, runs=runs, full=full, facts=facts)


def one(figure: Figure, runs: int, *, timeout: float = TIMEOUT) -> Measurement:
    """Measure one figure in a new process.

    Raises LinattnError, with the end of what the process wrote, when it fails, is killed or takes too long.
    """
    asked = json.dumps({"figure": asdict(figure), "runs": runs})
    command = [sys.executable, "-m", "linattn.bench.worker", asked]
    root = Path(linattn.__file__).parent.parent  # `-m` looks there first: the process measures this linattn
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise LinattnError(f"measuring {figure.label} took more than {timeout:g} seconds") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = "; is there memory enough?" if name == "SIGKILL" else ""
        raise LinattnError(f"measuring {figure.label}: the process was ended by {name}{hint}")
    if done.returncode > 0:
        said = "\n  ".join(done.stderr.strip().splitlines()[-LAST_LINES:])
        raise LinattnError(f"measuring {figure.label}: the process failed\n  {said}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Measurement(tuple(found["seconds"]), found["extra_bytes"], found["threads"])
