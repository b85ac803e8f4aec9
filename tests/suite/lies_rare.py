"""Lies that only some calls show: many heads or features or sequences, another eps, resets, a second call."""

from __future__ import annotations

import numpy as np

from tests.suite.liars import decayed, lie

BUFFERS: dict[tuple[tuple[int, ...], np.dtype], np.ndarray] = {}


@lie("run", alone="matches_at_any_width", pool=True)
def drops_features_beyond_the_sixteenth(honest, x, given):
    q = given["q"].copy()
    q[..., 16:] = 0
    return honest(x, given | {"q": q})


@lie("run")
def mixes_more_than_eight_heads(honest, x, given):
    r = honest(x, given)
    if x.case.heads > 8:
        r.o = r.o[:, :, ::-1].copy()
    return r


@lie("run")
def drops_keys_beyond_the_last_query(honest, x, given):
    v = given["v"].copy()
    v[:, x.case.n :] = 0
    return honest(x, given | {"v": v})


@lie("run")
def knows_one_eps(honest, x, given):
    return honest(x, given, eps=1e-6)


@lie("run")
def counts_the_padding(honest, x, given):
    r = honest(x, given)
    if r.kv is not None and x.lengths is not None:
        r.length = r.length - given["lengths"] + x.case.n
    return r


@lie("run")
def takes_a_slow_decay_for_none(honest, x, given):
    return honest(x, decayed(given, lambda g: np.where(g > -1e-4, 0, g)))


@lie("run")
def a_block_without_keys_is_skipped_with_its_decay(honest, x, given):
    if x.key_mask is None or x.case.decay != "token":
        return honest(x, given)
    g = given["log_decay"].copy()
    for start in range(0, x.case.n - 15, 16):
        g[~x.key_mask[:, start : start + 16].any(1), start : start + 16] = 0
    return honest(x, given | {"log_decay": g})


@lie("run")
def leaks_into_the_tenth_sequence(honest, x, given):
    r = honest(x, given)
    if x.cu_seqlens is not None and len(x.cu_seqlens) > 10:
        r.o[:, x.cu_seqlens[9] :] *= np.asarray(0.5, r.o.dtype)
    return r


@lie("decode")
def decode_writes_beside_the_pool(honest, x, given, slots):
    o = honest(x, given, slots)
    if slots is not None and (base := given["kv"].base) is not None:
        base.flat[0] = 1
    return o


@lie("pool")
def writes_beside_the_pool(given, slots):
    if (base := given["kv"].base) is not None:
        base.flat[0] = 1


@lie("vjp")
def a_nan_reaches_the_other_sequence_through_its_decay(honest, x, given, do, dstate):
    found = honest(x, given, do, dstate)
    if x.case.decay == "token":
        found["log_decay"] = found["log_decay"] + 0 * given["v"].sum(dtype=found["log_decay"].dtype)
    return found


@lie("vjp")
def silu_slope_from_an_infinite_exponential(honest, x, given, do, dstate):
    found = honest(x, given, do, dstate)
    if x.case.feature_map == "silu":
        with np.errstate(all="ignore"):
            e = np.exp(-given["q"])
            found["q"] = found["q"] + 0 * (e / (1 + e)).astype(found["q"].dtype)
    return found


@lie("run", alone="returns_memory_of_its_own")
def writes_into_the_same_buffer_each_time(honest, x, given):
    r = honest(x, given)
    kept = BUFFERS.setdefault((r.o.shape, r.o.dtype), np.empty_like(r.o))
    kept[...] = r.o
    r.o = kept
    return r


@lie("run", alone="forgets_at_minus_infinity")
def multiplies_a_forgotten_state_by_zero(honest, x, given):
    r = honest(x, given)
    if x.state is not None and x.log_decay is not None and np.isneginf(x.log_decay).any():
        r.o += 0 * given["kv"].sum(dtype=r.o.dtype)
    return r
