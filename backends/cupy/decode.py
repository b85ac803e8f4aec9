"""One token of every sequence: how its launch looks, and what it is told."""

from __future__ import annotations

from linattn.arrays import Array
from linattn.backends.cupy import sources
from linattn.backends.cupy.launch import ANGLES, DECAY, FEATURES, SIZES, THREADS, Call
from linattn.backends.cupy.memory import address, dense, room, strides
from linattn.state import State

WIDEST = 256  # values of a normalized head, which one block of threads works on


def fits(e: int, normalize: bool) -> bool:
    """Whether the kernel takes so many values."""
    return e <= WIDEST or not normalize


def shape(heads: int, e: int, wide: int, normalize: bool, multiprocessors: int) -> tuple[int, int]:
    """Threads beside each other in a row of the state, and slices of its columns; heads: B H of them."""
    lanes = 1 << max(0, -(-e // wide) - 1).bit_length()
    if normalize:
        return lanes, 1
    lanes = min(lanes, 32)
    while lanes > 4 and heads * -(-e // (lanes * wide)) < 2 * multiprocessors:
        lanes //= 2
    return lanes, -(-e // (lanes * wide))


def decode_step(call: Call, q: Array, k: Array, v: Array, state: State, slots: Array | None) -> Array:
    """q, k [B, H, D], v [B, H, E] -> o [B, H, E] in q's dtype; `state` changes in place."""
    problem = call.problem
    b, h, d = q.shape
    e = v.shape[2]
    o = room(q, (b, h, e), problem.dtype)
    kv = strides(state.kv)
    size = SIZES[call.acc]
    wide = 16 // size
    if kv[3] != 1 or e % wide or any(step % wide for step in kv[:3]) or address(state.kv) % 16:
        wide = 1
    lanes, slices = shape(b * h, e, wide, problem.normalize, call.run.multiprocessors(q))
    if not b * h:
        return o
    angles = ANGLES[problem.reweight]
    values: dict[str, float] = {
        "q": address(q), "k": address(k), "v": address(v), "o": address(o),
        "log_decay": address(call.log_decay), "theta": address(call.theta),
        "angle": problem.angle,
        "slots": address(slots), "kv": address(state.kv), "z": address(state.z),
        "length": address(state.length), "length_s": strides(state.length)[0], "S": state.kv.shape[0], "H": h,
        "D": d, "E": e, "scale": problem.scale, "eps": problem.eps,
    }  # fmt: skip
    arrays = [("q", "bhd", q), ("k", "bhd", k), ("v", "bhe", v), ("kv", "shfe", state.kv)]
    if state.z is not None:
        arrays.append(("z", "shf", state.z))
    for name, letters, array in arrays:
        values |= {f"{name}_{p}": step for p, step in zip(letters, strides(array), strict=True)}
    if call.log_decay is not None:
        values |= dict(zip(("g_b", "g_h"), (0, *strides(call.log_decay))[-2:], strict=True))
    at_once = 4 if angles or size == 8 else 8
    numbers = (
        THREADS, wide, lanes, at_once, max(32, 1 << (d - 1).bit_length()), FEATURES[problem.feature_map],
        angles, min(1, DECAY[problem.decay]), problem.normalize,
    )  # fmt: skip
    kernel = sources.expression("decode", (problem.dtype,), numbers, "Choice")
    packed = sources.packed("decode.cu", "Step", values)
    call.run("decode.cu", kernel, packed, b * h * slices, THREADS, 0, q)
    return o


def slots_of(slots: Array | None) -> Array | None:
    return None if slots is None else dense(slots, "int64")
