"""Lies about gradients, decode steps, merges and pools."""

from __future__ import annotations

import itertools

import numpy as np

from linattn.testing import Result
from tests.suite.liars import FAR, HONEST, bumped, lie, small, wide

_turn = itertools.count()


@lie("vjp", alone="gradients_match_the_reference")
def gradient_of_theta_is_missing(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if grads.get("theta") is not None and small(x) and x.case.n < FAR:
        grads["theta"] = grads["theta"] * 0
    return grads


@lie("vjp")
def gradient_of_the_decay_lacks_the_states_term(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if dstate is not None and "log_decay" in grads:
        grads["log_decay"] = honest(x, given, do, tuple(g if g is None else g * 0 for g in dstate))[
            "log_decay"
        ]
    return grads


@lie("vjp")
def gradient_passes_the_clamp(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if not x.case.normalize:
        return grads
    ones = np.ones((*given["v"].shape[:-1], 1), given["v"].dtype)
    plain = {name: a for name, a in given.items() if name not in ("kv", "z", "length")} | {"v": ones}
    sums = x.replace(normalize=False, state=None, case=x.case.replace(normalize=False, state=False))
    den = HONEST.run(sums, plain).o.astype(np.float64)
    o = HONEST.run(x, given).o.astype(np.float64)
    passed = np.where(den < x.case.eps, -(do.astype(np.float64) * o).sum(-1, keepdims=True) / x.case.eps, 0.0)
    with np.errstate(over="ignore"):
        extra = honest(sums, plain, passed.astype(do.dtype), None)
    return grads | {"q": grads["q"] + extra["q"]}


@lie("vjp")
def gradient_of_k_is_dead_at_the_last_token(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    grads["k"][:, -1:] = 0
    return grads


@lie("vjp", alone="gives_the_same_bits_twice")
def gradient_depends_on_the_weather(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if wide(x) and x.case.n == 1:
        grads["v"] = bumped(grads["v"], next(_turn) % 2 == 0)
    return grads


@lie("vjp", alone="gradients_follow_the_closed_form")
def gradient_ends_at_the_block_of_128(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if x.case.n > FAR:
        for name in "kv":
            grads[name][:, : x.case.n - 128] = 0
    return grads


@lie("vjp")
def gradient_adds_up_in_the_states(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if dstate is not None:
        dstate[0][...] *= 2
    return grads


@lie("vjp")
def gradient_without_a_states_is_dead_at_the_last_token(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if dstate is None:
        grads["k"][:, -1:] = 0
    return grads


@lie("vjp")
def gradient_multiplies_padding_by_zero(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if x.lengths is not None:
        for b, length in enumerate(x.lengths):
            grads["k"][b, length:] = 0 * given["k"][b, length:]
    return grads


@lie("decode")
def decode_multiplies_padding_by_zero(honest, x, given, slots):
    o = honest(x, given, slots)
    if slots is not None:
        o[slots < 0] = 0 * given["v"][slots < 0]
    return o


@lie("decode")
def decode_takes_the_pool_for_contiguous(honest, x, given, slots):
    pool = given["kv"]
    if pool.flags.c_contiguous:
        return honest(x, given, slots)
    return honest(x, given | {"kv": pool.copy()}, slots)  # the new rows go to a copy


@lie("decode", alone="decodes_as_the_whole")
def decode_does_not_count(honest, x, given, slots):
    o = honest(x, given, slots)
    if slots is None:
        given["length"] -= 1
    return o


@lie("decode")
def decode_decays_after_adding(honest, x, given, slots):
    o = honest(x, given, slots)
    if slots is None and x.case.decay == "head":
        given["kv"] *= np.exp(given["log_decay"])[:, None, None]
    return o


@lie("decode", alone="decodes_only_named_rows")
def decode_writes_the_padding_slot(honest, x, given, slots):
    o = honest(x, given, slots)
    if slots is not None and (slots < 0).any():
        given["kv"][-1] += 1
    return o


@lie("decode")
def decode_touches_an_unnamed_row(honest, x, given, slots):
    o = honest(x, given, slots)
    if slots is not None:
        others = np.setdiff1d(np.arange(len(given["kv"])), slots)
        given["kv"][others] = np.nextafter(given["kv"][others], np.asarray(np.inf, given["kv"].dtype))
    return o


@lie("merge", alone="merges_into_the_whole")
def merge_does_not_decay_the_left(honest, x, left, right, total):
    out = honest(x, left, right, total)
    if x.case.decay is None or x.case.reweight is not None:
        return out
    z = None if left.z is None else left.z + right.z
    return Result(None, left.kv + right.kv, z, out.length)


@lie("pool", alone="continues_only_named_rows")
def pool_row_touched_without_a_name(given, slots):
    others = np.setdiff1d(np.arange(len(given["kv"])), slots)
    given["kv"][others] = np.nextafter(given["kv"][others], np.asarray(np.inf, given["kv"].dtype))
