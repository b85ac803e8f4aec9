"""Checks that the configurations share; each refusal names the field, what may be there, and what is."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from linattn.errors import OptionError, ValueRangeError

MOST = 2**31 - 1  # of a size

__all__ = [
    "check_choice",
    "check_flags",
    "check_heads",
    "check_lrpe",
    "check_positive",
    "check_sizes",
    "check_special_ids",
]  # fmt: skip


def check_sizes(config: Any, *names: str, least: int = 1) -> None:
    """Refuse sizes that are no int from `least` to `MOST`, with ValueRangeError."""
    for name in names:
        value = getattr(config, name)
        if not _is_int(value) or value < least:
            raise ValueRangeError(f"{name} must be an int of at least {least}, got {value!r}")
        if value > MOST:
            raise ValueRangeError(f"{name} must be at most {MOST}, got {value}")


def check_flags(config: Any, *names: str) -> None:
    """Refuse flags that are no bool, with OptionError: as a condition the string "false" is true."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be True or False, got {value!r}")


def check_heads(config: Any, heads: str, width: str) -> None:
    """Refuse a number of heads that does not divide a width, with OptionError."""
    count, size = getattr(config, heads), getattr(config, width)
    if size % count:
        raise OptionError(f"{heads} must divide {width}, got {count} heads and width {size}")


def check_lrpe(given: Any, count: int, layers: str) -> tuple[int, ...]:
    """Return a linear_use_lrpe_list for `count` layers, of 0s and 1s, or of nothing; refuse others.

    layers: what the refusal, an OptionError, calls them.
    """
    if not isinstance(given, list | tuple | None):
        raise OptionError(f"linear_use_lrpe_list must be a list, got {given!r}")
    use = tuple(given or ())
    if len(use) not in (0, count) or any(entry not in (0, 1) for entry in use):
        raise OptionError(
            f"linear_use_lrpe_list must hold a 0 or 1 for each of {count} {layers}, or nothing, got {use}"
        )
    return use


def check_choice(config: Any, name: str, known: Collection[str]) -> None:
    """Refuse what is not among the known names, with OptionError."""
    value = getattr(config, name)
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name} must be one of {', '.join(sorted(known))}, got {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """Refuse what is no finite number above 0, with ValueRangeError."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueRangeError(f"{name} must be above 0 and finite, got {value!r}")


def check_special_ids(config: Any, *names: str) -> None:
    """Refuse ids of special tokens outside the vocabulary, with ValueRangeError; None is no token.

    eos_token_id alone may be a list: any of its tokens ends a text.
    """
    for name in names:
        value = getattr(config, name)
        several = name == "eos_token_id" and isinstance(value, list | tuple)
        ids = value if several else [] if value is None else [value]
        for one in ids:
            if not _is_int(one) or not 0 <= one < config.vocab_size:
                raise ValueRangeError(f"{name} must lie in 0 … {config.vocab_size - 1}, got {one!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
