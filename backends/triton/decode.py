"""One token of every sequence: the state is read once, advanced, added to, read out, and written in place."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from linattn.backends.triton.launcher import Launcher, chained, repeatable, room
from linattn.backends.triton.pieces import circle, feature, turns_of
from linattn.problem import Problem
from linattn.state import State

Tensor = torch.Tensor

# Letters: S state rows, B rows of the batch, H heads, D key features, E value features, F features of the
# state: D, or 2 D with angles. Upper case is a size, lower case the index vector along it; a trailing [d e]
# is the shape of the block on that line.


@triton.jit
def halves(x):
    """A float64 as two float32 of 24 bits each, of one sign and neither 0: infinity times them is no NaN."""
    hi = (x.to(tl.int64, bitcast=True) & -0x20000000).to(tl.float64, bitcast=True)
    return hi.to(tl.float32), (x - hi + x * 8.673617379884035e-19).to(tl.float32)  # 2^-60


# A series rather than the library's function, which branches: loads that come before it would sink below.
# Sums of products rather than tl.fma, which would round these numbers to float32.


@triton.jit
def exponential(g):
    """e^g for g <= 0, float64, to 2^-50 near g = 0 and 2^-46 at its end; below every float32 it is flat."""
    x = tl.maximum(g, -128.0).to(tl.float64) * 1.4426950408889634
    n = tl.floor(x * 16 + 0.5)  # sixteenths of a power of 2, and a rest
    r = (x - n * 0.0625) * 0.6931471805599453
    y = r * r
    rest = (r * 0.008333333333333333 + 0.041666666666666664) + y * 0.001388888888888889
    rest = (r + 1.0) + y * ((r * 0.16666666666666666 + 0.5) + y * rest)
    n = n.to(tl.int64)
    one = tl.full([1], 1.0, tl.float64)
    root = tl.where((n & 1) != 0, 1.0442737824274138, one) * tl.where((n & 2) != 0, 1.0905077326652577, one)
    root *= tl.where((n & 4) != 0, 1.189207115002721, one) * tl.where((n & 8) != 0, 1.4142135623730951, one)
    return rest * root * (((n >> 4) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def part(to_state, to_sine, at, inside, ANGLES: tl.constexpr):
    """The state's C and S in a block, [d e] both."""
    cosine = tl.load(to_state + at, mask=inside, other=0.0)
    sine = cosine
    if ANGLES:
        sine = tl.load(to_sine + at, mask=inside, other=0.0)
    return cosine, sine


@triton.jit
def values(to_v, e, v_e, E):
    """The values of a block: [e]."""
    return tl.load(to_v + e * v_e, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
def advanced(
    cosine, sine, pair, a, a_low, b, b_low, quarter, keep, ANGLES: tl.constexpr, DECAY: tl.constexpr
):
    """C and S one token later: a + a_low is decay times cos theta, b + b_low decay times sin theta.

    Angles around a quarter of a turn take it first, by exchange: the larger product must be added last, or
    its rounding leans one way for as long as the state comes back to nearly the same place.
    """
    if ANGLES:
        x, y = cosine, sine
        if ANGLES == 2:
            x, y = tl.where(quarter, -sine, cosine), tl.where(quarter, cosine, sine)
        c = tl.fma(a, x, tl.fma(-b, y, tl.fma(a_low, x, tl.fma(-b_low, y, pair))))
        sine = tl.fma(a, y, tl.fma(b, x, tl.fma(a_low, y, b_low * x)))
    elif DECAY:
        c = tl.fma(a, cosine, tl.fma(a_low, cosine, pair))
    else:
        c = cosine + pair
    if DECAY:  # a factor of 0 selects: what it forgets may not be finite
        c = tl.where(keep, c, pair)
        sine = tl.where(keep, sine, 0.0)
    return c, sine


# Compiled once for all values of these; the strides of the state decide how wide its loads are.
RUNTIME = [
    "q_b", "q_h", "q_d", "k_b", "k_h", "k_d", "v_b", "v_h", "v_e", "g_b", "g_h", "theta_h", "theta_d",
    "slots_b", "z_s", "z_h", "z_f", "length_s", "S", "H", "slices",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def decode(
    q_ptr, q_b, q_h, q_d,  # [B H D]
    k_ptr, k_b, k_h, k_d,  # [B H D]
    v_ptr, v_b, v_h, v_e,  # [B H E]
    g_ptr, g_b, g_h,  # [B H], float32, log decay; read only if DECAY
    theta_ptr, theta_h, theta_d,  # [H D], float32; read only if ANGLES == 2
    slots_ptr, slots_b,  # [B], the state row of each row of the batch; read only if SLOTS
    kv_ptr, kv_s, kv_h, kv_f, kv_e,  # [S H F E], float32
    z_ptr, z_s, z_h, z_f,  # [S H F], float32; touched only if NORMALIZE
    length_ptr, length_s,  # [S], int64
    o_ptr,  # [B H E], without gaps
    cos, cos_low, sin, sin_low,  # of one token's angle if ANGLES == 1
    S, H, D, E, slices, scale, eps,
    BLOCK_D: tl.constexpr,  # the power of two from D on
    BLOCK_E: tl.constexpr,
    STEPS: tl.constexpr,  # blocks of E in one program
    FEATURE: tl.constexpr,
    ANGLES: tl.constexpr,  # 0 none, 1 the same for all, 2 per head and feature
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,  # then there is one slice: who writes z is the only one to read it
    SLOTS: tl.constexpr,
    CHAINED: tl.constexpr,  # the kernel in front may still run: it writes q, k, v, no state, length or table
):  # fmt: skip
    """C, S <- decay R(theta) (C, S); C += phi(k) v; o = scale phi(q) C, over max(den, eps) if normalized.

    One program per (row of the batch, head, slice of E).
    """
    bh = tl.program_id(0) // slices
    e_slice = tl.program_id(0) % slices
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row = b
    if SLOTS:
        row = tl.load(slots_ptr + b * slots_b).to(tl.int64)
    real = (row >= 0) & (row < S)  # any other row is padding
    row = tl.where(real, row, 0)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    e = (e_slice * STEPS * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    within = d < D

    # the state first: it is most of what is read
    to_state = kv_ptr + row * kv_s + h * kv_h
    to_sine = to_state + tl.full([1, 1], D, tl.int64) * kv_f
    to_v = v_ptr + b * v_b + h * v_h
    at = d[:, None] * kv_f + e[None, :] * kv_e  # [d e]
    inside = within[:, None] & (e < E)[None, :] & real  # [d e]
    if CHAINED:
        gdc_launch_dependents()
    cosine, sine = part(to_state, to_sine, at, inside, ANGLES)
    counts = (h == 0) & (e_slice == 0) & real
    to_length = length_ptr + row * length_s
    length = tl.load(to_length, mask=counts, other=0)
    if DECAY:
        g = tl.load(g_ptr + b * g_b + h * g_h + tl.arange(0, 1))
    if ANGLES == 2:
        theta = tl.load(theta_ptr + h * theta_h + d * theta_d, mask=within, other=0.0)
    if CHAINED:
        gdc_wait()
    v = values(to_v, e, v_e, E)
    fq = tl.load(q_ptr + b * q_b + h * q_h + d * q_d, mask=within, other=0.0).to(tl.float32)  # [d]
    fk = tl.load(k_ptr + b * k_b + h * k_h + d * k_d, mask=within, other=0.0).to(tl.float32)  # [d]

    factor = tl.full([1], 1.0, tl.float64)
    if DECAY:
        factor = exponential(g)
    keep = factor.to(tl.float32) > 0  # [1]
    a, a_low = halves(factor)
    b_high, b_low, quarter = a, a_low, keep
    if ANGLES == 1:
        a, a_low = halves(factor * (tl.full([1], cos, tl.float64) + cos_low))
        b_high, b_low = halves(factor * (tl.full([1], sin, tl.float64) + sin_low))
    elif ANGLES == 2:
        quarter, cos_d, sin_d = circle(turns_of(theta))
        a, a_low = halves(factor * cos_d)  # [d]
        b_high, b_low = halves(factor * sin_d)
    fq = tl.where(within, feature(fq, FEATURE, False) * scale, 0.0)
    fk = tl.where(within, feature(fk, FEATURE, False), 0.0)

    den = tl.full([1], 1.0, tl.float32)
    if NORMALIZE:
        to_z = z_ptr + row * z_s + h * z_h + d * z_f
        z_sine_at = tl.full([1], D, tl.int64) * z_f
        z_cosine = tl.load(to_z, mask=within & real, other=0.0)  # [d]
        z_sine = z_cosine
        if ANGLES:
            z_sine = tl.load(to_z + z_sine_at, mask=within & real, other=0.0)
        z_cosine, z_sine = advanced(
            z_cosine, z_sine, fk, a, a_low, b_high, b_low, quarter, keep, ANGLES, DECAY
        )
        den = tl.sum(tl.where(within, fq * z_cosine, 0.0), 0, keep_dims=True)
        den = tl.where(den <= eps, eps, den)  # a NaN stays one
        tl.debug_barrier()  # several threads read the same z
        tl.store(to_z, z_cosine, mask=within & real)
        if ANGLES:
            tl.store(to_z + z_sine_at, z_sine, mask=within & real)

    for _ in range(STEPS):
        here, at_e, inside_here = at, e, inside
        next_cosine, next_sine, next_v = cosine, sine, v
        if STEPS > 1:  # under way while this block is worked on
            e += BLOCK_E
            at += tl.full([1, 1], BLOCK_E, tl.int64) * kv_e
            inside = within[:, None] & (e < E)[None, :] & real
            next_cosine, next_sine = part(to_state, to_sine, at, inside, ANGLES)
            next_v = values(to_v, e, v_e, E)
        cosine, sine = advanced(
            cosine, sine, fk[:, None] * v[None, :], a[:, None], a_low[:, None], b_high[:, None],
            b_low[:, None], quarter[:, None], keep[:, None], ANGLES, DECAY,
        )  # fmt: skip
        tl.store(to_state + here, cosine, mask=inside_here)
        if ANGLES:
            tl.store(to_sine + here, sine, mask=inside_here)
        o = tl.sum(tl.where(within[:, None], fq[:, None] * cosine, 0.0), 0)  # [e]
        if NORMALIZE:
            o = o / den
        o = tl.where(real, o, 0.0)
        to_o = o_ptr + bh.to(tl.int64) * E + at_e
        tl.store(to_o, o.to(o_ptr.dtype.element_ty), mask=at_e < E)
        cosine, sine, v = next_cosine, next_sine, next_v

    tl.store(to_length, length + 1, mask=counts)


@dataclass(frozen=True)
class Shape:
    """What a launch looks like: a slice of E is `steps` blocks of `block_e`."""

    block_d: int
    block_e: int
    steps: int
    slices: int
    warps: int


NUMBERS = 4096  # of the state, in a block
OF_A_THREAD = 32
FEW = 256  # heads
NARROWEST = 16
MOST_WARPS = 16


@functools.lru_cache(maxsize=4096)
def shape(heads: int, d: int, e: int, turned: bool, normalize: bool) -> Shape:
    """The launch for `heads` = B H states of d features (twice as many if turned) and e values.

    A normalized head is never cut: each of its programs would need the z that another one overwrites. Few of
    them take larger blocks, as none hides the latency of another.
    """
    block_d, most_e = triton.next_power_of_2(d), triton.next_power_of_2(e)
    features = block_d * (2 if turned else 1)
    numbers, of_a_thread = NUMBERS, OF_A_THREAD
    if normalize:
        numbers, of_a_thread = NUMBERS * (2 if heads <= FEW else 1), OF_A_THREAD // 2
    block_e = min(most_e, max(NARROWEST, numbers // features))
    warps = min(MOST_WARPS, max(1, features * block_e // (32 * of_a_thread)))
    blocks = triton.cdiv(e, block_e)
    steps, slices = (blocks, 1) if normalize else (1, blocks)
    return Shape(block_d, block_e, steps, slices, warps)


ANGLES = {None: 0, "cosine": 1, "lrpe": 2}


@functools.lru_cache(maxsize=256)
def turn(angle: float) -> tuple[float, float, float, float]:
    """cos and sin of an angle, each as two numbers that float32 holds."""
    cos, sin = math.cos(angle), math.sin(angle)
    cos_high, sin_high = (struct.unpack("f", struct.pack("f", x))[0] for x in (cos, sin))
    return cos_high, cos - cos_high, sin_high, sin - sin_high


start = Launcher(decode)


def decode_step(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    theta: Tensor | None,
    state: State,
    slots: Tensor | None,
) -> Tensor:
    """q, k [B, H, D], v [B, H, E] -> o [B, H, E] in q's dtype; kv, z and length of `state` change in place.

    log_decay [H] or [B, H] and theta [H, D] are float32, as the state is; slots [B] int32 or int64. Any
    strides. Launches one kernel on the current device, which must be the tensors', and its current stream.
    """
    inputs = (q, k, v, log_decay, theta, slots, state.kv, state.z, state.length)
    o = repeatable(
        "chained decode" if chained() else "decode",
        problem,
        inputs,
        functools.partial(_step, problem, *inputs),
    )[0]
    assert o is not None
    return o


def _step(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, theta: Tensor | None,
    slots: Tensor | None, kv: Tensor, z: Tensor | None, length: Tensor,
) -> tuple[Tensor]:  # fmt: skip
    b, h, d = q.shape
    s, _, _, e = kv.shape
    o = room((b, h, e), q.dtype, q.device)
    if not b * h:
        return (o,)
    angles, normalize = ANGLES[problem.reweight], problem.normalize
    x = shape(b * h, d, e, angles > 0, normalize)
    decay_strides = (0, 0) if log_decay is None else (0, *log_decay.stride())[-2:]
    strides = kv.stride()
    constants = (
        x.block_d, x.block_e, x.steps, problem.feature_map or "none", angles, log_decay is not None,
        normalize, slots is not None, chained(),
    )  # fmt: skip
    dtypes = (
        q.dtype, log_decay is not None and log_decay.dtype, theta is not None and theta.dtype,
        slots is not None and slots.dtype,
    )  # fmt: skip
    start(
        b * h * x.slices, (dtypes, q.device, strides, d, e, constants, x.warps),
        (
            q, *q.stride(), k, *k.stride(), v, *v.stride(),
            q if log_decay is None else log_decay, *decay_strides,
            *((q, 0, 0) if angles < 2 or theta is None else (theta, *theta.stride())),
            *((q, 0) if slots is None else (slots, slots.stride(0))),
            kv, *strides, *((kv, 0, 0, 0) if z is None else (z, *z.stride())), length, length.stride(0),
            o, *turn(problem.angle), s, h, d, e, x.slices, problem.scale,
            problem.eps,
        ),
        constants, num_warps=x.warps, num_stages=1, **({"launch_pdl": True} if chained() else {}),
    )  # fmt: skip
    return (o,)
