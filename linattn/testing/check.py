"""Run the properties on a subject, and report what held, how closely, and the first call that did not."""

from __future__ import annotations

import dataclasses
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from linattn.errors import OptionError
from linattn.testing.case import Case
from linattn.testing.compare import NotOffered, recording
from linattn.testing.kernel import Kernel
from linattn.testing.properties import PROPERTIES, Property
from linattn.testing.strategies import cases
from linattn.testing.subject import BackendSubject, Subject
from linattn.testing.variants import AXES, VARIANTS, Options, allowed, combinations, fields_of

PASSED, FAILED, NOT_OFFERED = "pass", "fail", "not offered"


@dataclass(frozen=True)
class Finding:
    """What one property said of one subject.

    worst: the largest error as a share of what is allowed, None where only bits were compared. refused: the
    sentences
    with which single combinations were not offered. call: Python that fails again. message: how it failed.
    """

    property: str
    summary: str
    status: str
    variants: int = 0
    examples: int = 0
    worst: float | None = None
    refused: tuple[str, ...] = ()
    call: str = ""
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """Every finding about one subject. `str` is a table; `ok` is False as soon as one property failed."""

    subject: str
    findings: tuple[Finding, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and something was tried."""
        return not self.failures and any(f.status == PASSED for f in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.status == FAILED)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "findings": [dataclasses.asdict(f) for f in self.findings],
        }

    def __str__(self) -> str:
        """A line for each property, then each failure with the call that shows it."""
        width = max((len(f.property) for f in self.findings), default=0)
        lines = [self.subject]
        for f in self.findings:
            worst = "" if f.worst is None else f"{f.worst:8.3f}"
            tried = f"{f.variants:4d} variants {f.examples:5d} examples"
            why = f": {f.refused[0]}" if f.status == NOT_OFFERED and f.refused else ""
            lines.append(f"  {f.property:<{width}}  {tried} {worst:>8}  {f.status}{why}")
        for f in self.failures:
            lines += ["", f.message, f.call]
        return "\n".join(lines)


def check_backend(name: Any, *, kind: str | None = None, device: str | None = None, **how: Any) -> Report:
    """Check a backend, by name or as an object, through linattn's public functions; keywords as
    `check_kernel`.

    kind: of the arrays, where it takes several. Raises UnknownBackendError.
    """
    return check(BackendSubject(name, kind, device), **how)


def check_kernel(kernel: Kernel, *, device: str | None = None, **how: Any) -> Report:
    """Check a wrapped callable.

    variant: a name of VARIANTS. dtype: only this one. full: every combination of options, not only pairs.
    examples: for each combination. seed: of the draw. only: names of properties. progress: called with each
    finding.
    Raises OptionError for a name that does not exist or a variant of which the kernel offers nothing.
    """
    if device is not None:
        kernel = dataclasses.replace(kernel, device=device)
    return check(kernel, **how)


def check(
    of: Subject,
    *,
    variant: str | None = None,
    dtype: str | None = None,
    full: bool = False,
    examples: int = 2,
    seed: int = 0,
    only: Sequence[str] | None = None,
    quick: bool = False,
    shrink: bool = True,
    until_failure: bool = False,
    progress: Callable[[Finding], None] | None = None,
) -> Report:
    """Check any subject; keywords as `check_kernel`. `quick` tries few examples of every third combination.

    shrink: look for the smallest failing case. until_failure: stop after the first property that fails.
    """
    if variant is not None and variant not in VARIANTS:
        raise OptionError(f"no variant named {variant!r}; known: {', '.join(VARIANTS)}")
    if unknown := sorted(set(only or ()) - set(PROPERTIES)):
        raise OptionError(f"no property named {unknown[0]!r}; known: {', '.join(PROPERTIES)}")
    if dtype is not None and dtype not in AXES["dtype"]:
        raise OptionError(f"no dtype named {dtype!r}; known: {', '.join(AXES['dtype'])}")
    wanted: Options = VARIANTS[variant] if variant else {}
    if dtype is not None:
        wanted = wanted | {"dtype": dtype}
    offered = intersection(of.axes(), wanted)
    if offered is None:
        asked = " and ".join(filter(None, [variant and f"variant {variant}", dtype]))
        raise OptionError(f"{of.name} offers nothing of {asked}: {_missing(of, wanted)}")
    alone, findings = _alone(of, offered), []
    for number, plan in enumerate(PROPERTIES.values()):
        if only is not None and plan.name not in only:
            continue
        rows = _rows(intersection(alone, plan.axes), full)
        every = _rows(intersection(offered, plan.axes), full)
        more = [row for row in every if row not in rows]
        if quick and not full:
            some = rows[number % 3 :: 3] or rows[:1]
            rows, more = some, [row for row in rows if row not in some] + more
        else:
            rows, more = rows + more, []
        found = _check_property(of, plan, rows, more, 1 if quick else examples, seed, shrink)
        findings.append(found)
        if progress is not None:
            progress(found)
        if until_failure and found.status == FAILED:
            break
    return Report(of.name, tuple(findings))


def intersection(*constraints: Mapping[str, Any]) -> dict[str, tuple[Any, ...]] | None:
    """The values that every constraint allows on each axis, or None where one axis has none left."""
    out = dict(AXES)
    for constraint in constraints:
        for axis, value in constraint.items():
            offered = value if isinstance(value, tuple) else (value,)
            known = out[axis]
            # a built-in scale may be any number: it replaces the usual ones
            out[axis] = tuple(v for v in known if v in offered) if axis != "scale" else offered
            if not out[axis]:
                return None
    return out if any(allowed(row) for row in combinations(False, **out)) else None


def _rows(axes: Mapping[str, Any] | None, full: bool) -> list[Options]:
    return [] if axes is None else combinations(full, **axes)


def _alone(of: Subject, offered: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The values of each axis that a subject takes beside the first ones of the other axes.

    A backend says only of whole calls whether it takes them. Pairs of what it refuses anyway would leave
    properties untried that it has.
    """
    base = {axis: values[0] for axis, values in offered.items()}

    def takes(options: Options) -> bool:
        return not allowed(options) or of.missing(Case(**fields_of(options))) is None

    if not allowed(base) or not takes(base):
        return dict(offered)
    return {
        axis: tuple(value for value in values if takes(base | {axis: value}))
        for axis, values in offered.items()
    }


def _missing(of: Subject, wanted: Mapping[str, Any]) -> str:
    """Which of the wanted options a subject does not have, and what it has there."""
    offered = {axis: v for axis, v in (AXES | of.axes()).items() if axis != "scale"}
    missing = [axis for axis, value in wanted.items() if value not in offered.get(axis, (value,))]
    if not missing:
        return "it has each of these options, but no call that the definition knows has all of them"
    return "; ".join(
        f"it has {axis} {_words(offered[axis])}, not {_words([wanted[axis]])}" for axis in missing
    )


def _words(values: Iterable[Any]) -> str:
    names = {"None": "none", "True": "on", "False": "off"}
    return " or ".join(names.get(str(value), str(value)) for value in values)


class _Outcome:
    """A with-block whose exception is a finding: a kernel that raises, whatever it raises, has failed its
    property.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> _Outcome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False  # KeyboardInterrupt and its like end the whole check
        self.error = error
        return True


def _check_property(
    of: Subject,
    plan: Property,
    rows: Sequence[Options],
    more: Sequence[Options],
    examples: int,
    seed: int,
    shrink: bool,
) -> Finding:
    """Try rows, and as long as the subject has offered none of them, more."""
    began = time.perf_counter()
    tried = offered = 0
    refused: dict[str, None] = {}
    with recording() as worst:
        for number, row in enumerate(itertools.chain(rows, more)):
            if number >= len(rows) and tried:
                break
            own = zlib.crc32(f"{seed} {plan.name} {number}".encode())  # no two combinations share their sizes
            done, reasons, failure = _check_row(of, plan, row, examples, own, shrink)
            tried += done
            offered += done > 0
            refused |= dict.fromkeys(reasons)
            if failure is not None:
                case, error = failure
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                return Finding(
                    property=plan.name,
                    summary=plan.summary,
                    status=FAILED,
                    variants=offered,
                    examples=tried,
                    worst=worst.ratio,
                    refused=tuple(refused),
                    call=pasteable(of, plan.name, case),
                    message=f"{plan.name}: {kind}{error}",
                    seconds=time.perf_counter() - began,
                )
    status = PASSED if tried else NOT_OFFERED
    took = time.perf_counter() - began
    return Finding(plan.name, plan.summary, status, offered, tried, worst.ratio, tuple(refused), seconds=took)


def pasteable(of: Subject, name: str, case: Case) -> str:
    """A call that fails again when it is pasted into Python."""
    before, maker = of.expression()
    return f"from linattn import testing{before}; testing.properties.{name}({maker}, testing.{case!r})"


def _check_row(
    of: Subject, plan: Property, row: dict[str, Any], examples: int, seed: int, shrink: bool
) -> tuple[int, list[str], tuple[Case, BaseException] | None]:
    """Try one combination of options: how many examples ran, why others did not, and the smallest failure."""
    import hypothesis

    tried, reasons = 0, []
    last: list[Case] = []
    phases = [hypothesis.Phase.generate] + ([hypothesis.Phase.shrink] if shrink else [])

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples + 1,  # the first that Hypothesis tries is the smallest there is
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(case=strategy(plan, row))
    def run(case: Case) -> None:
        nonlocal tried
        last[:] = [case]
        try:
            plan.check(of, case)
        except NotOffered as reason:
            reasons.append(str(reason))
        else:
            tried += 1

    outcome = _Outcome()
    with outcome:
        run()
    return tried, reasons, None if outcome.error is None else (last[0], outcome.error)


def strategy(plan: Property, row: dict[str, Any]) -> Any:
    """The cases that a property is tried on, with these options."""
    return cases(
        row, longest=plan.longest, layouts=plan.layouts, sizes=plan.sizes, wide=plan.wide, **plan.fixed
    )
