"""The one product behind every pass: out_i = sum_j (x_i . y_j) L_ij w_j, over a state.

    forward   x = phi(q)   y = phi(k)   w = v
    dq        x = do       y = v        w = phi(k)
    dk        x = v        y = do       w = phi(q)    REVERSE
    dv        x = phi(k)   y = phi(q)   w = do        REVERSE

Everything is kept transposed, [value token] and [value feature]: the state then enters a matrix product from
registers, and x, y and w as they lie in memory.
Letters: i rows of x and out, j rows of y and w (both C a block), d features that are contracted, e features
of w (a slice). A trailing [e i] is the shape of the block on that line. Flags are listed at `product`.
"""

import triton
import triton.language as tl

from linattn.backends.triton.pieces import (
    across,
    between,
    columns,
    cos_sin,
    decays,
    dot,
    feature_slope,
    fixed,
    kept,
    mapped,
    operand,
    phases,
    sequence_of,
    start_of,
    tile,
    turned,
    turns_of,
)

# Sizes that the compiled code does not depend on; strides are left to it, for the width of loads.
SIZES = ["extra_n", "has_start", "has_final", "B", "S", "N", "M", "H", "segments", "SEGMENT", "all_parts"]


@triton.jit(do_not_specialize=SIZES)
def product(
    x_ptr, x_b, x_n, x_h, x_d,  # [B N H D]
    y_ptr, y_b, y_n, y_h, y_d,  # [B M H D]
    w_ptr, w_b, w_n, w_h, w_d,  # [B M H E]
    raw_ptr, raw_b, raw_n, raw_h, raw_d,  # [B N H E]: q or k before the feature map; only if GRADIENT
    out_ptr, out_b, out_n, out_h, out_d,  # [B N H E]
    g_ptr, g_b, g_n, g_h,  # log decay [H] or [B N H]
    theta_ptr, angle,  # [H, features] with ANGLES 2; one angle for all with ANGLES 1
    mask_ptr, mask_b, mask_n,  # [B, keys] bool, with MASK
    extra_ptr, extra_n,  # [B extra_n H] float32: the gradient of the denominator, with EXTRA
    start_ptr, start_z_ptr, has_start,  # states before: [.. H F E], [.. H F] float32
    final_ptr, final_z_ptr, has_final,  # and after
    rows_ptr,  # [slices B N H] float32: phi(raw) * gradient with ROWS, denominators with RAW; else [units H]
    turn_ptr,  # [units H E] float32: the gradient of angles inside segments, with TURN
    borders_ptr, B, S, N, M, H, segments, SEGMENT, all_parts, centre, scale, eps,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, FEATURE: tl.constexpr, ANGLES: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, GRADIENT: tl.constexpr,
    NORMALIZE: tl.constexpr, EXTRA: tl.constexpr, MASK: tl.constexpr, BORDERS: tl.constexpr,
    SPLIT: tl.constexpr, TOTAL: tl.constexpr, OUTPUT: tl.constexpr, RAW: tl.constexpr, ROWS: tl.constexpr,
    TURN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a slice of w's features, one head, one sequence or a segment of it.

    D contracted features, E of w and out. FEATURE maps x and y, or w if GRADIENT. ANGLES: 0 none, 1 one for
    all, 2 per feature. DECAY: 0 none, 1 per head, 2 per token. STRICT: i is not its own j. NORMALIZE divides
    by the sum of weights. EXTRA: one more contracted feature, `extra` on x's side (1) or y's (2), ones on the
    other. MASK: 1 hides keys among y and w, 2 among x and out. BORDERS: see `sequence_of`. SPLIT: segments,
    each from a state of its own. TOTAL: every x reads one whole state. OUTPUT=False: states only. RAW: sums
    undivided in float32, 2 adds them to those that are there.
    """
    ROW: tl.constexpr = ANGLES == 1  # one angle for all: a complex decay, factors of whole tokens
    INNER: tl.constexpr = ANGLES == 2 and not GRADIENT  # angles turn x and y
    OUTER: tl.constexpr = ANGLES == 2 and GRADIENT  # angles turn w and out
    TWO: tl.constexpr = ANGLES > 0
    SUM_D: tl.constexpr = (not GRADIENT) and (NORMALIZE or EXTRA > 0)  # z lies along d
    SUM_E: tl.constexpr = GRADIENT and EXTRA > 0  # z lies along e
    XY: tl.constexpr = "none" if GRADIENT else FEATURE
    VALUE: tl.constexpr = FEATURE if GRADIENT else "none"
    FAST: tl.constexpr = tl.float32 != OPERAND
    SLICES: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    WHOLE_E: tl.constexpr = E % BLOCK_E == 0

    pid = tl.program_id(0)
    part = pid % SLICES
    h = ((pid // SLICES) % H).to(tl.int64)
    unit = (pid // SLICES // H).to(tl.int64)
    row, s, segment, begin, n, m = sequence_of(unit, borders_ptr, S, N, M, segments, SEGMENT, BORDERS, SPLIT)
    longest = n if TOTAL else tl.maximum(n, m)
    low = segment * SEGMENT
    high = longest
    if SPLIT:
        high = tl.minimum(low + SEGMENT, longest)
        if not OUTPUT:  # nobody reads what the last segment on the way adds, unless a final state is wanted
            last = segment * 0 if REVERSE else (longest - 1) // SEGMENT
            high = tl.where((segment == last) & (all_parts == 0), low, high)
    low = low.to(tl.int32)
    high = high.to(tl.int32)

    r = tl.arange(0, C)
    d = tl.arange(0, BLOCK_D)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    x_ptr += row * x_b + begin * x_n + h * x_h
    y_ptr += row * y_b + begin * y_n + h * y_h
    w_ptr += row * w_b + begin * w_n + h * w_h
    raw_ptr += row * raw_b + begin * raw_n + h * raw_h
    out_ptr += row * out_b + begin * out_n + h * out_h
    line = (row * N + begin) * H + h  # of arrays [B N H]
    extra_ptr += (row * extra_n + begin) * H + h
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
    elif ANGLES == 1:
        turns = turns_of(tl.full([1], 1.0, tl.float32) * angle)

    if TWO:
        turn_step = fixed(turns)

    # the state, [e d], seen from before the sequence's first token; with angles its cosine and sine parts
    half: tl.constexpr = D * E
    in_state = (e[:, None] < E) & (d[None, :] < D)
    at = e[:, None] * D + d[None, :] if GRADIENT else d[None, :] * E + e[:, None]
    from_unit = unit if SPLIT and not TOTAL else s
    from_state = start_ptr + (from_unit * H + h) * (half * (2 if TWO else 1)) + at
    some = in_state & (has_start != 0)
    state = tl.load(from_state, mask=some, other=0.0).to(tl.float32)
    if TWO:
        sine = tl.load(from_state + half, mask=some, other=0.0).to(tl.float32)
    if SUM_D:
        z = start_of(start_z_ptr + (from_unit * H + h) * (D * (2 if TWO else 1)), d, D, has_start)[None, :]
        if TWO:
            z_sine = start_of(start_z_ptr + (from_unit * H + h) * (D * 2) + D, d, D, has_start)[None, :]
    if SUM_E:
        z = start_of(start_z_ptr + (from_unit * H + h) * (E * (2 if TWO else 1)), e, E, has_start)[:, None]
        if TWO:
            z_sine = start_of(start_z_ptr + (from_unit * H + h) * (E * 2) + E, e, E, has_start)[:, None]
    if TWO and not SPLIT and not TOTAL:
        # the frame of the sequence's beginning: a state before it turns its sine round, one after it by n
        if REVERSE:
            if has_start != 0:
                cos_to, sin_to = across(turns, n.to(tl.float64))
                cos_s, sin_s = (
                    (cos_to[:, None], sin_to[:, None]) if OUTER else (cos_to[None, :], sin_to[None, :])
                )
                state, sine = turned(state, sine, cos_s, sin_s)
                if SUM_D or SUM_E:
                    z, z_sine = turned(z, z_sine, cos_s, sin_s)
        else:
            sine = -sine
            if SUM_D or SUM_E:
                z_sine = -z_sine
    # z as an operand of matrix products: of its 16 rows or columns the first counts, with ROW the second too
    column = tl.arange(0, 16)
    if SUM_D:
        z = tl.where(column[:, None] == 0, z, 0.0)
        if INNER:
            z_sine = tl.where(column[:, None] == 0, z_sine, 0.0)
        elif ROW:
            z += tl.where(column[:, None] == 1, z_sine, 0.0)
    if SUM_E:
        z = tl.where(column[None, :] == 0, z, 0.0)
        if OUTER:
            z_sine = tl.where(column[None, :] == 0, z_sine, 0.0)
        elif ROW:
            z += tl.where(column[None, :] == 1, z_sine, 0.0)
    if TURN:
        turn = tl.zeros([BLOCK_E], tl.float32)
    log_decay = low.to(tl.float32) * 0  # of the whole segment

    for step in tl.range(0, tl.cdiv(high - low, C), num_stages=STAGES):
        t = low + step * C
        if REVERSE:
            t = low + (tl.cdiv(high - low, C) - 1 - step) * C
        at_n = t + r
        in_x = at_n < tl.minimum(high, n)
        in_y = at_n < tl.minimum(high, m)
        if MASK == 1:
            in_y = in_y & (tl.load(mask_ptr + at_n.to(tl.int64) * mask_n, mask=in_y, other=0) != 0)
        if MASK == 2:
            in_x = in_x & (tl.load(mask_ptr + at_n.to(tl.int64) * mask_n, mask=in_x, other=0) != 0)
        pairs, near, far, whole, log_whole = decays(
            g_ptr, g2, g_n, t, high - t, r, at_n < high, C, DECAY, REVERSE, STRICT, OUTPUT and not TOTAL
        )
        if ROW:
            pairs *= between(turn_step, r, FAST)
            cos, sin = cos_sin(phases(turn_step, (t + 1).to(tl.int64), r).reshape([C]), FAST)  # [n]
        elif TWO:
            cos, sin = cos_sin(phases(turn_step, (t + 1).to(tl.int64), r), FAST)  # [n d] or [n e]

        # y and w: what is added to the state
        if not TOTAL:
            inside = in_y[:, None] if D == BLOCK_D else in_y[:, None] & (d[None, :] < D)
            y = mapped(tile(y_ptr, at_n, d, y_n, y_d, inside), inside, XY, FAST)  # [j d]
            inside = in_y[:, None] if WHOLE_E else in_y[:, None] & (e[None, :] < E)
            w = mapped(tile(w_ptr, at_n, e, w_n, w_d, inside), inside, VALUE, FAST)  # [j e]
            if INNER:
                y_sin = operand(y * sin, OPERAND, PRECISION)
                y = y * cos
            y = operand(y, OPERAND, PRECISION)
            if OUTER:
                w_sin = w * sin
                w = w * cos
            if EXTRA == 2:
                y_extra = tl.load(extra_ptr + at_n.to(tl.int64) * H, mask=in_y, other=0.0)
            elif SUM_D or SUM_E:
                y_extra = tl.where(in_y, 1.0, 0.0)

        if OUTPUT:
            inside = in_x[:, None] if D == BLOCK_D else in_x[:, None] & (d[None, :] < D)
            x = mapped(tile(x_ptr, at_n, d, x_n, x_d, inside), inside, XY, FAST)  # [i d]
            if INNER:
                x_sin = operand(x * sin, OPERAND, PRECISION)
                x = x * cos
            x = operand(x, OPERAND, PRECISION)
            if EXTRA == 1:
                x_extra = tl.load(extra_ptr + at_n.to(tl.int64) * H, mask=in_x, other=0.0)
            elif EXTRA == 2:
                x_extra = tl.full([C], 1.0, tl.float32)

            # from the state [e i]
            o = dot(operand(state, OPERAND, PRECISION), tl.trans(x), None, PRECISION)
            if INNER:
                o = dot(operand(sine, OPERAND, PRECISION), tl.trans(x_sin), o, PRECISION)
            if OUTER or ROW:
                o_sin = dot(operand(sine, OPERAND, PRECISION), tl.trans(x), None, PRECISION)
            if SUM_E:
                o += tl.sum(tl.where(column[None, :] == 0, z, 0.0), 1)[:, None] * x_extra[None, :]
                if OUTER:
                    o_sin += tl.sum(tl.where(column[None, :] == 0, z_sine, 0.0), 1)[:, None] * x_extra[None, :]
                if ROW:
                    o_sin += tl.sum(tl.where(column[None, :] == 1, z, 0.0), 1)[:, None] * x_extra[None, :]
            if ROW:
                o = o * (cos * scale)[None, :] + o_sin * (sin * scale)[None, :]
            elif DECAY == 0:
                o *= scale
                if OUTER:
                    o_sin *= scale
            if SUM_D:
                den = dot(operand(z, OPERAND, PRECISION), tl.trans(x), None, PRECISION)  # [16 i]
                if INNER:
                    den = dot(operand(z_sine, OPERAND, PRECISION), tl.trans(x_sin), den, PRECISION)
                if ROW:
                    den *= columns(cos * scale, sin * scale, column, True)
                elif DECAY == 0:
                    den *= scale
            if DECAY > 0:
                if not ROW:
                    near *= scale
                o = kept(o, near[None, :])
                if OUTER:
                    o_sin = kept(o_sin, near[None, :])
                if SUM_D:
                    den = kept(den, near[None, :])

            # from the block itself: pairs [j i]
            if not TOTAL:
                p = dot(y, tl.trans(x), None, PRECISION)
                if INNER:
                    p = dot(y_sin, tl.trans(x_sin), p, PRECISION)
                if EXTRA == 1 and GRADIENT:
                    p += x_extra[None, :]
                if EXTRA == 2 and GRADIENT:
                    p += y_extra[:, None]
                p = operand(p * (pairs * scale), OPERAND, PRECISION)
                o = dot(tl.trans(operand(w, OPERAND, PRECISION)), p, o, PRECISION)
                if OUTER:
                    o_sin = dot(tl.trans(operand(w_sin, OPERAND, PRECISION)), p, o_sin, PRECISION)
                if SUM_D:
                    first = tl.where(column[:, None] == 0, tl.full([16, C], 1.0, tl.float32), 0.0)
                    den = dot(first.to(OPERAND), p, den, PRECISION)

            o = tl.trans(o)  # [i e]
            inside = in_x[:, None] if WHOLE_E else in_x[:, None] & (e[None, :] < E)
            if OUTER:
                o_sin = tl.trans(o_sin)
                torque = o_sin * cos - o * sin
                o = o * cos + o_sin * sin
            if GRADIENT and (FEATURE != "none" or ROWS or TURN):
                raw = tile(raw_ptr, at_n, e, raw_n, raw_d, inside).to(tl.float32)
                mapped_raw = mapped(raw, inside, FEATURE, FAST)
                if ROWS:
                    total = tl.sum(tl.where(inside, mapped_raw * o, 0.0), 1)
                    rows_at = rows_ptr + part.to(tl.int64) * B * N * H + line + at_n.to(tl.int64) * H
                    tl.store(rows_at, total, mask=at_n < tl.minimum(high, n))
                if TURN:
                    place = (at_n - (0 if TOTAL else low)).to(tl.float32) - centre
                    turn += tl.sum(tl.where(inside, place[:, None] * mapped_raw * torque, 0.0), 0)
                o = o * feature_slope(raw, FEATURE)
            if MASK == 2:
                o = tl.where(in_x[:, None], o, 0.0)
                exists = (at_n < tl.minimum(high, n))[:, None]
                inside = exists if WHOLE_E else exists & (e[None, :] < E)
            if SUM_D:
                total = tl.sum(den, 0)  # [i]
                if RAW > 0:
                    rows_at = rows_ptr + line + at_n.to(tl.int64) * H
                    if RAW == 2:
                        total += tl.load(rows_at, mask=in_x, other=0.0)
                    tl.store(rows_at, total, mask=in_x & (part == 0))
                else:
                    o = o / tl.where(total <= eps, eps, total)[:, None]
            out_at = out_ptr + at_n[:, None].to(tl.int64) * out_n + e[None, :].to(tl.int64) * out_d
            if RAW == 2:
                o += tl.load(out_at, mask=inside, other=0.0)
            tl.store(out_at, o.to(out_ptr.dtype.element_ty), mask=inside)

        if not TOTAL:
            if DECAY == 2 and not OUTPUT:
                log_decay += log_whole
            if DECAY > 0:
                state = kept(state, whole)
                if TWO:
                    sine = kept(sine, whole)
                if SUM_D or SUM_E:
                    y_extra = y_extra * far
                    z = kept(z, whole)
                if (SUM_D and INNER) or (SUM_E and OUTER):
                    z_sine = kept(z_sine, whole)
            if SUM_E:
                more = tl.trans(columns(y_extra, y_extra, column, False))  # [j 16]
                if ROW:
                    more = tl.trans(columns(y_extra * cos, y_extra * sin, column, True))
                more = operand(more, OPERAND, PRECISION)
                z = dot(tl.trans(operand(w, OPERAND, PRECISION)), more, z, PRECISION)
                if OUTER:
                    z_sine = dot(tl.trans(operand(w_sin, OPERAND, PRECISION)), more, z_sine, PRECISION)
            if SUM_D:
                more = columns(y_extra, y_extra, column, False)  # [16 j]
                if ROW:
                    more = columns(y_extra * cos, y_extra * sin, column, True)
                more = operand(more, OPERAND, PRECISION)
                z = dot(more, y, z, PRECISION)
                if INNER:
                    z_sine = dot(more, y_sin, z_sine, PRECISION)
            if ROW:
                w_sin = w * (far * sin)[:, None]
                w = w * (far * cos)[:, None]
            elif DECAY > 0:
                w = w * far[:, None]
                if OUTER:
                    w_sin = w_sin * far[:, None]
            w = operand(w, OPERAND, PRECISION)
            state = dot(tl.trans(w), y, state, PRECISION)
            if INNER:
                sine = dot(tl.trans(w), y_sin, sine, PRECISION)
            if OUTER or ROW:
                sine = dot(tl.trans(operand(w_sin, OPERAND, PRECISION)), y, sine, PRECISION)

    if DECAY == 2 and not OUTPUT:
        tl.store(rows_ptr + unit * H + h, log_decay, mask=part == 0)
    if TURN:
        tl.store(turn_ptr + (unit * H + h) * E + e, turn, mask=e < E)
    if has_final != 0:
        if SUM_D:
            first, second = tl.sum(tl.where(column[:, None] == 0, z, 0.0), 0), 0.0  # [d]
            if INNER:
                second = tl.sum(tl.where(column[:, None] == 0, z_sine, 0.0), 0)
            if ROW:
                second = tl.sum(tl.where(column[:, None] == 1, z, 0.0), 0)
        if SUM_E:
            first, second = tl.sum(tl.where(column[None, :] == 0, z, 0.0), 1), 0.0  # [e]
            if OUTER:
                second = tl.sum(tl.where(column[None, :] == 0, z_sine, 0.0), 1)
            if ROW:
                second = tl.sum(tl.where(column[None, :] == 1, z, 0.0), 1)
        if TWO and not SPLIT:
            if REVERSE:
                sine = -sine
                if SUM_D or SUM_E:
                    second = -second
            else:
                cos_to, sin_to = across(turns, n.to(tl.float64))
                cos_s, sin_s = (
                    (cos_to[:, None], sin_to[:, None]) if OUTER else (cos_to[None, :], sin_to[None, :])
                )
                state, sine = turned(state, sine, cos_s, sin_s)
                if SUM_D or SUM_E:
                    first, second = turned(first, second, cos_to, sin_to)
        to_state = final_ptr + (unit * H + h) * (half * (2 if TWO else 1)) + at
        tl.store(to_state, state, mask=in_state)
        if TWO:
            tl.store(to_state + half, sine, mask=in_state)
        if SUM_D:
            to_z = final_z_ptr + (unit * H + h) * (D * (2 if TWO else 1)) + d
            tl.store(to_z, first, mask=(d < D) & (part == 0))
            if TWO:
                tl.store(to_z + D, second, mask=(d < D) & (part == 0))
        if SUM_E:
            to_z = final_z_ptr + (unit * H + h) * (E * (2 if TWO else 1)) + e
            tl.store(to_z, first, mask=e < E)
            if TWO:
                tl.store(to_z + E, second, mask=e < E)
