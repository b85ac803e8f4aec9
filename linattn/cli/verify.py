"""`linattn verify`: prove the backends, or a stranger's kernel, right."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import linattn
from linattn.cli.device import check_here, first_line
from linattn.cli.names import DTYPES, Dtype, backends, variants
from linattn.cli.output import Bar, print_json, print_lines, print_table, waiting
from linattn.errors import OptionError

if TYPE_CHECKING:
    from linattn.testing import Finding, Kernel, Report, Subject

    Make = Callable[[str, str | None], Subject]
    Progress = Callable[[Finding], None]


def verify(
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="<name>", help="Check this backend only (repeatable).", autocompletion=backends),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Check a callable or Kernel: package.module:object.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Only this combination of options: lightning, lrpe, ...", autocompletion=variants),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where the arrays live: cpu, cuda.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Only this dtype.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A third of the combinations, few examples.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every combination of options.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    examples: Annotated[int, typer.Option(min=1, help="Examples for each combination.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that check (and compile kernels) at a time.")
    ] = 1,
) -> None:
    """Prove that a backend or a kernel computes what the definition says: forward, gradients, states, memory.

    Without --backend or --kernel, every backend that is usable here is checked. Each property is tried on
    combinations of options that cover every pair of them; `worst` is the largest error as a share of what is
    allowed. A failure is printed as a call to paste into Python. Exit status 1 if anything failed.
    """
    with waiting("loading"):
        from linattn.testing import PROPERTIES
        from linattn.testing.check import check

        if device is not None:
            check_here(device)
        if kernel is not None and backend:
            raise OptionError("give --backend or --kernel, not both")
        if kernel is not None:
            subjects: list[tuple[Make, str, Subject]] = [(_kernel, kernel, _kernel(kernel, device))]
        else:
            subjects = [(_backend, of.name, of) for of in _backends(backend, device)]
    wanted = None if dtype is None else DTYPES.get(dtype, dtype)
    how: dict[str, Any] = {"variant": variant, "dtype": wanted, "full": everything, "quick": quick}
    how |= {"examples": examples, "seed": seed}
    with Bar(len(PROPERTIES) * len(subjects)) as bar:

        def found(finding: Finding) -> None:
            bar.at(finding.property)
            bar.advance()

        if jobs > 1:
            reports = _spread(jobs, [(make, name, device) for make, name, _ in subjects], how, found)
        else:
            reports = [check(of, progress=found, **how) for _, _, of in subjects]
    with waiting("looking for devices"):
        environment = linattn.environment()
    if as_json:
        print_json({"environment": environment, "reports": [report.as_dict() for report in reports]})
    else:
        print_lines(environment)
        _print_tables(reports)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def _backends(names: list[str] | None, device: str | None) -> list[Subject]:
    from linattn import registry
    from linattn.testing import BackendSubject

    for name in names or ():
        reason = registry.get(name).unavailable()
        if reason is not None:
            raise OptionError(f"backend {name!r} cannot run here: {reason}")
    if not names:  # to ask every backend imports torch
        names = [name for name, reason in registry.available_backends().items() if reason is None]
    return [BackendSubject(name, device=device) for name in names]


def _backend(name: str, device: str | None) -> Subject:
    from linattn.testing import BackendSubject

    return BackendSubject(name, device=device)


def _kernel(path: str, device: str | None) -> Subject:
    from linattn import testing

    module, _, name = path.partition(":")
    if not name or not all(part.isidentifier() for part in module.split(".")):
        raise OptionError(f"--kernel must be package.module:object, got {path!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a console script does not have the current folder there
    found: Any = _imported(module)
    for part in name.split("."):
        with _Strange(f"--kernel: {path} raises"):  # an attribute may be computed
            if part not in dir(found):
                raise OptionError(f"--kernel: {module} has no {name!r}")
            found = getattr(found, part)
    if not isinstance(found, testing.Kernel):
        if not callable(found):
            raise OptionError(f"--kernel: {path} is neither a linattn.testing.Kernel nor callable")
        found = testing.Kernel(found)
    changes = {} if device is None else {"device": device}
    wrapped: Kernel = dataclasses.replace(found, name=path, **changes)
    return wrapped


def _imported(module: str) -> Any:
    """A module of the current folder, or of what is installed.

    Raises OptionError where there is none, and where it cannot be imported.
    """
    with _Strange(f"--kernel: {module} cannot be imported:"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and needs another
            said = f"--kernel: no module named {module!r} here or among what is installed"
            raise OptionError(said) from error


class _Strange:
    """A with-block of somebody else's code: whatever it raises, Ctrl-C apart, becomes an OptionError."""

    def __init__(self, begins: str) -> None:
        self._begins = begins

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, (KeyboardInterrupt, OptionError)):
            raise OptionError(f"{self._begins} {_said(error)}") from error


def _said(error: BaseException) -> str:
    """An error of somebody else's code in one line, with the place where it was raised."""
    name = type(error).__name__
    text = f"{name}: {first_line(error)}" if str(error).strip() else name
    if isinstance(error, SyntaxError):  # says its own place
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = last.filename.startswith("<frozen") or Path(last.filename).name == Path(__file__).name
    return text if inside else f"{text} ({Path(last.filename).name}, line {last.lineno})"


def _spread(
    jobs: int, subjects: list[tuple[Make, str, str | None]], how: dict[str, Any], progress: Progress
) -> list[Report]:
    """The reports that one process would give, from several: each checks a property at a time."""
    from linattn.testing import PROPERTIES, Report

    # a process that is forked cannot use a GPU
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [[pool.submit(_one, *subject, name, how) for name in PROPERTIES] for subject in subjects]
        reports = []
        for (_, title, _), futures in zip(subjects, waiting, strict=True):
            findings = []
            for future in futures:
                findings += [future.result()]
                progress(findings[-1])
            reports += [Report(title, tuple(findings))]
    return reports


def _one(make: Make, name: str, device: str | None, property: str, how: dict[str, Any]) -> Finding:
    from linattn.testing.check import check

    return check(make(name, device), only=[property], **how).findings[0]


def _print_tables(reports: list[Report]) -> None:
    for report in reports:
        rows = [_row(finding) for finding in report.findings]
        typer.echo()
        print_table(("property", "variants", "examples", "worst", "result"), rows, title=report.subject)
        for finding in report.failures:
            typer.echo(f"\n{finding.message}\n  {finding.call}")
    failed = sum(len(report.failures) for report in reports)
    held = sum(f.status == "pass" for report in reports for f in report.findings)
    typer.echo(f"\n{held} held, {failed} failed: {', '.join(report.subject for report in reports)}")


def _row(finding: Finding) -> tuple[str, ...]:
    worst = "" if finding.worst is None else f"{finding.worst:.3f}"
    if finding.status == "not offered":
        return finding.property, "", "", "", "; ".join(("not offered", *finding.refused[:1]))
    return finding.property, str(finding.variants), str(finding.examples), worst, finding.status
