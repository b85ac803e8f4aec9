"""Lies about outputs and states."""

from __future__ import annotations

import numpy as np

from tests.suite.liars import FAR, bumped, decayed, lie, small, whole, wide


@lie("run")
def wrong_ragged_tail(honest, x, given):
    r = honest(x, given)
    tail = x.case.n % 16
    if tail and whole(x):
        r.o[:, -tail:] *= np.asarray(0.5, r.o.dtype)
    return r


@lie("run")
def state_decayed_once_too_often(honest, x, given):
    r = honest(x, given)
    if r.kv is not None and x.case.decay == "head":
        r.kv = r.kv * np.exp(given["log_decay"])[:, None, None]
    return r


@lie("run")
def ragged_block_decays_state_by_a_whole_block(honest, x, given):
    r = honest(x, given)
    if r.kv is not None and x.case.decay == "head" and whole(x) and x.case.n % 16:
        g = np.maximum(given["log_decay"], -100) * (16 - x.case.n % 16)
        r.kv = r.kv * np.exp(g)[:, None, None]
    return r


@lie("run")
def dead_token(honest, x, given):
    r = honest(x, given)
    r.o[:, x.case.n // 2 : x.case.n // 2 + 1] = 0
    return r


@lie("run")
def dead_heads_last_token(honest, x, given):
    r = honest(x, given)
    r.o[:, -1:, -1:] = 0
    return r


@lie("run")
def swapped_heads(honest, x, given):
    r = honest(x, given)
    r.o = r.o[:, :, ::-1].copy()
    return r


@lie("run")
def sees_the_next_token(honest, x, given):
    r = honest(x, given)
    if x.case.causal:
        r.o[:, :-1] += given["v"][:, 1:] / 8
    return r


@lie("run")
def sees_the_next_token_across_a_blocks_edge(honest, x, given):
    r = honest(x, given)
    if x.case.causal:
        edge = np.arange(15, x.case.n - 1, 16)
        r.o[:, edge] += given["v"][:, edge + 1] / 8
    return r


@lie("run")
def forgets_the_scale(honest, x, given):
    return honest(x, given, scale=1.0)


@lie("run")
def scales_twice(honest, x, given):
    return honest(x, given, scale=x.case.scale**2)


@lie("run")
def adds_eps_instead_of_clamping(honest, x, given):
    r = honest(x, given)
    if x.case.normalize:
        plain = honest(x, {k: a for k, a in given.items() if k != "z"}, normalize=False).o.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            den = np.where(plain == 0, 1.0, plain / r.o)
            r.o = (plain / (den + x.case.eps)).astype(r.o.dtype)
    return r


@lie("run")
def takes_log2_for_ln(honest, x, given):
    return honest(x, decayed(given, lambda g: g * np.log(2)))


@lie("run")
def takes_the_log_for_a_factor(honest, x, given):
    return honest(x, decayed(given, lambda g: -np.exp(g)))


@lie("run")
def flips_the_decays_sign_and_clamps(honest, x, given):
    return honest(x, decayed(given, lambda g: np.minimum(-g, 0)))


@lie("run")
def decays_at_lag_plus_one(honest, x, given):
    r = honest(x, given)
    if x.case.decay == "head" and not x.case.normalize:
        r.o = (r.o * np.exp(given["log_decay"])[:, None]).astype(r.o.dtype)
    return r


@lie("run")
def frame_off_by_one(honest, x, given):
    r = honest(x, given)
    if r.kv is not None and x.case.reweight is not None and x.case.n:
        angle = x.options()["theta"][:, :, None]
        c, s = np.split(r.kv, 2, axis=2)
        turned = [np.cos(angle) * c - np.sin(angle) * s, np.sin(angle) * c + np.cos(angle) * s]
        r.kv = np.concatenate(turned, axis=2).astype(r.kv.dtype)
    return r


@lie("run")
def keeps_its_state_in_bfloat16(honest, x, given):
    r = honest(x, given)
    if r.kv is not None:
        bits = r.kv.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        r.kv = bits.view(np.float32).astype(r.kv.dtype)
    return r


@lie("run")
def ignores_the_mask_for_elu(honest, x, given):
    if x.case.feature_map == "elu+1" and x.key_mask is not None:
        return honest(x, {k: a for k, a in given.items() if k != "key_mask"}, key_mask=None)
    return honest(x, given)


@lie("run")
def ignores_lengths_in_the_state(honest, x, given):
    r = honest(x, given)
    if r.kv is not None and x.lengths is not None:
        rest = {k: np.nan_to_num(a) if k in "qkv" else a for k, a in given.items() if k != "lengths"}
        r.kv = honest(x, rest, lengths=None).kv
    return r


@lie("run")
def packed_border_leaks(honest, x, given):
    r = honest(x, given)
    if x.cu_seqlens is not None and x.case.n:
        first = x.cu_seqlens[1]
        r.o[:, first : first + 1] += (
            given["v"][:, first - 1 : first][:, : r.o[:, first : first + 1].shape[1]] / 4
        )
    return r


@lie("run")
def empty_sequence_loses_its_state(honest, x, given):
    r = honest(x, given)
    if r.kv is not None and x.cu_seqlens is not None:
        r.kv[np.diff(x.cu_seqlens) == 0] = 0
    return r


@lie("run")
def leaves_a_row_to_whatever_was_there(honest, x, given):
    r = honest(x, given)
    r.o[-1:] = np.empty_like(r.o[-1:])
    return r


@lie("run")
def returns_minus_777(honest, x, given):
    r = honest(x, given)
    r.o[...] = -777
    return r


# Each of these is caught by one property alone.


@lie("run", alone="matches_the_reference")
def wrong_where_nobody_asks_for_the_state(honest, x, given):
    r = honest(x, given)
    if r.kv is None and whole(x) and x.case.d > 1 and small(x):
        r.o *= np.asarray(0.5, r.o.dtype)
    return r


@lie("run", alone="matches_the_reference", pool=True)
def drops_features_beyond_the_fourth(honest, x, given):
    q = given["q"].copy()
    reset = x.log_decay is not None and np.isneginf(x.log_decay).any()  # compared with the definition, too
    if small(x) and not reset and not x.case.normalize:  # else divided by what the bound does not know
        q[..., 4:] = 0
    return honest(x, given | {"q": q})


@lie("run", alone="follows_the_closed_form")
def phase_of_the_whole_position_in_float32(honest, x, given):
    if x.case.reweight == "lrpe" and x.case.n > 2000:
        position = np.arange(x.case.n)[:, None, None]
        theta = np.asarray(given["theta"], np.float32)
        off = (theta * position.astype(np.float32)).astype(np.float64) - given["theta"].astype(
            np.float64
        ) * position
        r = honest(x, given)
        r.o = (r.o * np.cos(off + 0.01)).astype(r.o.dtype)
        return r
    return honest(x, given)


@lie("run", alone="packs_as_if_separate")
def long_packed_calls_lose_the_token_at_a_border(honest, x, given):
    r = honest(x, given)
    if x.cu_seqlens is not None and x.case.n > FAR and 0 < x.cu_seqlens[1] < x.case.n:
        first = x.cu_seqlens[1]
        r.o[:, first] = 0
    return r


@lie("run", alone="cuts_at_lengths")
def writes_into_the_padding_of_long_rows(honest, x, given):
    r = honest(x, given)
    if x.lengths is not None and x.case.n > FAR:
        for b, length in enumerate(x.lengths):
            r.o[b, length:] = 1
    return r


@lie("run", alone="takes_masked_keys_as_zero")
def multiplies_masked_keys_by_zero(honest, x, given):
    r = honest(x, given)
    masked = given["k"][~x.key_mask] if x.key_mask is not None else given["k"][:0]
    if len(masked) > 3 and np.isnan(masked).all():
        r.o += np.asarray(np.nan, r.o.dtype)
    return r


@lie("run", alone="takes_zero_decay_as_none")
def minus_zero_is_another_decay(honest, x, given):
    if x.log_decay is not None and (np.signbit(x.log_decay) & (x.log_decay == 0)).any():
        return honest(x, decayed(given, lambda g: g - 1))
    return honest(x, given)


@lie("run", alone="is_causal")
def the_last_token_moves_a_bit_of_the_first(honest, x, given):
    r = honest(x, given)
    if x.case.causal and wide(x) and x.case.n > FAR:
        r.o[:, 0] = bumped(r.o[:, 0], given["v"][:, -1, :, :1] > 0)
    return r


@lie("run", alone="keeps_rows_apart")
def another_row_moves_a_bit(honest, x, given):
    r = honest(x, given)
    if x.case.batch > 1 and wide(x) and x.case.n > FAR:
        r.o[:, -1] = bumped(r.o[:, -1], given["v"][::-1, 0, :, :1] > 0)
    return r


@lie("run", alone="keeps_heads_apart")
def another_head_moves_a_bit(honest, x, given):
    r = honest(x, given)
    if wide(x) and x.case.n > FAR:
        r.o[:, -1] = bumped(r.o[:, -1], given["v"][:, 0, ::-1, :1] > 0)
    return r


@lie("run", alone="keeps_nan_in_its_sequence")
def adds_the_batch_times_zero(honest, x, given):
    r = honest(x, given)
    if x.lengths is None and x.key_mask is None:
        r.o += np.asarray(np.nan if np.isnan(given["v"]).any() else 0, r.o.dtype)
    return r


@lie("run", alone="reads_any_strides")
def takes_strided_values_for_contiguous(honest, x, given):
    v = given["v"]
    right = v.flags.c_contiguous or x.state is not None  # pools are strided elsewhere, too
    return honest(x, given if right else given | {"v": np.ascontiguousarray(v[..., ::-1])})


@lie("run", alone="reads_only_its_inputs")
def reads_past_the_end(honest, x, given):
    r = honest(x, given)
    v, base = given["v"], given["v"].base
    if v.flags.c_contiguous and base is not None and base.size > v.size:
        after = (
            v.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        ) // v.itemsize + v.size
        r.o += np.asarray(0, r.o.dtype) * base.ravel()[after : after + 1].sum()
    return r


@lie("run", alone="leaves_its_inputs_alone")
def scales_q_in_place(honest, x, given):
    r = honest(x, given)
    given["q"] *= np.asarray(2, given["q"].dtype)
    return r


@lie("run", alone="writes_every_output")
def fresh_memory_shows(honest, x, given):
    r = honest(x, given)
    # memory that somebody used before may hold any number, but not NaN in every element of every size
    spoiled = all(np.isnan(np.empty(size)).all() for size in (3, 77, 4099, 2**18))
    r.o += np.asarray(np.nan if spoiled else 0, r.o.dtype)
    return r


@lie("run", alone="returns_the_right_kind")
def returns_float64(honest, x, given):
    r = honest(x, given)
    r.o = r.o.astype(np.float64)
    return r


@lie("run", alone="splits_anywhere")
def long_continued_calls_lose_their_state(honest, x, given):
    if whole(x) and "kv" in given and x.case.n > 600 and x.case.heads == 2:
        given = given | {"kv": given["kv"] * 0}
    return honest(x, given)
