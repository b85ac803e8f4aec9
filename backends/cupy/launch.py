"""One launch of the product: blocks that fit the device, flags, and everything that a kernel is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from linattn.arrays import Array
from linattn.backends.cupy import hopper, sources, tensor
from linattn.backends.cupy.memory import address, dense, room, strides
from linattn.backends.cupy.sources import ANGLES, DECAY, FEATURES
from linattn.problem import Problem
from linattn.state import State

THREADS = 256  # of every other kernel's blocks


@dataclass(frozen=True)
class Blocks:
    """c tokens at a time, and `columns` of w, to a block of threads."""

    c: int
    columns: int

    @property
    def threads(self) -> int:
        return max(128, self.c * self.columns // 16)

    def shared(self, size: int, f: int) -> int:
        """Bytes of shared memory, with numbers of `size` bytes and f contracted features (arguments.cuh)."""
        rows = -(-f // 16) * 16
        numbers = self.c * (2 * self.c + self.columns + 5) + self.threads + rows * (self.columns + 1)
        return size * numbers + 84 * self.c


CHOICES = (Blocks(64, 64), Blocks(64, 32), Blocks(32, 32), Blocks(32, 16))


@dataclass(frozen=True)
class Room:
    """Bytes of shared memory that a block may have, and the shapes to choose from, largest first."""

    shared: int
    choices: tuple[Blocks, ...] = CHOICES
    shapes: tuple[tensor.Shape, ...] = tensor.SHAPES  # on tensor cores

    def blocks(self, size: int, f: int, columns: int) -> Blocks | None:
        """The largest that fit, no wider than they need to be."""
        fitting = [blocks for blocks in self.choices if blocks.shared(size, f) <= self.shared]
        return next((x for x in fitting if x.columns < 2 * columns), fitting[-1] if fitting else None)


class Runner(Protocol):
    """What starts kernels: a GPU, or a library for the CPU in tests."""

    def __call__(
        self, file: str, kernel: str, arguments: bytes, grid: int, threads: int, shared: int, like: Array
    ) -> None: ...

    def starter(
        self, file: str, kernel: str, size: int, grid: int, threads: int, shared: int, like: Array
    ) -> Callable[[int, int, int], None]:
        """What starts it again: told a stream, the address of its arguments' address, and 0."""
        ...

    def streams(self, like: Array) -> Callable[[], int]:
        """What tells the current stream of an array's library on its device."""
        ...

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Inside, kernels start on a device, and arrays are made there."""
        ...

    def room(self, like: Array) -> Room:
        """What fits on an array's device."""
        ...

    def multiprocessors(self, like: Array) -> int: ...

    def capability(self, like: Array) -> int:
        """Of an array's device, times ten."""
        ...

    def maps(self, *arrays: Array) -> bytes:
        """What bulk copies are told about arrays; for kernels of capability 90."""
        ...


@dataclass(frozen=True)
class Call:
    """What surrounds q, k and v: tables, masks and borders, in the dtypes that kernels read."""

    problem: Problem
    run: Runner
    log_decay: Array | None
    theta: Array | None  # float64 [H D]
    key_mask: Array | None
    borders: Array | None  # lengths or cu_seqlens, int64

    @property
    def acc(self) -> str:
        """The dtype of states, and of what is kept for each token."""
        return self.problem.accumulate

    @property
    def cut(self) -> bool:
        """Whether some tokens may belong to no sequence, so that kernels skip them."""
        return self.problem.lengths or self.problem.packed


def tables(problem: Problem, x: Any) -> tuple[Array | None, Array | None, Array | None, Array | None]:
    """What surrounds q, k and v in the arrays of a backend's call (`Saved` has their names), for a `Call`."""
    borders = x.cu_seqlens if problem.packed else x.lengths
    return (
        x.log_decay, None if x.theta is None else dense(x.theta, "float64"), x.key_mask,
        None if borders is None else dense(borders, "int64"),
    )  # fmt: skip


def fresh(call: Call, like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Room for results; zeros where kernels skip tokens that no sequence has."""
    return room(like, shape, dtype, zero=call.cut)


def empty_state(call: Call, like: Array) -> State:
    """Room for one state a sequence; lengths are not in it."""
    problem = call.problem
    shape = problem.sequences, problem.heads, problem.f
    kv = room(like, (*shape, problem.e), call.acc)
    z = room(like, shape, call.acc) if problem.normalize else None
    return State(kv, z, kv, problem.feature_map, problem.reweight, problem.d)


def dense_state(state: State | None, dtype: str) -> State | None:
    if state is None:
        return None
    z = None if state.z is None else dense(state.z, dtype)
    return State(dense(state.kv, dtype), z, state.length)


SIZES = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class Plan:
    """What a launch looks like; slices: of w's columns, each a block of threads'."""

    blocks: Blocks
    f: int
    slices: int
    shared: int
    held: int | None = None  # on tensor cores: chunks of the state in registers

    @property
    def threads(self) -> int:
        return self.blocks.threads if self.held is None else tensor.THREADS


@functools.lru_cache(maxsize=1024)
def plan(
    reweight: str | None, room: Room, d: int, e: int, *, gradient: bool, extra: bool, acc: str,
    operands: str | None = None, normalize: bool = False,
) -> Plan | None:  # fmt: skip
    """For d contracted features and e of w; None if they have no place.

    operands: the dtype of those that tensor cores take, where they may (`tensor.refusal`).
    """
    angles = ANGLES[reweight]
    outer = angles == 2 and gradient
    f = (2 if angles and not outer else 1) * (d + extra)
    columns = e * (2 if outer else 1)
    if operands is not None:
        turns = angles if angles < 2 else 32 if outer else d
        shape = tensor.shape(room.shapes, room.shared, operands, f, columns, turns, normalize=normalize)
        if shape is not None:
            shared = shape.shared(operands, f, turns, normalize=normalize)
            blocks = Blocks(tensor.C, shape.columns)
            return Plan(blocks, f, -(-columns // shape.columns), shared, shape.held)
    found = room.blocks(SIZES[acc], f, columns)
    if found is None:
        return None
    return Plan(found, f, -(-columns // found.columns), found.shared(SIZES[acc], f))


def planned(
    call: Call, like: Array, d: int, e: int, *, gradient: bool = False, extra: bool = False,
    normalize: bool = False, turn: bool = False,
) -> Plan:  # fmt: skip
    """The plan of one product of a call; turn: it forms the gradient of angles, in float64."""
    problem = call.problem
    narrow = not turn and tensor.refusal(problem, call.run.capability(like)) is None
    found = plan(
        problem.reweight, call.run.room(like), d, e, gradient=gradient, extra=extra,
        acc="float64" if turn else call.acc, operands=problem.dtype if narrow else None, normalize=normalize,
    )  # fmt: skip
    assert found is not None  # `unsupported` has asked
    return found


PLACES = ("b", "n", "h", "d")


def too_large(problem: Problem, room: Room) -> str | None:
    """None if every launch of a call fits, else the sentence that says what does not."""
    d, e, acc = problem.d, problem.e, problem.accumulate
    fits = plan(problem.reweight, room, d, e, gradient=False, extra=False, acc=acc) is not None
    if fits and problem.needs_grad:
        wide = "float64" if problem.reweight == "lrpe" else acc
        fits = (
            plan(problem.reweight, room, e, d, gradient=True, extra=problem.normalize, acc=wide) is not None
        )
    if fits:
        return None
    most = f"{room.shared // 1024} KB of shared memory"
    return f"D = {d}, E = {e} in {acc} need more than the {most} that a block of threads may have"


def product(
    call: Call,
    *,
    x: Array | None,
    y: Array,
    w: Array,
    out: Array | None,
    raw: Array | None = None,
    extra: Array | None = None,
    extra_on: int = 0,
    den: Array | None = None,
    do_is: int = 0,
    start: State | None = None,
    final: State | None = None,
    slots: Array | None = None,
    partial: tuple[Array, Array | None] | None = None,
    rows: Array | None = None,
    turn: Array | None = None,
    reverse: bool = False,
    strict: bool = False,
    gradient: bool = False,
    normalize: bool = False,
    mask: int = 1,
    total: bool = False,
    sums: int = 0,
    scale: float = 1.0,
) -> None:
    """Launch `product` once: x, y, w, raw [B N H features] -> out; without x and out only the state.

    do_is: which of x (1), y (2), w (3) is the gradient of the output: scaled, and divided by `den`.
    start, final: the states before and after; with `slots` their kv, and start's z, are rows of pools.
    partial: sums of one direction. rows, turn, extra, den and the other options: as `arguments.cuh` says.
    """
    problem, output = call.problem, out is not None
    acc = "float64" if turn is not None else call.acc
    d, e = y.shape[3], w.shape[3] if out is None else out.shape[3]
    angles, decay = ANGLES[problem.reweight], 0 if total else DECAY[problem.decay]
    found = planned(
        call, y, d, e, gradient=gradient, extra=extra_on > 0, normalize=normalize, turn=turn is not None
    )  # fmt: skip
    blocks, grid = found.blocks, problem.sequences * problem.heads * found.slices
    if not grid:
        return
    masked = mask if call.key_mask is not None else 0
    numbers = (
        blocks.c, blocks.columns, FEATURES[problem.feature_map], angles, decay, reverse, strict, gradient,
        normalize, extra_on, masked, 2 if problem.packed else int(problem.lengths), total, output, sums,
        rows is not None, turn is not None, do_is,
    )  # fmt: skip
    values: dict[str, float] = {}
    for name, array in (("x", x), ("y", y), ("w", w), ("raw", raw), ("out", out)):
        if array is not None:
            values[name] = address(array)
            values |= {f"{name}_{p}": s for p, s in zip(PLACES, strides(array), strict=True)}
    if decay:
        assert call.log_decay is not None
        steps = strides(call.log_decay)
        values["log_decay"] = address(call.log_decay)
        values |= dict(zip(("g_b", "g_n", "g_h"), (0, 0, *steps)[-3:], strict=True))
    if masked:
        assert call.key_mask is not None
        values["mask"] = address(call.key_mask)
        values |= dict(zip(("mask_b", "mask_n"), strides(call.key_mask), strict=True))
    values |= {
        "theta": address(call.theta),
        "angle": problem.angle,
        "borders": address(call.borders), "den": address(den), "extra": address(extra),
        "extra_n": 0 if extra is None else extra.shape[2], "rows": address(rows), "turn": address(turn),
        "B": problem.batch, "N": y.shape[1] if x is None else x.shape[1], "M": y.shape[1],
        "H": problem.heads, "D": d, "E": e, "scale": scale, "do_scale": problem.scale, "eps": problem.eps,
    }  # fmt: skip
    if start is not None:
        values |= {"start": address(start.kv), "start_z": address(start.z)}
    if final is not None:
        values |= {"final": address(final.kv), "final_z": address(final.z)}
    if slots is not None and start is not None:
        values |= {"slots": address(slots), "pool": start.kv.shape[0]}
    if partial is not None:
        values |= {"partial": address(partial[0]), "partial_den": address(partial[1])}
    plain = not (strict or extra_on or masked or total or sums) and turn is None and slots is None
    plain = plain and den is None and (not do_is or problem.scale == 1 or (start is None and final is None))
    if plain and x is not None and out is not None:
        surroundings: dict[str, Any] = {"raw": raw, "gradient": gradient}
        if hopper.takes(call, x, y, w, out, rows=rows, **surroundings):
            values["scale"] = scale * (problem.scale if do_is else 1.0)
            hopper.launch(
                call, x=x, y=y, w=w, out=out, values=values, reverse=reverse, normalize=normalize,
                rows=rows is not None, **surroundings,
            )  # fmt: skip
            return
    if found.held is None:
        file, kernel = "product.cu", sources.expression("product", (problem.dtype, acc), numbers, "Options")
    else:
        options = found.held, *numbers
        file, kernel = "tensor.cu", sources.expression("tensor", (problem.dtype, acc), options, "Warps")
    packed = sources.packed(file, "Arguments", values)
    call.run(file, kernel, packed, grid, found.threads, found.shared, y)
