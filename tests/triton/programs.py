"""Programs of checks on interpreted kernels: how tests start them, what they run, wrong kernels for them."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def interpret(program: str, *arguments: str) -> str:
    """Run a program of this folder in a process of its own, in Triton's interpreter; what it printed."""
    settings = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # kernels compute with what masks and overflows leave behind, as a GPU does, without a word
    run = [sys.executable, "-W", "error", "-W", "ignore::RuntimeWarning", HERE / program, *arguments]
    done = subprocess.run(run, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def main(found: dict[str, Any]) -> None:
    """Run the checks of a program that the command line names, all without names; found: its globals."""
    checks = {
        name: f
        for name, f in found.items()
        if inspect.isfunction(f) and f.__module__ == "__main__" and not inspect.signature(f).parameters
    }
    for name in sys.argv[1:] or checks:
        checks[name]()


def notices(holds: Callable[[Any], object], kernels: Any, wrong: dict[str, tuple[str, str]]) -> None:
    """Assert that holds(module) passes for a module of kernels, and for no version with one thing wrong.

    wrong: by what is wrong, text of the module's source and what stands there instead.
    """
    holds(kernels)
    right = Path(kernels.__file__).read_text()
    left = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (old, new)) in enumerate(wrong.items()):
            assert old in right, name
            path = Path(folder) / f"wrong_{i}.py"
            path.write_text(right.replace(old, new))
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module  # a dataclass looks its module up
            spec.loader.exec_module(module)
            with contextlib.suppress(AssertionError):
                holds(module)
                left.append(name)
    assert not left, f"nothing notices that {', that '.join(left)}"
