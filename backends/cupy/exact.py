"""Kernels for one architecture's own instructions, such as sm_90a, which CuPy does not compile for.

NVRTC is called as CuPy calls it, and what it makes is kept in CuPy's folder of compiled kernels.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from linattn.backends.cupy import sources

MOST_SHARED = 8  # the driver's number of the attribute: bytes of shared memory that a launch may ask for


def load(file: str, kernel: str, architecture: str, shared: int) -> Any:
    """A kernel of a source for `architecture`, compiled unless it is on disk; RuntimeError: NVRTC's words.

    shared: the bytes of shared memory that a launch may ask for.
    """
    import cupy

    options = (*sources.OPTIONS, "-ftz=true", f"-arch={architecture}")  # as CuPy compiles
    text = sources.text(file)
    key = "\0".join((text, kernel, *options, str(cupy.cuda.nvrtc.getVersion())))
    kept = folder() / f"linattn-{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    try:
        name, _, image = kept.read_bytes().partition(b"\0")
    except OSError:
        name, image = compiled(text, file, kernel, options)
        keep(kept, name + b"\0" + image)
    module = cupy.cuda.function.Module()
    module.load(image)
    function = module.get_function(name.decode())
    cupy.cuda.driver.funcSetAttribute(function.ptr, MOST_SHARED, shared)
    return function


def folder() -> Path:
    """Where CuPy keeps what it compiles, unless it is told otherwise."""
    return Path.home() / ".cupy" / "kernel_cache"


def compiled(text: str, file: str, kernel: str, options: tuple[str, ...]) -> tuple[bytes, bytes]:
    """The kernel's name in the machine code, and that code."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, file, (), ())
    try:
        nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{file} did not compile: {nvrtc.getProgramLog(program)}") from error
        name = nvrtc.getLoweredName(program, kernel)
        return name if isinstance(name, bytes) else name.encode(), nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)


def keep(path: Path, content: bytes) -> None:
    """Write a file as a whole, whoever else does; a disk that refuses costs the next compilation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_bytes(content)
            part.replace(path)
    except OSError:
        return
