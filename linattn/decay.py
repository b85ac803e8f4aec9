"""Log decays per head: the schedules that go by one name, told apart.

Each returns float64 [H], natural logarithms of a factor per token, <= 0: pass them as `log_decay`. Heads and
layers that do not exist raise ValueRangeError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from linattn.errors import ValueRangeError
from linattn.reference import decay as definition

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["alibi", "fla", "minimax", "transnormer"]


def _checked(schedule: Callable[P, R]) -> Callable[P, R]:
    """The definition, with its refusals as the library's own error."""

    @functools.wraps(schedule)
    def wrapper(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return schedule(*args, **keywords)
        except ValueError as error:
            raise ValueRangeError(str(error)) from None

    return wrapper


alibi = _checked(definition.alibi)
transnormer = _checked(definition.transnormer)
minimax = _checked(definition.minimax)
fla = _checked(definition.fla)
