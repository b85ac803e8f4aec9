"""The CUDA sources: one text for a compiler, its structs as Python packs them, names of instantiations."""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path

FOLDER = Path(__file__).parent
TYPES = {"float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
OPTIONS = ("-std=c++17",)


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


def packed(name: str, of: str, values: dict[str, float]) -> bytes:
    """A struct as a kernel takes it; fields without a value are 0, or null."""
    layout = fields(name, of)
    unknown = values.keys() - {field for field, _ in layout}
    assert not unknown, unknown
    return struct.pack("<" + "".join(code for _, code in layout), *(values.get(f, 0) for f, _ in layout))


def expression(kernel: str, dtypes: tuple[str, ...], numbers: tuple[int, ...], options: str = "") -> str:
    """The name of an instantiation: `kernel<types, numbers>`, or `kernel<options<types, numbers>>`."""
    listed = ", ".join([TYPES[dtype] for dtype in dtypes] + [str(int(number)) for number in numbers])
    return f"{kernel}<{options}<{listed}>>" if options else f"{kernel}<{listed}>"
