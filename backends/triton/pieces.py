"""Pieces that every kernel shares: feature maps, angles at any position, narrow operands."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Letters: n rows (tokens), d key features, e value features; upper case is a size, lower case the index
# vector along it; a trailing [n d] is the shape of the block on that line.


@triton.jit
def feature(x, FEATURE: tl.constexpr, FAST: tl.constexpr):
    """phi(x), float32; FAST for operands that have few bits."""
    if FEATURE == "relu":
        x = tl.where(x <= 0, 0.0, x)  # a NaN stays one
    elif FEATURE == "silu":
        x = libdevice.fast_dividef(x, 1 + tl.exp(-x)) if FAST else x * tl.sigmoid(x)
    elif FEATURE == "elu+1":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    return x


@triton.jit
def feature_slope(o, x, FEATURE: tl.constexpr):
    """o phi'(x), float32; relu's is 0 at 0."""
    if FEATURE == "relu":
        o = tl.where(x > 0, o, 0.0)
    elif FEATURE == "silu":
        s = tl.sigmoid(x)
        o *= s * (1 + x * (1 - s))
    elif FEATURE == "elu+1":
        o *= tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    return o


@triton.jit
def turns_of(theta):
    """Angles as whole turns, float64, between -0.5 and 0.5: a multiple of them is exact to 2^-53 per turn."""
    turns = theta.to(tl.float64) * 0.15915494309189535
    return turns - tl.floor(turns + 0.5)


@triton.jit
def fixed(turns):
    """Turns in [-0.5, 0.5) as 64-bit fixed point, in which whole turns drop out of any product."""
    return (turns * 18446744073709551616.0).to(tl.int64)


@triton.jit
def cos_sin(phase, FAST: tl.constexpr):
    """Cosine and sine of fixed-point turns. FAST: to 2^-20, for operands that have fewer bits than that."""
    x = phase.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    if FAST:
        cos, sin = libdevice.fast_cosf(x), libdevice.fast_sinf(x)
    else:
        cos, sin = tl.cos(x), tl.sin(x)
    return cos, sin


@triton.jit
def phases(turn, begin, n):
    """Fixed-point phases at positions begin + n [n d]: exact at `begin`, in 32-bit steps from there."""
    base = ((turn * begin) >> 32).to(tl.uint32)
    return base[None, :] + n[:, None].to(tl.uint32) * (turn >> 32).to(tl.uint32)[None, :]


@triton.jit
def column_of(x, WHICH: tl.constexpr):
    """One of the 16 columns of a block: [n]."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == WHICH, x, 0.0), 1)


@triton.jit
def upright(x, ACROSS: tl.constexpr):
    """A block that is kept transposed if ACROSS, as it is meant."""
    return tl.trans(x) if ACROSS else x


@triton.jit
def of_i(x, ACROSS: tl.constexpr):
    """A vector along the rows of a block that is kept transposed if ACROSS."""
    return x[None, :] if ACROSS else x[:, None]


@triton.jit
def operand(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """A block as an operand of a matrix product, rounded to nearest: tensor cores would truncate to tf32."""
    if PRECISION == "tf32" and tl.float32 == OPERAND:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        special = (bits & 0x7F800000) == 0x7F800000  # infinities and NaN stay what they are
        x = tl.where(special, bits, (bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x.to(OPERAND)


@triton.jit
def power(g2, m):
    """2^(g2 m) for m >= 0, where 0 steps of an infinite decay are 1."""
    return tl.where(m > 0, tl.exp2(tl.where(m > 0, m, 1) * g2), 1.0)


@triton.jit
def sums_within(g):
    """Sums of log decays up to each token of a block, exact however deep its resets are: coarse + fine.

    A decay is a multiple of 2^-10, whose sums and differences are exact, and a rest whose rounding does not
    show. Below e^-128 a float32 factor is 0, so -inf needs no sum of its own.
    """
    g = tl.maximum(g, -128.0)
    coarse = tl.floor(g * 1024 + 0.5) * 0.0009765625
    return tl.cumsum(coarse, 0), tl.cumsum(g - coarse, 0), tl.sum(coarse, 0), tl.sum(g - coarse, 0)


@triton.jit
def sequence_of(unit, borders_ptr, S, N, M, segments, SEGMENT, BORDERS: tl.constexpr, SPLIT: tl.constexpr):
    """Which sequence and which of its segments a program works on, and where the sequence lies.

    BORDERS: 0 none, 1 lengths [S], 2 cu_seqlens [S + 1]. Segments of packed sequences have room from slot
    begin // SEGMENT + s on: a sequence never needs more of them than lie before the next one's.
    Returns (batch row, sequence, segment, begin, n, m): tokens of queries and of keys.
    """
    s = unit
    segment = unit * 0
    row = unit
    begin = unit * 0
    n = begin + N
    m = begin + M
    if BORDERS == 2:
        if SPLIT:
            s = unit * 0
            high = s + S - 1
            while s < high:
                middle = (s + high + 1) // 2
                start = tl.minimum(tl.maximum(tl.load(borders_ptr + middle).to(tl.int64), 0), N)
                below = start // SEGMENT + middle <= unit
                s = tl.where(below, middle, s)
                high = tl.where(below, high, middle - 1)
        begin = tl.minimum(tl.maximum(tl.load(borders_ptr + s).to(tl.int64), 0), N)
        end = tl.minimum(tl.maximum(tl.load(borders_ptr + s + 1).to(tl.int64), begin), N)
        n = end - begin
        m = n
        row = unit * 0
        if SPLIT:
            segment = unit - (begin // SEGMENT + s)
    else:
        if SPLIT:
            s = unit // segments
            segment = unit % segments
            row = s
        if BORDERS == 1:
            n = tl.minimum(tl.maximum(tl.load(borders_ptr + s).to(tl.int64), 0), N)
            m = n
    return row, s, segment, begin, n, m


@triton.jit
def circle(turns):
    """Turns in [-0.5, 0.5]: whether a quarter comes first, then cos and sin of the rest, |cos| >= |sin|."""
    quarter = tl.floor(turns * 4 + 0.5)
    x = (turns - quarter * 0.25) * 6.283185307179586
    y = x * x  # <= (pi / 4)^2
    c = y * 4.779477332387385e-14 - 1.1470745597729725e-11
    c = y * c + 2.08767569878681e-09
    c = y * c - 2.755731922398589e-07
    c = y * c + 2.48015873015873e-05
    c = y * c - 0.001388888888888889
    c = y * c + 0.041666666666666664
    c = y * (y * c - 0.5) + 1.0
    s = 1.6059043836821613e-10 - y * 7.647163731819816e-13
    s = y * s - 2.505210838544172e-08
    s = y * s + 2.7557319223985893e-06
    s = y * s - 0.0001984126984126984
    s = y * s + 0.008333333333333333
    s = y * s - 0.16666666666666666
    s = x * y * s + x
    quarter = quarter.to(tl.int32)
    sign = tl.where((quarter & 2) != 0, -1.0, 1.0)
    return (quarter & 1) != 0, c * sign, s * sign


@triton.jit
def across(turns, span):
    """cos and sin of `span` times an angle, float64: from one end of a sequence to the other."""
    angle = turns * span
    swap, cos, sin = circle(angle - tl.floor(angle + 0.5))
    return tl.where(swap, -sin, cos), tl.where(swap, cos, sin)


@triton.jit
def tile(ptr, rows, columns, stride_n, stride_d, inside):
    """Read [n d]; what is outside is 0 and never touched."""
    at = rows[:, None].to(tl.int64) * stride_n + columns[None, :].to(tl.int64) * stride_d
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def opaque(t):
    """t, which the compiler can no longer follow from block to block: it would keep a pointer to each row.

    That is faster only where there are registers enough.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [t], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def mapped(x, inside, FEATURE: tl.constexpr, FAST: tl.constexpr):
    """phi of a block; what is outside stays 0, where phi(0) may not be."""
    if FEATURE == "relu" and x.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(  # two at a time, which the compiler does not see; a NaN stays one
            "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }", "=r,r", [x],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif FEATURE != "none":
        x = feature(x.to(tl.float32), FEATURE, FAST)
        if FEATURE == "elu+1":
            x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def dot(a, b, sum_, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """sum_ + a @ b, summed in float32; the result and sum_ are kept transposed if ACROSS."""
    if ACROSS:
        found = tl.dot(tl.trans(b), tl.trans(a), sum_, input_precision=PRECISION)
    else:
        found = tl.dot(a, b, sum_, input_precision=PRECISION)
    return found


@triton.jit
def decays(
    g_ptr, g2, stride_n, t, left, r, inside,
    C: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, PAIRS: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """Factors of a block: between tokens [i j], from state to query, from key to state, whole, and its ln.

    DECAY: 0 none, 1 per head, 2 per token. The block holds min(C, left) tokens. ACROSS: pairs as [j i].
    """
    lag = r[:, None] - r[None, :]
    if REVERSE != ACROSS:
        lag = -lag
    seen = lag > 0 if STRICT else lag >= 0
    pairs = tl.where(seen, 1.0, 0.0)
    near = tl.full([C], 1.0, tl.float32)
    far = tl.full([C], 1.0, tl.float32)
    whole = 1.0
    total = 0.0
    if DECAY == 1:
        count = tl.minimum(left, C).to(tl.int32)
        if PAIRS:
            pairs = tl.where(seen, power(g2, tl.where(seen, lag, 0)), 0.0)
        near = power(g2, r + 1)
        far = power(g2, tl.maximum(count - 1 - r, 0))
        whole = power(g2, count)
    elif DECAY == 2:
        g = tl.load(g_ptr + (t + r).to(tl.int64) * stride_n, mask=inside, other=0.0).to(tl.float32)
        coarse, fine, coarse_end, fine_end = sums_within(g)
        if PAIRS:
            span = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
            if REVERSE == ACROSS:
                span = -span
            pairs = tl.where(seen, tl.exp(tl.where(seen, span, 0.0)), 0.0)
        near = tl.exp(coarse + fine)
        far = tl.exp((coarse_end - coarse) + (fine_end - fine))
        total = coarse_end + fine_end
        whole = tl.exp(total)
    if REVERSE:
        near, far = far, near
    return pairs, near, far, whole, total


@triton.jit
def turned(cosine, sine, cos, sin):
    """Between a state's own frame and the frame of its other end; its own inverse."""
    return (cos * cosine + sin * sine).to(tl.float32), (sin * cosine - cos * sine).to(tl.float32)


@triton.jit
def other_end(cosine, sine, turns, n, BACK: tl.constexpr):
    """A state between the frames of a sequence's first and last token; BACK: it was in the last one's."""
    if BACK:
        cos, sin = across(turns, n.to(tl.float64))
        cosine, sine = turned(cosine, sine, cos, sin)
    else:
        sine = -sine
    return cosine, sine


@triton.jit
def kept(state, whole):
    """A state times a decay, scaled or not; a decay of 0 forgets it, whatever it holds."""
    return tl.where(whole != 0, state * whole, 0.0)


def fading(count: int) -> tuple[str, str]:
    """PTX that does what `kept` does to so many numbers by one decay, and its constraints."""
    new, old, decay = range(count), range(count, 2 * count), 2 * count
    multiplied = "".join(f"mul.f32 ${i}, ${j}, ${decay}; " for i, j in zip(new, old, strict=True))
    forgotten = "".join(f"mov.f32 ${i}, 0f00000000; " for i in new)
    asked = f".reg .pred none; setp.eq.f32 none, ${decay}, 0f00000000; @none bra forget;"
    text = f"{{ {asked} {multiplied}bra on; forget: {forgotten}on: }}"
    return text, ",".join(["=f"] * count + ["f"] * (2 * count))


MANY = tl.constexpr(16)
FADING, FADING_ON = (tl.constexpr(text) for text in fading(MANY.value))


@triton.jit
def faded(state, whole, FAST: tl.constexpr):
    """A state times one decay, as `kept` has it, in PTX: compilers make selects of a branch."""
    if FAST:
        state = tl.inline_asm_elementwise(
            FADING, FADING_ON, [state, whole], dtype=tl.float32, is_pure=True, pack=MANY
        )
    else:
        state = kept(state, whole)
    return state


@triton.jit
def at_end(
    w, far, DECAY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr
):  # fmt: skip
    """Values of a block as its last token sees them, for `moved`: [j e], transposed if ACROSS."""
    if DECAY > 0:
        w = w * far[:, None]
    return upright(operand(w, OPERAND, PRECISION), ACROSS)


@triton.jit
def added(state, y, w, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """A state with what a block adds to it; without it, if it is None."""
    if ACROSS:
        found = tl.dot(w, y, state, input_precision=PRECISION)
    else:
        found = tl.dot(tl.trans(y), w, state, input_precision=PRECISION)
    return found


@triton.jit
def moved(
    state, y, w, whole, DECAY: tl.constexpr, BRANCH: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """The state after a block. A decay of 0 forgets what it held.

    BRANCH: by a product of its own. Only where y is made, not loaded: the compiler lets the next block's
    loads overwrite what a branch has yet to read.
    """
    if DECAY == 0:
        found = added(state, y, w, PRECISION, ACROSS)
    elif not BRANCH:
        found = added(faded(state, whole, FAST), y, w, PRECISION, ACROSS)
    elif whole != 0:
        found = added(state * whole, y, w, PRECISION, ACROSS)
    else:
        found = added(None, y, w, PRECISION, ACROSS)
    return found


@triton.jit
def begun(ptr, inside, has_start, STATES: tl.constexpr):
    """A part of a state that may not be there: float32, or zeros."""
    if STATES:
        state = tl.load(ptr, mask=inside & (has_start != 0), other=0.0).to(tl.float32)
    else:
        state = tl.zeros(inside.shape, tl.float32)
    return state


@triton.jit
def gathered(
    cosine, sine, parts, half, size, inside, unit, segment, SEGMENT, n, g2,
    TWO: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A state at a segment's border: what every segment before it on the way adds, the farthest first.

    parts: where those of unit 0 lie, `size` apart, a sine `half` behind its cosine; n: the sequence's tokens.
    """
    before = (n - 1) // SEGMENT - segment if REVERSE else segment
    for step in range(0, before):
        back = before - step
        part = parts + (unit + back if REVERSE else unit - back) * size
        fade = 1.0
        if DECAY == 1:  # only the sequence's last segment may be short
            fade = power(g2, tl.minimum(n - (segment + back) * SEGMENT if REVERSE else n, SEGMENT))
        cosine = kept(cosine, fade) + tl.load(part, mask=inside, other=0.0)
        if TWO:
            sine = kept(sine, fade) + tl.load(part + half, mask=inside, other=0.0)
    return cosine, sine
