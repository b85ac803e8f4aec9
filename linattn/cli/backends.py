"""`linattn backends`: what can run on this machine."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Annotated

import typer

import linattn
from linattn import registry
from linattn.backends.triton import tuned
from linattn.cli.output import print_json, print_lines, print_table, waiting


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every backend: the arrays it takes, and whether it can run here.

    Above the table stands what a bug report needs: versions and devices.
    """
    with waiting("looking for devices"):
        if importlib.util.find_spec("torch") is not None:
            importlib.import_module("torch")  # environment() names the devices of what is imported already
        environment = linattn.environment()
        if (said := tuned.in_use()) is not None:
            environment["tuned"] = said
        usable = linattn.available_backends()
    arrays = {
        name: backend.arrays for name, backend in registry.known().items()
    }  # kind -> whether "auto" may
    if as_json:
        rows = [
            {"name": name, "arrays": dict(arrays[name]), "unavailable": why} for name, why in usable.items()
        ]
        print_json({"environment": environment, "backends": rows})
        return
    print_lines(environment)
    print_table(
        ("backend", "arrays", "here"),
        [(name, _kinds(arrays[name]), why or "usable") for name, why in usable.items()],
    )


def _kinds(arrays: Mapping[str, bool]) -> str:
    return ", ".join(kind if automatic else f"{kind} (when named)" for kind, automatic in arrays.items())
