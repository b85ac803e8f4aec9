"""Keywords that do not exist, and arguments that are missing, in the library's own words."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from linattn.errors import ArgumentTypeError

P = ParamSpec("P")
R = TypeVar("R")


def known_keywords(fn: Callable[P, R]) -> Callable[P, R]:
    """Refuse keywords that do not exist, and missing arguments, with linattn's own error."""
    parameters = inspect.signature(fn).parameters
    names = list(parameters)
    needed = [
        name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    known, given, count = frozenset(names), frozenset(needed), len(needed)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(fn)
    def wrapper(*args: P.args, **keywords: P.kwargs) -> R:
        if len(args) == count and (open_ended or known.issuperset(keywords)) and given.isdisjoint(keywords):
            return fn(*args, **keywords)
        if not open_ended:
            for name in keywords:
                if name not in names:
                    raise ArgumentTypeError(unknown(fn.__name__, name, names))
        if len(args) > len(needed) or any(name in keywords for name in needed[: len(args)]):
            raise ArgumentTypeError(
                f"{fn.__name__} takes {', '.join(needed)} by position and the rest by keyword"
            )
        for name in needed[len(args) :]:
            if name not in keywords:
                raise ArgumentTypeError(f"{fn.__name__} needs {', '.join(needed)}; {name} is missing")
        return fn(*args, **keywords)

    return wrapper


def unknown(function: str, name: str, names: list[str]) -> str:
    """The sentence for a keyword that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(name, names, 1)
    return f"{function} has no keyword {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
