"""`linattn tune`: faster launch configurations for the GPU at hand."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from linattn.cli.output import Bar, print_json, print_lines, print_table
from linattn.errors import LinattnError, OptionError

if TYPE_CHECKING:
    from linattn.backends.triton.search import Outcome, Target

EXTRA = 6  # steps of a search besides its configurations, at most
Dtype = Literal["bfloat16", "float16", "float32"]


def tune(
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<name>",
            help="Only these calls: 'forward 128', 'lrpe-backward 128 64', ... (repeatable).",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = "bfloat16",
    quick: Annotated[bool, typer.Option("--quick", help="Shorter calls, fewer configurations.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be tried, and where it would be written.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write here; by default ~/.cache/linattn/tuned.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find launch configurations of the Triton kernels that are faster on this GPU, and write them down.

    From then on the Triton backend uses them for this GPU and this version of Triton, and the shipped ones
    for everything else. A case is a kind (forward, backward, cosformer, cosformer-backward, lrpe,
    lrpe-backward) and D, or D and E. Configurations are tried in another process, have to compute what the
    shipped one does, and are kept if they are more than 3 % faster. Use a GPU that does nothing else. What
    was found is written after each family of calls, so that an interrupted run keeps what it has.

    Exit status 1 if a family could not be measured, 2 if nothing could be.
    """
    from linattn.backends.triton import tuned
    from linattn.backends.triton.search import candidates, targets

    path = out or tuned.default_path()
    if path is None:
        raise OptionError("there is no home folder to write to: give --out")
    asked = targets(case or (), dtype, quick=quick)
    _check_file(path)
    tried = {target: candidates(target.family, quick=quick) for target in asked}
    if dry_run:
        _print_plan(asked, [len(tried[target]) for target in asked], path, as_json=as_json)
        return
    _check_device(asked[0])
    gpu = tuned.key_of()
    from linattn.backends.triton.search import Search
    from linattn.backends.triton.worker import Process

    outcomes, ended = [], 0.0
    with Bar(sum(map(len, tried.values())) + EXTRA * len(asked)) as bar:
        for target in asked:
            search = Search(target, Process, functools.partial(_step, bar, target))
            outcome = search.run(tried[target])
            if outcome.why is None:
                tuned.save(path, gpu, {target.family: outcome.entry()})
            outcomes.append(outcome)
            ended += outcome.tried + EXTRA
            bar.advance(to=ended)
            if not bar.shown:
                bar.line(_ended(outcome))
    if as_json:
        print_json({"gpu": gpu, "file": str(path), "families": [_as_json(one) for one in outcomes]})
    else:
        _print(outcomes, gpu, path)
    if any(outcome.why is not None for outcome in outcomes):
        raise typer.Exit(1)


def _check_file(path: Path) -> None:
    """Refuse, before minutes of work, a file that is not ours or could not be written.

    Raises LinattnError.
    """
    from linattn.backends.triton import tuned

    if os.path.lexists(path):
        tuned.load(path)
        return
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise OptionError(f"{path} cannot be written: {above} is no folder")
    if not os.access(above, os.W_OK):
        raise OptionError(f"{path} cannot be written: there is no permission to write into {above}")


def _check_device(target: Target) -> None:
    """Refuse, in one sentence, a machine on which nothing can be tried.

    Raises LinattnError.
    """
    from linattn.backends.triton import backend
    from linattn.cli.explain import describe

    first = target.timed[0]
    reason = backend.unavailable() or backend.unsupported(
        describe(
            (first.b, first.n, first.h, first.d), kind="torch", device="cuda", dtype=first.dtype,
            value_dim=first.e,
        )
    )  # fmt: skip
    if reason is not None:
        raise LinattnError(f"`linattn tune` needs a CUDA GPU: {reason}")


def _step(bar: Bar, target: Target, what: str) -> None:
    bar.at(f"{target.family}: {what}")
    bar.advance()


def _ended(outcome: Outcome) -> str:
    result = outcome.why or ("faster" if outcome.best else "the shipped one stays")
    return f"{outcome.target.family}: {outcome.tried} configurations, {result}"


def _planned(target: Target, count: int) -> dict[str, object]:
    from linattn.backends.triton.search import text

    about: dict[str, object] = {"family": str(target.family), "cases": list(target.cases)}
    return about | {"shipped": text(target.shipped), "configurations": count}


def _print_plan(asked: list[Target], counts: list[int], path: Path, *, as_json: bool) -> None:
    from linattn.backends.triton.search import text

    if as_json:
        rows = [_planned(target, count) for target, count in zip(asked, counts, strict=True)]
        print_json({"file": str(path), "families": rows})
        return
    print_lines({"file": path})
    typer.echo()
    cells = [
        (str(target.family), ", ".join(target.cases), text(target.shipped), str(count))
        for target, count in zip(asked, counts, strict=True)
    ]
    print_table(("family", "cases", "shipped", "configurations to try"), cells)


def _as_json(outcome: Outcome) -> dict[str, object]:
    from linattn.backends.triton.search import text

    skipped = [{"configuration": text(blocks), "why": why} for blocks, why in outcome.skipped.items()]
    return {
        **_planned(outcome.target, outcome.tried),
        "best": outcome.entry(),
        "skipped": skipped,
        "why": outcome.why,
    }


def _print(outcomes: list[Outcome], gpu: str, path: Path) -> None:
    from linattn.backends.triton.search import text

    print_lines({"GPU": gpu, "file": path})
    typer.echo()
    rows = []
    for outcome in outcomes:
        best = "shipped" if outcome.best is None else text(outcome.best)
        rows.append(
            (
                str(outcome.target.family),
                text(outcome.shipped),
                best,
                *_times(outcome),
                str(len(outcome.skipped)),
            )
        )
    print_table(("family", "shipped", "best", "shipped ms", "best ms", "time", "skipped"), rows)
    for outcome in outcomes:
        if outcome.why is not None:
            typer.echo(f"\n{outcome.target.family}: not measured: {outcome.why}")
    better = sum(outcome.best is not None for outcome in outcomes)
    typer.echo(
        f"\n{better} of {len(outcomes)} families have a configuration that is faster than the shipped one"
    )


def _times(outcome: Outcome) -> tuple[str, str, str]:
    answer = outcome.answer
    if answer is None or outcome.best is None:
        return "", "", ""
    ours, theirs = (", ".join(f"{ms:.4g}" for ms in side) for side in (answer.ms, answer.shipped))
    return theirs, ours, f"{answer.share:.2f}"
