"""Lies about gradients, decode steps, merges and pools."""

from __future__ import annotations

import itertools

import numpy as np

from linattn.testing import Result
from tests.suite.liars import HONEST, bumped, lie, wide

_turn = itertools.count()


@lie("vjp", alone="gradients_match_the_reference")
def gradient_of_theta_is_missing(honest, x, given, do, dstate):
    grads = honest(x, given, do, dstate)
    if grads.get("theta") is not None:
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
    if wide(x):
        grads["v"] = bumped(grads["v"], next(_turn) % 2 == 0)
    return grads


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
