"""Between the passes: states of segments summed up, the normaliser's gradient, sums over suffixes."""

import triton
import triton.language as tl

from linattn.backends.triton.pieces import across, kept, power, sequence_of, turned, turns_of


@triton.jit(
    do_not_specialize=[
        "has_start",
        "has_final",
        "g_h",
        "S",
        "N",
        "H",
        "D",
        "E",
        "segments",
        "SEGMENT",
        "pool",
    ]
)
def scan(
    parts_ptr,  # [units H F E] float32: what each segment adds; on return the state before it
    start_ptr, has_start,  # [S H F E] float32: the state before the sequence
    final_ptr, has_final,  # [S H F E] float32: and after it
    g_ptr, g_h,  # log decay [H] with DECAY 1, of each segment [units H] with DECAY 2
    theta_ptr, angle,
    slots_ptr, length_ptr, pool,  # [S]: rows of start and final; [pool] int64: what they have seen
    borders_ptr, S, N, H, D, E, segments, SEGMENT,
    BLOCK: tl.constexpr, ANGLES: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    BORDERS: tl.constexpr, TOTAL: tl.constexpr, SLOTS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK numbers of one sequence's and head's state, through its segments in order.

    TOTAL writes the sum over all segments as it is, and leaves the parts alone. SLOTS: states before and
    after are rows of a pool; COUNTS: and so is the number of tokens.
    """
    TWO: tl.constexpr = ANGLES > 0
    tiles = tl.cdiv(D * E, BLOCK)
    pid = tl.program_id(0)
    x = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    h = ((pid // tiles) % H).to(tl.int64)
    s = (pid // tiles // H).to(tl.int64)
    _, _, _, begin, n, _ = sequence_of(s, borders_ptr, S, N, N, segments, SEGMENT, BORDERS, False)
    first = s * segments
    if BORDERS == 2:
        first = begin // SEGMENT + s
    here = x < D * E
    size = D * E * (2 if TWO else 1)
    own = (s * H + h) * size + x
    if SLOTS:
        slot = tl.load(slots_ptr + s).to(tl.int64)
        here = here & (slot >= 0) & (slot < pool)  # any other row is padding
        own = (slot * H + h) * size + x
    state = tl.load(start_ptr + own, mask=here & (has_start != 0), other=0.0)
    g2 = 0.0
    if DECAY == 1:
        g2 = tl.load(g_ptr + h * g_h).to(tl.float32) * 1.4426950408889634
    if TWO:
        sine = tl.load(start_ptr + own + D * E, mask=here & (has_start != 0), other=0.0)
        if ANGLES == 2:
            turns = turns_of(tl.load(theta_ptr + h * D + x // E, mask=here, other=0.0))
        else:
            turns = turns_of(tl.full([1], 1.0, tl.float32) * angle)
        if not TOTAL:
            span = n.to(tl.float64) if REVERSE else n.to(tl.float64) * 0
            cos, sin = across(turns, span)
            state, sine = turned(state, sine, cos, sin)
    count = tl.cdiv(n, SEGMENT)
    for step in range(0, count):
        segment = step
        if REVERSE:
            segment = count - 1 - step
        at = parts_ptr + ((first + segment) * H + h) * size + x
        part = tl.load(at, mask=here, other=0.0)
        if TWO:
            part_sine = tl.load(at + D * E, mask=here, other=0.0)
        if not TOTAL:
            tl.store(at, state, mask=here)
            if TWO:
                tl.store(at + D * E, sine, mask=here)
        if DECAY > 0:
            if DECAY == 1:
                whole = power(g2, tl.minimum(n - segment * SEGMENT, SEGMENT))
            else:
                whole = tl.exp(tl.load(g_ptr + (first + segment) * H + h))
            state = kept(state, whole)
            if TWO:
                sine = kept(sine, whole)
        state += part
        if TWO:
            sine += part_sine
    if TWO and not TOTAL:
        span = n.to(tl.float64) * 0 if REVERSE else n.to(tl.float64)
        cos, sin = across(turns, span)
        state, sine = turned(state, sine, cos, sin)
    tl.store(final_ptr + own, state, mask=here & (has_final != 0))
    if TWO:
        tl.store(final_ptr + own + D * E, sine, mask=here & (has_final != 0))
    if COUNTS:
        real = (slot >= 0) & (slot < pool) & (h == 0) & (pid % tiles == 0)
        seen = tl.load(length_ptr + slot, mask=real, other=0)
        tl.store(length_ptr + slot, seen + n, mask=real)


@triton.jit(do_not_specialize=["rows", "N", "H"])
def denominator_gradient(
    den_ptr,  # [rows] float32
    o_ptr, o_b, o_n, o_h, o_e,  # [B N H E]
    do_ptr, do_b, do_n, do_h, do_e,  # [B N H E]
    num_ptr,  # [B N H E]: do / den
    out_ptr,  # [B H N] float32: -(do . o) / den, 0 where the clamp acts
    rows, N, H, E, eps,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of numerator and denominator from that of their quotient; a row is one of [B N H]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    here = i < rows
    h, n, b = i % H, (i // H) % N, i // H // N
    inside = here[:, None] & (e[None, :] < E)
    o_at = (b * o_b + n * o_n + h * o_h)[:, None] + e[None, :].to(tl.int64) * o_e
    do_at = (b * do_b + n * do_n + h * do_h)[:, None] + e[None, :].to(tl.int64) * do_e
    o = tl.load(o_ptr + o_at, mask=inside, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + do_at, mask=inside, other=0.0).to(tl.float32)
    den = tl.load(den_ptr + i, mask=here, other=1.0)
    z = tl.where(den <= eps, eps, den)
    num = do / z[:, None]
    tl.store(num_ptr + i[:, None] * E + e[None, :], num.to(num_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + (b * H + h) * N + n, tl.where(den <= eps, 0.0, -tl.sum(num * o, 1)), mask=here)


@triton.jit(do_not_specialize=["has_end", "B", "S", "N", "H"])
def suffix_sums(
    plus_ptr, minus_ptr,  # [slices B N H] float32: phi(q) . dq and phi(k) . dk of each token
    end_ptr, has_end,  # [S H] float32: what the final state adds
    g_ptr, g_b, g_n, g_h,  # log decay [H] or [B N H]
    out_ptr,  # [B N H] float32
    borders_ptr, B, S, N, H,
    PLUS: tl.constexpr, MINUS: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    """The gradient of each token's log decay: sums over everything that passes it; one program a head."""
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    s = (pid // H).to(tl.int64)
    row, _, _, begin, n, _ = sequence_of(s, borders_ptr, S, N, N, 1, N, BORDERS, False)
    r = tl.arange(0, BLOCK)
    carry = tl.load(end_ptr + s * H + h, mask=has_end != 0, other=0.0).to(tl.float64)
    count = tl.cdiv(n, BLOCK)
    for step in range(0, count):
        at_n = (count - 1 - step) * BLOCK + r
        here = at_n < n
        line = (row * N + begin + at_n) * H + h
        x = tl.zeros([BLOCK], tl.float64)
        for part in tl.static_range(PLUS):
            x += tl.load(plus_ptr + (h * 0 + part) * B * N * H + line, mask=here, other=0.0).to(tl.float64)
        for part in tl.static_range(MINUS):
            x -= tl.load(minus_ptr + (h * 0 + part) * B * N * H + line, mask=here, other=0.0).to(tl.float64)
        suffix = carry + tl.cumsum(x, 0, reverse=True)
        carry += tl.sum(x, 0)
        g_at = g_ptr + h * g_h + r * 0
        if DECAY == 2:
            g_at = g_ptr + row * g_b + (begin + at_n) * g_n + h * g_h
        g = tl.load(g_at, mask=here, other=0.0)
        # where the factor is 0, so is its derivative
        tl.store(
            out_ptr + line, tl.where(tl.exp(g.to(tl.float32)) > 0, suffix, 0.0).to(tl.float32), mask=here
        )


@triton.jit(do_not_specialize=["has_start", "has_end", "S", "N", "H", "D", "E", "segments", "SEGMENT"])
def crossing(
    early_ptr,  # [units H F E] float32: the state before each segment
    late_ptr,  # [units H F E] float32: the adjoint after each segment
    start_ptr, dstart_ptr, has_start,  # [S H F E]: the state before the sequence, and its gradient
    end_ptr, dend_ptr, has_end,  # and after it
    out_ptr,  # [S H D] float32
    borders_ptr, S, N, H, D, E, segments, SEGMENT, centre,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    """What angles turn across borders of segments: distances between their centres times the torque there."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(D, BLOCK_D)
    d = (pid % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    h = ((pid // tiles) % H).to(tl.int64)
    s = (pid // tiles // H).to(tl.int64)
    _, _, _, begin, n, _ = sequence_of(s, borders_ptr, S, N, N, segments, SEGMENT, BORDERS, False)
    first = s * segments
    if BORDERS == 2:
        first = begin // SEGMENT + s
    e = tl.arange(0, BLOCK_E)
    here = (d[:, None] < D) & (e[None, :] < E)
    at = d[:, None] * E + e[None, :]
    size = 2 * D * E
    total = tl.zeros([BLOCK_D], tl.float64)
    count = tl.cdiv(n, SEGMENT)
    for segment in range(1, count):
        x = early_ptr + ((first + segment) * H + h) * size + at
        y = late_ptr + ((first + segment - 1) * H + h) * size + at
        c, c_sin = tl.load(x, mask=here, other=0.0), tl.load(x + D * E, mask=here, other=0.0)
        g, g_sin = tl.load(y, mask=here, other=0.0), tl.load(y + D * E, mask=here, other=0.0)
        total += tl.sum(g_sin * c - g * c_sin, 1).to(tl.float64) * SEGMENT
    own = (s * H + h) * size + at
    some = here & (has_start != 0)
    c, c_sin = (
        tl.load(start_ptr + own, mask=some, other=0.0),
        tl.load(start_ptr + own + D * E, mask=some, other=0.0),
    )
    g, g_sin = (
        tl.load(dstart_ptr + own, mask=some, other=0.0),
        tl.load(dstart_ptr + own + D * E, mask=some, other=0.0),
    )
    to_start = tl.where(count > 0, centre + 1.0, 0.0)
    total += tl.sum(g * c_sin - g_sin * c, 1).to(tl.float64) * to_start
    some = here & (has_end != 0)
    c, c_sin = (
        tl.load(end_ptr + own, mask=some, other=0.0),
        tl.load(end_ptr + own + D * E, mask=some, other=0.0),
    )
    g, g_sin = (
        tl.load(dend_ptr + own, mask=some, other=0.0),
        tl.load(dend_ptr + own + D * E, mask=some, other=0.0),
    )
    to_end = tl.where(count > 0, n - 1 - (count - 1) * SEGMENT - centre, 0.0)
    total += tl.sum(g * c_sin - g_sin * c, 1).to(tl.float64) * to_end
    tl.store(out_ptr + (s * H + h) * D + d, -total.to(tl.float32), mask=d < D)
