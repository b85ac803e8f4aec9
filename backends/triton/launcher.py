"""Starting kernels again costs little: compiled variants, and whole passes, are remembered.

Triton works out a kernel's variant from every argument of every call. A `Launcher` is told what the variant
depends on. A `Tape` remembers all launches and buffers of a pass, and only fills in addresses.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
Parts = tuple[Tensor | None, ...]


Kind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


def _kind(x: Tensor) -> Kind:
    return tuple(x.shape), x.stride(), x.dtype, x.device


class Tape:
    """The launches of one pass, with holes where addresses of its inputs and buffers go."""

    def __init__(self, owner: Any, inputs: Parts) -> None:
        self.owner = owner  # kept, so that its id stays its own
        self.slots: dict[int, int] = {}
        self.rooms: list[tuple[Kind, bool, int | None]] = []  # zeros? an input of the same kind
        self.kinds: dict[Kind, int] = {}
        # what starts a kernel, its arguments, where addresses go
        self.steps: list[tuple[Any, list[Any], tuple[tuple[int, int], ...]]] = []
        self.inputs = len(inputs)
        self.good = True
        self.results: tuple[int | None, ...] = ()
        self.index = 0
        for slot, x in enumerate(inputs):
            if x is not None:
                self.index = x.device.index or 0
                self.kinds.setdefault(_kind(x), slot)
                self._name(x, slot)

    def _name(self, x: Tensor, slot: int) -> None:
        address = x.data_ptr()
        if address in self.slots or address & 15 or not address:
            self.good = False  # two arguments in one place, or a rare variant
        self.slots[address] = slot

    def room(self, x: Tensor, zero: bool) -> None:
        """A buffer was made."""
        self._name(x, self.inputs + len(self.rooms))
        kind = _kind(x)
        self.rooms.append((kind, zero, None if zero else self.kinds.get(kind)))

    def step(self, kernel: Any, programs: int, flat: list[Any], pointers: tuple[int, ...]) -> None:
        """A kernel was started."""
        holes = []
        for i in pointers:
            slot = self.slots.get(flat[i])
            if slot is not None:
                holes.append((BEFORE + i, slot))
            elif flat[i] not in _constants:
                self.good = False
                return
        start = [programs, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None]
        self.steps.append((kernel.run, start + flat, tuple(holes)))

    def finish(self, results: Parts) -> bool:
        """Whether it can be played: every result is one of its buffers."""
        found = [None if x is None else self.slots.get(x.data_ptr(), -1) for x in results]
        self.results = tuple(found)
        return self.good and all(slot is None or slot >= self.inputs for slot in found)

    def play(self, inputs: Parts) -> Parts | None:
        """Run the pass on other tensors of the same kind; None if their alignment is another."""
        addresses, odd = [], 0
        for given in inputs:
            address = 0 if given is None else given.data_ptr()
            odd |= address
            addresses.append(address)
        if odd & 15:
            return None
        rooms: list[Tensor] = []
        for (shape, strides, dtype, device), zero, twin in self.rooms:
            like = None if twin is None else inputs[twin]
            if zero:
                x = torch.zeros(shape, dtype=dtype, device=device)
            elif like is not None:  # torch.empty costs most
                x = torch.empty_like(like)
            else:
                x = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            rooms.append(x)
            addresses.append(x.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        for run, template, holes in self.steps:
            start = template.copy()
            start[STREAM] = stream
            for i, slot in holes:
                start[i] = addresses[slot]
            run(*start)
        first = self.inputs
        return tuple(None if slot is None else rooms[slot - first] for slot in self.results)


def chained() -> bool:
    """Whether this thread starts kernels that may begin before those in front of them have ended."""
    return getattr(_here, "chained", False)


class chain:
    """Let kernels inside that can wait for those in front of them start early (compute capability 9.0)."""

    __slots__ = "before", "on"

    def __init__(self, on: bool) -> None:
        self.on = on

    def __enter__(self) -> None:
        self.before, _here.chained = chained(), self.on

    def __exit__(self, *failed: object) -> None:
        _here.chained = self.before


STREAM, BEFORE = 3, 9  # what a compiled kernel's `run` takes before the kernel's own arguments
LIMIT = 512  # passes to remember
_tapes: dict[tuple[Any, int], Tape | Any] = {}
_here = threading.local()  # `tape`: the one that this thread records
_constants: dict[int, Tensor] = {}


def recorded() -> Tape | None:
    """The tape that this thread records, if it does."""
    return getattr(_here, "tape", None)


def repeatable(name: Any, owner: Any, inputs: Parts, work: Callable[[], Parts]) -> Parts:
    """`work()`, which reads `inputs` and returns its own buffers; from the third time on by its tape.

    name: what pass it is, and facts about its inputs that the owner does not stand for. owner: the object
    that stands for everything else; the first time it is only remembered, as most owners come once.
    """
    key = name, id(owner)
    found = _tapes.get(key)
    if type(found) is Tape:
        if found.good:
            played = found.play(inputs)
            if played is not None:
                return played
        return work()
    if found is not owner:
        if len(_tapes) >= LIMIT:
            _tapes.clear()
        _tapes[key] = owner
        return work()
    _here.tape = tape = Tape(owner, inputs)
    try:
        results = work()
    finally:
        _here.tape = None
    tape.good = bool(tape.steps) and tape.finish(results)
    _tapes[key] = tape
    return results


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, zero: bool = False) -> Tensor:
    """A buffer of a pass: zeros, or whatever lies there."""
    x = (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)
    if (tape := recorded()) is not None:
        tape.room(x, zero)
    return x


def spoil() -> None:
    """What comes next is not made of launches and buffers alone: the pass has to be worked out every time."""
    if (tape := recorded()) is not None:
        tape.good = False


def one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The number 1, kept for good; not one that a graph capture would fill only when it is replayed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        spoil()
        return torch.ones(1, dtype=dtype, device=device)
    with torch.inference_mode(False):
        return _kept_one(dtype, device)


@functools.cache
def _kept_one(dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.ones(1, dtype=dtype, device=device)
    _constants[x.data_ptr()] = x
    return x


class Launcher:
    """A `@triton.jit` function that remembers what it was compiled to."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self.ready: dict[Any, Any] = {}
        self.pointers: tuple[int, ...] = ()

    def __call__(
        self, programs: int, key: Any, arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int
    ) -> None:
        """Start `programs` programs on the current device and stream.

        key: the flags, dtypes, strides and device that decide about the variant; pointers' alignment is
        looked at here. constants: the compile-time arguments, which follow the others. options: num_warps and
        num_stages, part of the key.
        """
        flat, odd = list(arguments), 0
        for i in self.pointers:
            flat[i] = address = arguments[i].data_ptr()
            if address & 15:
                odd |= 1 << i
        kernel = self.ready.get((key, odd))
        if kernel is not None:
            flat += constants
            kernel[programs, 1, 1](*flat)
            if (tape := recorded()) is not None:
                tape.step(kernel, programs, flat, self.pointers)
            return
        spoil()
        kernel = self.jit[(programs,)](*arguments, *constants, **options)
        if kernel is None:  # an interpreter compiles nothing
            return
        if not self.pointers:
            self.pointers = tuple(i for i, x in enumerate(arguments) if isinstance(x, Tensor))
            odd = sum(1 << i for i in self.pointers if arguments[i].data_ptr() & 15)
        self.ready[key, odd] = kernel
