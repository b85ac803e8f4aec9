"""The CUDA kernels on the CPU: compiled by a host compiler, threads as fibers, on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from linattn.arrays import Array
from linattn.backends.cupy import CupyBackend, sources
from linattn.backends.cupy.launch import Blocks, Room
from tests.cupy.again import Again

HOST = Path(__file__).parent / "host"
LIBRARIES = {"product.cu": "run.cpp", "between.cu": "between.cpp", "decode.cu": "decode.cpp"}
LIBRARIES |= {"tensor.cu": "tensor.cpp", "persistent.cu": "persistent.cpp"}
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=fast", "-fPIC")
"""With sums and products joined, as CUDA's compiler joins them."""
RACES = ("-DRACES", "-fsanitize=thread")
"""With these, a kernel that races in shared memory ends the process (races.hpp)."""
ALSO: list[str] = []
"""More flags, of a test."""
CHANGES: dict[str, tuple[str, str]] = {}
"""Of files: what a test puts in the place of what."""
SHORT = {"float": "f32", "double": "f64", "__half": "f16", "__nv_bfloat16": "bf16"}


@functools.cache
def library(name: str, *chosen: str) -> ctypes.CDLL:
    """The kernels of a source, compiled once for every process that finds them; chosen: which, if not all."""
    assert COMPILER is not None
    parts = [HOST / LIBRARIES[name], *sorted(HOST.glob("*.hpp"))]
    chosen = *chosen, *ALSO
    text = sources.text(name) + "".join(part.read_text(encoding="utf-8") for part in parts) + str(chosen)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "linattn-host"
    folder.mkdir(exist_ok=True)
    made = folder / f"{name}-{digest}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            copy = Path(place)
            for source in sources.FOLDER.glob("*.cu*"):
                right, wrong = CHANGES.get(source.name, ("", ""))
                content = source.read_text(encoding="utf-8")
                (copy / source.name).write_text(content.replace(right, wrong) if right else content, "utf-8")
            compiled, new = copy / "compiled.o", copy / made.name
            command = [COMPILER, *FLAGS, *chosen, "-I", str(copy), "-c", "-o", str(compiled), str(parts[0])]
            subprocess.run(command, check=True)
            # the sanitizer's library would be linked by its flag, too
            subprocess.run([COMPILER, "-shared", "-o", str(new), str(compiled)], check=True)
            new.replace(made)
    return ctypes.CDLL(str(made))


class Host(Again):
    """Starts kernels on the CPU, one block after the other."""

    def __init__(self) -> None:
        self.kernels: list[str] = []  # that were started

    def __call__(
        self, file: str, kernel: str, arguments: bytes, grid: int, threads: int, shared: int, like: Array
    ) -> None:
        self.kernels.append(kernel)
        name, *words = re.findall(r"\w+", kernel.replace("Options", ""))
        dtypes = [SHORT[word] for word in words if word in SHORT]
        numbers = [int(word) for word in words if word.isdigit()]
        kinds = dtypes if len(set(dtypes)) > 1 else dtypes[:1]
        chosen: tuple[str, ...] = ()
        if file == "tensor.cu":
            held, _, columns, *numbers = numbers
            chosen = (f"-DHOST_T={words[1]}", f"-DHOST_BE={columns}", f"-DHOST_HELD={held}")
            kinds = ["chosen"]
        if file == "product.cu":
            assert (numbers[0], numbers[1]) == (32, 16)
            numbers = numbers[2:]
            chosen = ("-DNARROW",) if dtypes[0] in ("f16", "bf16") else ()
        if file == "decode.cu":
            layout = sources.fields(file, "Step")
            names, form = [field for field, _ in layout], "<" + "".join(code for _, code in layout)
            _, wide, lanes, *_ = numbers
            values = list(struct.unpack(form, arguments))
            grid //= -(-values[names.index("E")] // (lanes * wide))  # here a block has all columns
            values[names.index("slices_of")] = 0
            arguments, numbers = struct.pack(form, *values), numbers[5:]
        start = getattr(library(file, *chosen), "_".join([name, *kinds]))
        flags = (ctypes.c_int64 * len(numbers))(*numbers)
        start(arguments, flags, ctypes.c_int64(grid))

    def multiprocessors(self, like: Any) -> int:
        return 8

    def capability(self, like: Any) -> int:
        return 80

    def maps(self, *arrays: Any) -> bytes:
        raise NotImplementedError("no host has tensor cores")

    def room(self, like: Any) -> Room:
        return Room(1 << 18, (Blocks(32, 16),))


def hosted() -> CupyBackend:
    """The backend on arrays of the host."""
    return CupyBackend(runner=Host(), arrays={"numpy": False, "torch": False})
