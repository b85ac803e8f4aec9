"""The CUDA sources: one text for a compiler, its structs as Python packs them, names of instantiations."""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path

FOLDER = Path(__file__).parent
TYPES = {"float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
OPTIONS = ("-std=c++17",)
FEATURES = {None: 0, "relu": 1, "silu": 2, "elu+1": 3}
ANGLES = {None: 0, "cosine": 1, "lrpe": 2}
DECAY = {None: 0, "head": 1, "token": 2}
EXACT = {"hopper.cu": "sm_90a", "persistent.cu": "sm_90a"}
"""Sources that are written for one architecture's own instructions."""


@functools.cache
def text(name: str) -> str:
    """A source with the ones that it includes in their places, each once: caches that look at it see all."""
    seen: set[str] = set()

    def inlined(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        content = (FOLDER / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"\n', lambda found: inlined(found[1]), content, flags=re.M)

    return inlined(name)


@functools.cache
def fields(name: str, of: str) -> tuple[tuple[str, str], ...]:
    """The fields of a struct in a source, with their `struct` formats; every one has 8 bytes."""
    body = re.search(rf"^struct {of} \{{\n(.*?)^\}};", text(name), re.M | re.S)
    assert body is not None, of
    found: list[tuple[str, str]] = []
    for line in body[1].splitlines():
        kind, _, names = line.strip().rstrip(";").partition(" ")
        for field in names.split(","):
            bare = field.strip()
            code = "Q" if bare.startswith("*") else {"int64_t": "q", "double": "d"}[kind]
            found.append((bare.lstrip("*"), code))
    return tuple(found)


@functools.cache
def _layout(name: str, of: str) -> tuple[struct.Struct, dict[str, int]]:
    """How a struct is packed, and the places of its fields."""
    found = fields(name, of)
    return struct.Struct("<" + "".join(code for _, code in found)), {
        field: i for i, (field, _) in enumerate(found)
    }


def packed(name: str, of: str, values: dict[str, float]) -> bytes:
    """A struct as a kernel takes it; fields without a value are 0, or null. KeyError: unknown ones."""
    form, places = _layout(name, of)
    all_of_them: list[float] = [0] * len(places)
    for field, value in values.items():
        all_of_them[places[field]] = value
    return form.pack(*all_of_them)


@functools.lru_cache(maxsize=1024)
def expression(kernel: str, dtypes: tuple[str, ...], numbers: tuple[int, ...], options: str = "") -> str:
    """The name of an instantiation: `kernel<types, numbers>`, or `kernel<options<types, numbers>>`."""
    listed = ", ".join([TYPES[dtype] for dtype in dtypes] + [str(int(number)) for number in numbers])
    return f"{kernel}<{options}<{listed}>>" if options else f"{kernel}<{listed}>"
