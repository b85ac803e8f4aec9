"""The lying backends: the NumPy backend with one thing wrong each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from linattn.testing import BackendSubject, Result
from linattn.testing.case import Inputs

FAR = 220  # beyond this length, only properties that do without the quadratic reference are left


@dataclass(frozen=True)
class Lie:
    """A wrong version of one of a subject's calls; alone: the one property that can catch it."""

    name: str
    where: str
    tell: Callable[..., Any]
    alone: str | None
    pool: bool = False  # told of calls with slots too


LIES: dict[str, Lie] = {}


def lie(
    where: str, alone: str | None = None, pool: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(tell: Callable[..., Any]) -> Callable[..., Any]:
        LIES[tell.__name__] = Lie(tell.__name__, where, tell, alone, pool)
        return tell

    return register


class Liar(BackendSubject):
    """The NumPy backend, but for one call."""

    def __init__(self, told: Lie) -> None:
        super().__init__("numpy")
        self.name, self.told, self.backend = told.name, told, "numpy"

    def missing(self, case: Any, *needs: str) -> str | None:
        return BackendSubject("numpy").missing(case, *needs)

    def run(
        self, x: Inputs, given: dict[str, Any], *, return_state: bool = False, slots: Any = None
    ) -> Result:
        if self.told.where == "run" and (slots is None or self.told.pool):
            return self.told.tell(_Honest(return_state, slots), x, given)
        if self.told.where == "pool" and slots is not None:
            result = super().run(x, given, return_state=return_state, slots=slots)
            self.told.tell(given, slots)
            return result
        return super().run(x, given, return_state=return_state, slots=slots)

    def vjp(self, x: Inputs, given: dict[str, Any], do: Any, dstate: Any) -> dict[str, Any]:
        if self.told.where == "vjp":
            return self.told.tell(super().vjp, x, given, do, dstate)
        return super().vjp(x, given, do, dstate)

    def decode(self, x: Inputs, given: dict[str, Any], slots: Any = None) -> Any:
        if self.told.where == "decode":
            return self.told.tell(super().decode, x, given, slots)
        return super().decode(x, given, slots)

    def merge(self, x: Inputs, left: Result, right: Result, total: Any) -> Result:
        if self.told.where == "merge":
            return self.told.tell(super().merge, x, left, right, total)
        return super().merge(x, left, right, total)


class _Honest:
    """The true call, that a lie may bend; `given` and fields of the case may be replaced."""

    def __init__(self, return_state: bool, slots: Any) -> None:
        self.return_state, self.slots = return_state, slots

    def __call__(self, x: Inputs, given: dict[str, Any], **case: Any) -> Result:
        x = x.replace(**case) if case else x
        return BackendSubject.run(
            HONEST, x, given, return_state=self.return_state and x.case.causal, slots=self.slots
        )


HONEST = BackendSubject("numpy")


def bumped(x: Any, where: Any) -> Any:
    """x, one unit in the last place off where asked: inside every bound, not the same bits."""
    return np.where(where & (x != 0), np.nextafter(x, np.asarray(np.inf, x.dtype)), x)


def small(x: Inputs) -> bool:
    """Whether it is no case of the properties of any width."""
    return x.case.d < 16 and x.case.heads < 4


def wide(x: Inputs) -> bool:
    """Whether one unit in the last place is well inside the bound."""
    return x.case.dtype in ("float32", "float64")


def whole(x: Inputs) -> bool:
    return x.case.causal and x.lengths is None and x.cu_seqlens is None


def decayed(given: dict[str, Any], change: Any) -> dict[str, Any]:
    if "log_decay" not in given:
        return given
    g = given["log_decay"]
    return given | {"log_decay": change(g).astype(g.dtype)}
