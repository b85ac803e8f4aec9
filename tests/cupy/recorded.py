"""What the backend would start on a GPU, for calls on NumPy arrays: kernels are named, none runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import linattn
from linattn import LRPE, Cosine, State
from linattn.arrays import Array
from linattn.backends.cupy import CupyBackend
from linattn.backends.cupy.launch import Room
from tests.cupy.again import Again

H200 = Room(227 * 1024)


class Kernel(NamedTuple):
    """A kernel, and how it would be started."""

    file: str
    name: str
    grid: int
    threads: int
    shared: int


class Recorder(Again):
    """Notes what it is told to start."""

    def __init__(self, room: Room = H200, architecture: int = 80) -> None:
        self.kernels: list[Kernel] = []
        self.given = room
        self.architecture = architecture

    def __call__(
        self, file: str, kernel: str, arguments: bytes, grid: int, threads: int, shared: int, like: Array
    ) -> None:
        self.kernels.append(Kernel(file, kernel, grid, threads, shared))

    def room(self, like: Any) -> Room:
        return self.given

    def multiprocessors(self, like: Any) -> int:
        return 132

    def capability(self, like: Any) -> int:
        return self.architecture

    def maps(self, *arrays: Any) -> bytes:
        return bytes(128 * len(arrays))


def kernels(
    dtype: Any = np.float32, *, b: int = 2, n: int = 100, h: int = 3, d: int = 64, e: int = 64,
    gradients: bool = True, state: bool = False, decode: bool = False, room: Room = H200,
    architecture: int = 80, **options: Any,
) -> list[Kernel]:  # fmt: skip
    """The kernels of a call, of its backward pass, and of a decode step after it."""
    runner = Recorder(room, architecture)
    backend = CupyBackend(runner=runner, arrays={"numpy": False})
    q, k = (np.ones((b, n, h, d), dtype) for _ in range(2))
    v = np.ones((b, n, h, e), dtype)
    given = options | {"backend": backend}
    if state or decode:
        names = {name: options.get(name) for name in ("reweight", "feature_map")}
        start = State.zeros(q, b, h, d, e, normalize=options.get("normalize", False), **names)
    if state:
        given |= {"initial_state": start, "return_state": True}
    if gradients:
        _, vjp = linattn.attention_vjp(q, k, v, **given)
        with np.errstate(all="ignore"):  # nothing has been computed
            vjp(np.ones_like(v), start if state else None)
    else:
        linattn.attention(q, k, v, **given)
    if decode:
        step = {
            name: options[name]
            for name in options
            if name in ("log_decay", "reweight", "feature_map", "normalize")
        }
        linattn.decode_step(q[:, 0], k[:, 0], v[:, 0], start, backend=backend, **step)
    return runner.kernels


def decays(h: int = 3) -> np.ndarray:
    return np.full(h, -0.1)


def theta(h: int = 3, d: int = 64) -> np.ndarray:
    return np.full((h, d), 0.1)


COSFORMER: dict[str, Any] = {"reweight": Cosine(4096), "feature_map": "relu", "normalize": True}


def lrpe(h: int = 3, d: int = 64) -> dict[str, Any]:
    return {"log_decay": decays(h), "reweight": LRPE(theta(h, d)), "feature_map": "silu"}
