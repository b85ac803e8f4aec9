"""The one product behind every pass: out_i = sum_j (x_i . y_j) L_ij w_j, over a state.

    forward   x = phi(q)   y = phi(k)   w = v
    dq        x = do       y = v        w = phi(k)
    dk        x = v        y = do       w = phi(q)    REVERSE
    dv        x = phi(k)   y = phi(q)   w = do        REVERSE

Two ways to hold it, for the same numbers: with ACROSS the state, the pairs and the output are kept transposed
([e d], [j i], [e i]), and a wide state enters matrix products from registers; without, factors of tokens lie
along rows, of which a thread has few.
Letters: i rows of x and out, j rows of y and w (both C a block), d features that are contracted, e features
of w (a slice). A trailing [i e] is the shape of the block on that line, without ACROSS.
"""

import triton
import triton.language as tl

from linattn.backends.triton.overlap import entered, left
from linattn.backends.triton.pieces import (
    at_end,
    begun,
    column_of,
    cos_sin,
    decays,
    dot,
    feature_slope,
    fixed,
    gathered,
    kept,
    mapped,
    moved,
    of_i,
    opaque,
    operand,
    other_end,
    phases,
    sequence_of,
    tile,
    turns_of,
    upright,
)

# Sizes that the compiled code does not depend on; strides are left to it, for the width of loads.
SIZES = ["extra_n", "has_start", "has_final", "pool", "B", "S", "N", "M", "H", "segments", "SEGMENT"]


@triton.jit(do_not_specialize=[*SIZES, "all_parts"])
def product(
    x_ptr, x_b, x_n, x_h, x_d,  # [B N H D]
    y_ptr, y_b, y_n, y_h, y_d,  # [B M H D]
    w_ptr, w_b, w_n, w_h, w_d,  # [B M H E]
    raw_ptr, raw_b, raw_n, raw_h, raw_d,  # [B N H E]: q or k before the feature map; only if GRADIENT
    out_ptr, out_b, out_n, out_h, out_d,  # [B N H E]
    g_ptr, g_b, g_n, g_h,  # log decay [H] or [B N H]
    theta_ptr, angle,  # [H, features] with ANGLES 2; one angle for all with ANGLES 1
    mask_ptr, mask_b, mask_n,  # [B, keys] bool, with MASK
    extra_ptr, extra_n,  # [B H extra_n] float32: the gradient of the denominator, with EXTRA
    start_ptr, start_z_ptr, has_start,  # states before: [.. H F E], [.. H F] float32
    final_ptr, final_z_ptr, has_final,  # and after
    slots_ptr, length_ptr, pool,  # [S]: rows of both; [pool] int64: what they have seen; with SLOTS
    rows_ptr,  # float32 [slices B N H]: phi(raw) * gradient with ROWS; [B N H]: denominators; else [units H]
    turn_ptr,  # [units H E] float32: the gradient of angles inside segments, with TURN
    borders_ptr, B, S, N, M, H, segments, SEGMENT, all_parts, centre, scale, eps,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, FEATURE: tl.constexpr, ANGLES: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, GRADIENT: tl.constexpr,
    NORMALIZE: tl.constexpr, EXTRA: tl.constexpr, MASK: tl.constexpr, BORDERS: tl.constexpr,
    SPLIT: tl.constexpr, TOTAL: tl.constexpr, OUTPUT: tl.constexpr, RAW: tl.constexpr, ROWS: tl.constexpr,
    TURN: tl.constexpr, SLOTS: tl.constexpr, FOLD: tl.constexpr, STAGES: tl.constexpr, ACROSS: tl.constexpr,
    STATES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: a slice of w's features, one head, one sequence or a segment of it.

    D contracted features, E of w and out. FEATURE maps x and y, or w if GRADIENT. ANGLES: 0 none, 1 one for
    all, 2 per feature. DECAY: 0 none, 1 per head, 2 per token. STRICT: i is not its own j. NORMALIZE divides
    by the sum of weights. EXTRA: one more contracted feature, `extra` on x's side (1) or y's (2), ones on the
    other. MASK: 1 hides keys among y and w, 2 among x and out. BORDERS: `sequence_of`. SPLIT: segments, each
    from a state of its own. TOTAL: every x reads one whole state. OUTPUT=False: states only. RAW: sums not
    divided, in float32, 2 adds them to what is there. ROWS with NORMALIZE keeps denominators. SLOTS: states
    are rows of a pool, in place. FOLD: `start` holds what segments add. STATES=False: none. OVERLAP: `left`.
    """
    INNER: tl.constexpr = ANGLES == 1 or (ANGLES == 2 and not GRADIENT)  # angles turn x and y
    OUTER: tl.constexpr = ANGLES == 2 and GRADIENT  # angles turn w and out
    TWO: tl.constexpr = ANGLES > 0
    SUM_D: tl.constexpr = (not GRADIENT) and (NORMALIZE or EXTRA > 0)  # a state z beside the other, along d
    SUM_E: tl.constexpr = GRADIENT and EXTRA > 0  # or along e
    SUM: tl.constexpr = SUM_D or SUM_E
    FIRST: tl.constexpr = OUTER == ACROSS  # angles lie along the state's first axis
    LATE: tl.constexpr = SUM_D and RAW == 0  # the scale comes with the division
    Z: tl.constexpr = E if GRADIENT else D
    HALF: tl.constexpr = D * E
    PARTS: tl.constexpr = 2 if TWO else 1  # cosine and sine
    XY: tl.constexpr = "none" if GRADIENT else FEATURE
    VALUE: tl.constexpr = FEATURE if GRADIENT else "none"
    NEEDS_RAW: tl.constexpr = GRADIENT and (FEATURE != "none" or ROWS or TURN)
    NEEDS_EXTRA: tl.constexpr = EXTRA == 1 or (EXTRA == 2 and not TOTAL)
    FAST: tl.constexpr = tl.float32 != OPERAND
    EARLY: tl.constexpr = ANGLES == 2 and INNER and OUTPUT and not TOTAL  # the state goes on before o ends
    SLICES: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E

    entered(OVERLAP)
    pid = tl.program_id(0)
    part = pid % SLICES
    h = ((pid // SLICES) % H).to(tl.int64)
    unit = (pid // SLICES // H).to(tl.int64)
    row, s, segment, begin, n, m = sequence_of(unit, borders_ptr, S, N, M, segments, SEGMENT, BORDERS, SPLIT)
    from_unit, to_unit = unit if SPLIT and not TOTAL else s, unit
    if SLOTS:
        slot = tl.load(slots_ptr + s).to(tl.int64)
        real = (slot >= 0) & (slot < pool)  # any other row is padding: no tokens, no state
        n, m = tl.where(real, n, 0), tl.where(real, m, 0)
        if not SPLIT:
            has_start = tl.where(real, has_start, 0)
            has_final = tl.where(real, has_final, 0)
            from_unit, to_unit = slot, slot
    longest = n if TOTAL else tl.maximum(n, m)
    low, high = segment * SEGMENT, longest
    if SPLIT:
        high = tl.minimum(low + SEGMENT, longest)
        if not OUTPUT:  # nobody reads what the last segment on the way adds, unless a final state is wanted
            end = segment * 0 if REVERSE else (longest - 1) // SEGMENT
            high = tl.where((segment == end) & (all_parts == 0), low, high)
    low, high = low.to(tl.int32), high.to(tl.int32)
    count = tl.cdiv(high - low, C)

    r = tl.arange(0, C)
    d = tl.arange(0, BLOCK_D)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    x_ptr += row * x_b + begin * x_n + h * x_h
    y_ptr += row * y_b + begin * y_n + h * y_h
    w_ptr += row * w_b + begin * w_n + h * w_h
    raw_ptr += row * raw_b + begin * raw_n + h * raw_h
    out_ptr += row * out_b + begin * out_n + h * out_h
    line = (row * N + begin) * H + h  # of arrays [B N H]
    extra_ptr += (row * H + h) * extra_n + begin
    mask_ptr += row * mask_b + begin * mask_n
    g2 = 0.0
    if DECAY == 1:
        g2 = tl.load(g_ptr + h * g_h).to(tl.float32) * 1.4426950408889634
    if DECAY == 2:
        g_ptr += row * g_b + begin * g_n + h * g_h

    # angles in turns: of the contracted features (INNER) or of w's (OUTER)
    if OUTER:
        turns = turns_of(tl.load(theta_ptr + h * E + e, mask=e < E, other=0.0))
    elif ANGLES == 2:
        turns = turns_of(tl.load(theta_ptr + h * D + d, mask=d < D, other=0.0))
    elif TWO:
        turns = turns_of(tl.full([1], 1.0, tl.float32) * angle)
    if TWO:
        turn_step = fixed(turns)

    # the state, [d e], seen from before the sequence's first token; with angles its cosine and sine parts
    d_s, e_s = of_i(d, ACROSS), of_i(e, not ACROSS)
    in_state = (d_s < D) & (e_s < E)
    at = e_s * D + d_s if GRADIENT else d_s * E + e_s
    from_state = start_ptr + (from_unit * H + h) * (HALF * PARTS) + at
    state = begun(from_state, in_state, has_start, STATES)
    sine = begun(from_state + HALF, in_state, has_start, STATES) if TWO else state
    if SUM:
        of_z = e if GRADIENT else d
        from_z = start_z_ptr + (from_unit * H + h) * (Z * PARTS)
        z0 = begun(from_z + of_z, of_z < Z, has_start, STATES)
        z1 = begun(from_z + Z + of_z, of_z < Z, has_start, STATES) if TWO else z0
    if FOLD:  # then there is no state before the sequence
        parts = start_ptr + h * (HALF * PARTS) + at
        state, sine = gathered(state, sine, parts, HALF, H * HALF * PARTS, in_state, unit, segment, SEGMENT,
                               longest, g2, TWO, DECAY, REVERSE)  # fmt: skip
        if SUM:
            parts = start_z_ptr + h * (Z * PARTS) + of_z
            z0, z1 = gathered(z0, z1, parts, Z, H * Z * PARTS, of_z < Z, unit, segment, SEGMENT, longest, g2,
                              TWO, DECAY, REVERSE)  # fmt: skip
    if STATES and TWO and not SPLIT and not TOTAL:
        turns_s = of_i(turns, not FIRST)
        if has_start != 0:  # from its own frame to that of the sequence's beginning
            state, sine = other_end(state, sine, turns_s, n, REVERSE)
            if SUM:
                z0, z1 = other_end(z0, z1, turns, n, REVERSE)
    # z as an operand of matrix products: 16 equal rows, or columns of which one (two with INNER) count
    column = tl.arange(0, 16)
    if SUM_D:
        z = z0[None, :] + tl.zeros([16, BLOCK_D], tl.float32)
        if INNER:
            z_sine = z1[None, :] + tl.zeros([16, BLOCK_D], tl.float32)
    if SUM_E:
        z = tl.where(column[None, :] == 0, z0[:, None], 0.0)
        if OUTER:
            z_sine = tl.where(column[None, :] == 0, z1[:, None], 0.0)
        elif INNER:
            z += tl.where(column[None, :] == 1, z1[:, None], 0.0)
    turn = tl.zeros([BLOCK_E], tl.float32)
    log_decay = low.to(tl.float32) * 0  # of the whole segment
    if NEEDS_EXTRA:  # read one block ahead of its use
        last = tl.minimum(high, n if EXTRA == 1 else m)
        ahead = (low + (count - 1) * C if REVERSE else low) + r
        extra_next = tl.load(extra_ptr + ahead, mask=(ahead >= low) & (ahead < last), other=0.0)
    early = 1.0 if LATE else scale

    for step in tl.range(0, count, num_stages=STAGES):
        t = low + step * C
        if REVERSE:
            t = low + (count - 1 - step) * C
        t = opaque(t) if ANGLES == 2 and FAST else t
        at_n = t + r
        in_x = at_n < tl.minimum(high, n)
        in_y = at_n < tl.minimum(high, m)
        if MASK == 1:
            in_y = in_y & (tl.load(mask_ptr + at_n.to(tl.int64) * mask_n, mask=in_y, other=0) != 0)
        if MASK == 2:
            in_x = in_x & (tl.load(mask_ptr + at_n.to(tl.int64) * mask_n, mask=in_x, other=0) != 0)
        if NEEDS_EXTRA:
            extra = extra_next
            ahead = at_n - C if REVERSE else at_n + C
            extra_next = tl.load(extra_ptr + ahead, mask=(ahead >= low) & (ahead < last), other=0.0)
        pairs, near, far, whole, log_whole = decays(g_ptr, g2, g_n, t, high - t, r, at_n < high, C, DECAY,
                                                  REVERSE, STRICT, OUTPUT and not TOTAL, ACROSS)  # fmt: skip
        if TWO:
            cos, sin = cos_sin(phases(turn_step, (t + 1).to(tl.int64), r), FAST)  # [n d], [n e] or [n 1]

        # y and w: what is added to the state
        if not TOTAL:
            inside = in_y[:, None] if E % BLOCK_E == 0 else in_y[:, None] & (e[None, :] < E)
            w = tile(w_ptr, at_n, e, w_n, w_d, inside)  # [j e]
            w = mapped(w, inside, VALUE, FAST)
            if EARLY:
                w_far = at_end(w, far, DECAY, OPERAND, PRECISION, ACROSS)
            inside = in_y[:, None] if D == BLOCK_D else in_y[:, None] & (d[None, :] < D)
            y = tile(y_ptr, at_n, d, y_n, y_d, inside)  # [j d]
            y = mapped(y, inside, XY, FAST)
            if INNER:
                y_sin = operand(y * sin, OPERAND, PRECISION)
                y = y * cos
            y = operand(y, OPERAND, PRECISION)
            if OUTER:
                w_sin = w * sin
                w = w * cos
            if SUM:
                y_extra = extra if EXTRA == 2 else tl.full([C], 1.0, tl.float32)
            if SUM_E:
                y_more = tl.where(column[None, :] == 0, y_extra[:, None], 0.0)
                if INNER:
                    y_more = y_more * cos + tl.where(column[None, :] == 1, y_extra[:, None] * sin, 0.0)
                y_more = operand(y_more, OPERAND, PRECISION)  # [j 16]

        if OUTPUT:
            inside = in_x[:, None] if D == BLOCK_D else in_x[:, None] & (d[None, :] < D)
            x = tile(x_ptr, at_n, d, x_n, x_d, inside)  # [i d]
            x = mapped(x, inside, XY, FAST)
            if INNER:
                x_sin = operand(x * sin, OPERAND, PRECISION)
                x = x * cos
            x = operand(x, OPERAND, PRECISION)

            # from the state [i e]
            o = dot(x, upright(operand(state, OPERAND, PRECISION), ACROSS), None, PRECISION, ACROSS)
            if INNER:
                o = dot(x_sin, upright(operand(sine, OPERAND, PRECISION), ACROSS), o, PRECISION, ACROSS)
            elif TWO:
                o_sin = dot(x, upright(operand(sine, OPERAND, PRECISION), ACROSS), None, PRECISION, ACROSS)
            if SUM_D:
                den = dot(operand(z, OPERAND, PRECISION), tl.trans(x), None, PRECISION, False)  # [16 i]
                if INNER:
                    den = dot(operand(z_sine, OPERAND, PRECISION), tl.trans(x_sin), den, PRECISION, False)
            if SUM_E:
                x_extra = extra if EXTRA == 1 else tl.full([C], 1.0, tl.float32)
                x_more = tl.where(column[:, None] == 0, x_extra[None, :], 0.0)
                if INNER:
                    x_more = x_more * tl.trans(cos)
                    x_more += tl.where(column[:, None] == 1, x_extra[None, :] * tl.trans(sin), 0.0)
                x_more = operand(x_more, OPERAND, PRECISION)  # [16 i]
                o = dot(operand(z, OPERAND, PRECISION), x_more, o, PRECISION, False)
                if OUTER:
                    o_sin = dot(operand(z_sine, OPERAND, PRECISION), x_more, o_sin, PRECISION, False)
            if DECAY > 0:
                near *= early
                o = kept(o, of_i(near, ACROSS))
                if OUTER:
                    o_sin = kept(o_sin, of_i(near, ACROSS))
                if SUM_D:
                    den = kept(den, near[None, :])
            elif not LATE:
                o *= early
                if OUTER:
                    o_sin *= early
                if SUM_D:
                    den *= early

            # from the block itself: pairs [i j]
            if not TOTAL:
                p = dot(x, tl.trans(y), None, PRECISION, ACROSS)
                if INNER:
                    p = dot(x_sin, tl.trans(y_sin), p, PRECISION, ACROSS)
                if SUM_E:
                    p = dot(tl.trans(x_more), tl.trans(y_more), p, PRECISION, ACROSS)
                if EARLY:
                    state = moved(state, y, w_far, whole, DECAY, True, FAST, PRECISION, ACROSS)
                    sine = moved(sine, y_sin, w_far, whole, DECAY, True, FAST, PRECISION, ACROSS)
                p = upright(operand(p * (pairs * early), OPERAND, PRECISION), ACROSS)
                if SUM_D:
                    den = dot(tl.full([16, C], 1.0, OPERAND), tl.trans(p), den, PRECISION, False)
                o = dot(p, operand(w, OPERAND, PRECISION), o, PRECISION, ACROSS)
                if OUTER:
                    o_sin = dot(p, operand(w_sin, OPERAND, PRECISION), o_sin, PRECISION, ACROSS)

            if SUM_D:
                total = tl.sum(den, 0) * 0.0625  # [i]; 16 equal rows
            if LATE:
                total *= scale
                if ROWS:
                    tl.store(rows_ptr + line + at_n.to(tl.int64) * H, total, mask=in_x & (part == 0))
                o *= of_i(scale / tl.where(total <= eps, eps, total), ACROSS)
            o = upright(o, ACROSS)
            if OUTER:
                o_sin = upright(o_sin, ACROSS)
            inside = in_x[:, None] if E % BLOCK_E == 0 else in_x[:, None] & (e[None, :] < E)
            if OUTER:
                torque = o_sin * cos - o * sin
                o = o * cos + o_sin * sin
            if NEEDS_RAW:
                raw = tile(raw_ptr, at_n, e, raw_n, raw_d, inside)
                if ROWS or TURN:
                    mapped_raw = mapped(raw, inside, FEATURE, FAST).to(tl.float32)
                if ROWS:
                    total = tl.sum(tl.where(inside, mapped_raw * o, 0.0), 1)
                    rows_at = rows_ptr + part.to(tl.int64) * B * N * H + line + at_n.to(tl.int64) * H
                    tl.store(rows_at, total, mask=at_n < tl.minimum(high, n))
                if TURN:
                    place = (at_n - (0 if TOTAL else low)).to(tl.float32) - centre
                    turn += tl.sum(tl.where(inside, place[:, None] * mapped_raw * torque, 0.0), 0)
                o = feature_slope(o, raw.to(tl.float32), FEATURE)
            if MASK == 2:
                o = tl.where(in_x[:, None], o, 0.0)
                inside = (at_n < tl.minimum(high, n))[:, None] & (e[None, :] < E)
            if SUM_D and RAW > 0:
                rows_at = rows_ptr + line + at_n.to(tl.int64) * H
                if RAW == 2:
                    total += tl.load(rows_at, mask=in_x, other=0.0)
                tl.store(rows_at, total, mask=in_x & (part == 0))
            out_at = out_ptr + at_n[:, None].to(tl.int64) * out_n + e[None, :].to(tl.int64) * out_d
            if RAW == 2:
                o += tl.load(out_at, mask=inside, other=0.0)
            tl.store(out_at, o.to(out_ptr.dtype.element_ty), mask=inside)

        if not TOTAL:
            if DECAY == 2 and not OUTPUT:
                log_decay += log_whole
            if SUM and DECAY > 0:
                z = kept(z, whole)
                if (SUM_D and TWO) or OUTER:
                    z_sine = kept(z_sine, whole)
                if SUM_D:
                    y_extra = y_extra * far
            if not EARLY:
                w_far = at_end(w, far, DECAY, OPERAND, PRECISION, ACROSS)
                state = moved(state, y, w_far, whole, DECAY, False, FAST, PRECISION, ACROSS)
                if INNER:
                    sine = moved(sine, y_sin, w_far, whole, DECAY, False, FAST, PRECISION, ACROSS)
            if OUTER:
                w_sin = at_end(w_sin, far, DECAY, OPERAND, PRECISION, ACROSS)
                sine = moved(sine, y, w_sin, whole, DECAY, False, FAST, PRECISION, ACROSS)
            if SUM_D:
                ones = operand(y_extra[None, :] + tl.zeros([16, C], tl.float32), OPERAND, PRECISION)
                z = dot(ones, y, z, PRECISION, False)
                if INNER:
                    z_sine = dot(ones, y_sin, z_sine, PRECISION, False)
            if SUM_E:
                z = dot(upright(w_far, not ACROSS), y_more, z, PRECISION, False)
                if OUTER:
                    z_sine = dot(upright(w_sin, not ACROSS), y_more, z_sine, PRECISION, False)

    if DECAY == 2 and not OUTPUT:
        tl.store(rows_ptr + unit * H + h, log_decay, mask=part == 0)
    if TURN:
        tl.store(turn_ptr + (unit * H + h) * E + e, turn, mask=e < E)
    if STATES and has_final != 0:
        if SUM_D:
            z0 = tl.sum(z, 0) * 0.0625
            z1 = tl.sum(z_sine, 0) * 0.0625 if TWO else z0
        if SUM_E:
            z0 = column_of(z, 0)
            z1 = column_of(z_sine, 0) if OUTER else column_of(z, 1)
        if TWO and not SPLIT:
            state, sine = other_end(state, sine, of_i(turns, not FIRST), n, not REVERSE)
            if SUM:
                z0, z1 = other_end(z0, z1, turns, n, not REVERSE)
        to_state = final_ptr + (to_unit * H + h) * (HALF * PARTS) + at
        tl.store(to_state, state, mask=in_state)
        if TWO:
            tl.store(to_state + HALF, sine, mask=in_state)
        if SUM:
            to_z = final_z_ptr + (to_unit * H + h) * (Z * PARTS) + of_z
            once = (of_z < Z) & (GRADIENT | (part == 0))
            tl.store(to_z, z0, mask=once)
            if TWO:
                tl.store(to_z + Z, z1, mask=once)
        if SLOTS and not SPLIT:
            once = (h == 0) & (part == 0)
            seen = tl.load(length_ptr + slot, mask=once, other=0)
            tl.store(length_ptr + slot, seen + n, mask=once)
    left(OVERLAP)
