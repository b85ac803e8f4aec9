"""Values that options take: dtypes, seeds, and, for shells to complete, names of backends and the like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
Dtype = Literal["float64", "float32", "float16", "bfloat16", "f64", "f32", "f16", "bf16"]
LARGEST_SEED = 2**63 - 1  # that torch takes


def path_of(option: str) -> Callable[[str], Path]:
    """Return what reads an option's path, and refuses an empty one, which would be the current folder."""

    def path(value: str) -> Path:
        if not value:  # what a shell makes of a variable that is not set
            from linattn.errors import LinattnError

            raise LinattnError(f"{option} is empty: give a path; that of the current folder is .")
        return Path(value)

    return path


def backends(begun: str) -> list[str]:
    """The backends whose names begin so."""
    from linattn import registry

    return [name for name in registry.known() if name.startswith(begun)]


def variants(begun: str) -> list[str]:
    """The variants of `linattn verify` whose names begin so."""
    from linattn.testing.variants import VARIANTS

    return [name for name in VARIANTS if name.startswith(begun)]


def cases(begun: str) -> list[str]:
    """The cases of `linattn bench` on the processor, and the kinds of its models, whose names begin so."""
    from linattn.bench import cases as known
    from linattn.bench.cases import OF_MODELS

    return [name for name in (*(case.name for case in known()), *OF_MODELS) if name.startswith(begun)]
