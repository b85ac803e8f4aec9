"""Equality with the definition: outputs, states, every gradient, and the closed form far beyond its reach."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np

from linattn import absolute, reference, tolerance
from linattn.arrays import Array
from linattn.testing import arrays
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import Mismatch, NotOffered, assert_same, assert_within
from linattn.testing.properties.plan import assert_parts, holds, limits, rng_of, truth
from linattn.testing.subject import LETTERS, Subject, call, natives, require, rounding, subject

GRADIENT_LETTERS = {"q": "b n h d", "k": "b m h d", "v": "b m h e", "theta": "h d"}


@holds()
def matches_the_reference(target: Any, case: Case) -> None:
    """Outputs equal the definition's within the bound, with the final state (which does too) and without."""
    of = subject(target)
    case = require(of, case)
    if not (case.causal or case.packed or case.lengths) and case.m is None:
        # keys beyond the last query, and too few; never 2: refusals are asked for with two queries
        for m in (case.n + 3 + case.seed % 9, case.n // 2 | 1):
            with contextlib.suppress(NotOffered):  # what refuses them is compared without
                matches_the_reference(target, case.replace(m=m))
    x = case.inputs()
    want, allowed = truth(x), limits(of, x)
    assert_parts(call(of, x), want, allowed, x)
    if case.causal and of.missing(case, "state") is None:
        got = call(of, x, return_state=True)
        if absent := sorted(want.keys() - got.keys()):
            raise Mismatch(f"with the final state, there is no {absent[0]}")
        assert_parts(got, want, allowed, x, "with the final state, ")
        if "length" in got:
            assert_same("length of the final state", "s", got["length"], _tokens(x))


def _tokens(x: Inputs) -> Array:
    """How many tokens each sequence has seen: no padding, but what its state had seen before."""
    if x.cu_seqlens is not None:
        here = np.diff(x.cu_seqlens)
    else:
        here = np.full(len(x.q), x.case.n) if x.lengths is None else x.lengths
    return here if x.state is None else here + x.state[2]


@holds(longest=90)
def gradients_match_the_reference(target: Any, case: Case) -> None:
    """Every gradient equals the closed form within the bound."""
    of = subject(target)
    case = require(of, case, "gradients")
    x = case.inputs()
    # most losses do not see the state, and some see nothing else
    seen = rng_of(case).choice(["o", "state", "both"])
    if seen == "o" or not (case.causal and of.missing(case, "state") is None):
        x = x.replace(dstate=None)
    elif seen == "state" and x.do is not None:
        x = x.replace(do=np.zeros_like(x.do))
    assert_gradients(of, x)


def assert_gradients(of: Subject, x: Inputs) -> None:
    """Assert that each gradient of <do, o> + <dstate, state> is there and within its bound of the closed
    form.
    """
    assert x.do is not None
    want = reference.gradients(x.q, x.k, x.v, x.do, x.dstate, **x.options())
    if x.case.reweight == "cosine":
        del want["theta"]  # its angle is no argument
    compare_gradients(gradients(of, x), want, gradient_limits(of, x), x)


def gradient_limits(of: Subject, x: Inputs) -> dict[str, Any]:
    """Allowed errors of every gradient."""
    round_ = rounding(of, x.case)
    found = tolerance.bound(x.q, x.k, x.v, do=x.do, dstate=x.dstate, rounding=round_, **x.options())
    return found.gradients


def compare_gradients(
    got: dict[str, Any],
    want: dict[str, Any],
    allowed: dict[str, Any],
    x: Inputs,
    share: float = 1.0,
    label: str = "",
) -> None:
    """Assert that every wanted gradient is there, and within `share` times its bound."""
    case = x.case
    for name, value in want.items():
        if value is None:
            continue
        if name not in got:
            raise Mismatch(f"{label}there is no gradient of {name}")
        if name == "initial_state":
            parts = zip(("kv", "z"), got[name], value, allowed[name], strict=True)
            for part, g, w, limit in (part for part in parts if part[2] is not None):
                what = f"{label}gradient of initial_state.{part}"
                assert_within(what, LETTERS[part], g, w, share * limit, case.accumulate)
            continue
        letters = GRADIENT_LETTERS.get(name, "h" if value.ndim == 1 else "b n h")
        dtype = case.dtype if name in ("q", "k", "v") else case.accumulate
        what = f"{label}gradient of {name}"
        assert_within(what, letters, got[name], value, share * allowed[name], dtype)


def upstream(of: Subject, x: Inputs, layout: str | None = None) -> tuple[Any, Any]:
    """What a backward pass starts from, as the subject takes it: of the output, and of kv and z or None."""
    case, layout = x.case, x.case.layout if layout is None else layout
    do = arrays.place(x.do, of.kind, case.dtype, of.device, layout).array
    if x.dstate is None:
        return do, None
    last = (
        g if g is None else arrays.place(g, of.kind, case.accumulate, of.device, layout) for g in x.dstate
    )
    return do, tuple(g if g is None else g.array for g in last)


def gradients(of: Subject, x: Inputs, layout: str | None = None) -> dict[str, Any]:
    """The subject's gradients, as NumPy."""
    given, _ = natives(of, x, layout)
    found = of.vjp(x, given, *upstream(of, x, layout))
    read: dict[str, Any] = {
        name: arrays.back(g) for name, g in found.items() if name != "initial_state" and g is not None
    }
    if found.get("initial_state") is not None:
        read["initial_state"] = tuple(None if g is None else arrays.back(g) for g in found["initial_state"])
    return read


def pieces(grads: dict[str, Any]) -> list[tuple[str, Any]]:
    """Every array among gradients, that of a state's kv and of its z, too, beside the argument's name."""
    parts = ((name, part if isinstance(part, tuple) else (part,)) for name, part in grads.items())
    return [(name, piece) for name, pieces in parts for piece in pieces if piece is not None]


@holds(sizes=(3, 18), wide=True)
def matches_at_any_width(target: Any, case: Case) -> None:
    """Outputs, final states and gradients equal the definition's where heads or features are many."""
    matches_the_reference(target, case)
    of = subject(target)
    if of.missing(case, "gradients") is None:
        gradients_match_the_reference(target, case)


# elu+1 is left out: its φ(0) = 1 would make the other keys count
NO_OTHER_KEYS = {"feature_map": (None, "relu", "silu"), "key_mask": False, "borders": None, "state": False}


@holds(NO_OTHER_KEYS, sizes=(300, 3000, 20000), fixed={"batch": 1, "d": 1})
def follows_the_closed_form(target: Any, case: Case) -> None:
    """One value, at any token, fades as scale · φ(1)² · λ^i · cos(θ i), at any distance i.

    Angles count: a phase formed as theta * position in float32 is off by half a percent of a turn at token
    20 000.
    """
    of = subject(target)
    n = min(case.n, of.reach)
    case = require(of, case.replace(n=n, m=None))
    x = case.inputs()
    rng = rng_of(case)
    value = rng.integers(1, 9, (case.heads, case.e)).astype(np.float64)
    x = x.replace(q=np.ones_like(x.q), k=np.zeros_like(x.k), v=np.zeros_like(x.v))
    at = 0 if rng.random() < 0.5 else int(rng.integers(n))
    x.k[:, at], x.v[:, at] = 1.0, value
    options = x.options()
    past = np.arange(n)[:, None] - at  # [n h]
    i = abs(past)
    log_weight = np.zeros((n, case.heads))
    if case.decay == "head":
        log_weight = np.where(i > 0, np.where(i > 0, i, 1) * options["log_decay"], 0.0)
    elif case.decay == "token":
        log_weight[at + 1 :] = _counted(options["log_decay"][0, at + 1 :])
    size = float(absolute.feature(np.ones(1), case.feature_map)[0]) ** 2
    size *= abs(case.scale)
    cosine = 1.0 if options["theta"] is None else np.cos(options["theta"][:, 0] * i)
    weight = size * np.exp(log_weight) * (past >= 0 if case.causal else 1.0)
    factor = _factor(of, case, i / rounding(of, case).update_every, log_weight)
    error = weight * factor + np.where(log_weight < 0, size * tolerance.NORMAL[case.accumulate], 0.0)
    signed = np.sign(case.scale) * weight * cosine
    want = signed[..., None] * value
    allowed = error[..., None] * value
    if case.normalize:
        want = want / np.maximum(signed, case.eps)[..., None]
        allowed = (allowed + abs(want) * error[..., None]) / np.maximum(signed - error, case.eps)[..., None]
    allowed = allowed + tolerance.SUBNORMAL[case.dtype]
    assert_within("o", "b n h e", call(of, x)["o"], want[None], allowed[None], case.dtype)


@holds(
    NO_OTHER_KEYS | {"normalize": False},
    sizes=(300, 3000),
    fixed={"batch": 1, "d": 1, "rates": (1e-3, 0.1)},
)
def gradients_follow_the_closed_form(target: Any, case: Case) -> None:
    """One key with a value, seen from the last token: every gradient of that pair, at any distance.

    The definition's gradients end at 90 tokens; a backward pass in blocks of 128 is one block there.
    """
    of = subject(target)
    n = min(case.n, of.reach)
    case = require(of, case.replace(n=n, m=None), "gradients")
    x = case.inputs().replace(dstate=None)
    assert x.do is not None
    rng = rng_of(case)
    at = 0 if rng.random() < 0.5 else max(0, n - 1 - int(rng.integers(1, 290)))
    value, do = rng.integers(1, 9, (2, case.heads, case.e)).astype(np.float64)
    x = x.replace(q=np.ones_like(x.q), k=np.ones_like(x.k), v=np.zeros_like(x.v), do=np.zeros_like(x.do))
    x.v[:, at], x.do[:, -1] = value, do  # type: ignore[index]
    options = x.options()
    lag = np.arange(n - 1, -1, -1)[:, None]  # from each key to the last token
    log_weight = np.zeros((n, case.heads))
    if case.decay == "head":
        log_weight = lag * options["log_decay"]
    elif case.decay == "token":
        g = options["log_decay"][0]
        log_weight[:-1] = _counted(g[:0:-1])[::-1]  # those of the tokens behind a key
    one = np.ones(1)
    phi, slope = float(absolute.feature(one, case.feature_map)[0]), _slope(case.feature_map)
    size = abs(case.scale) * np.exp(log_weight)  # [n h], without features and cosine
    # a recurrence, as the definition's gradients are one, rounds at every token
    error = size * _factor(of, case, lag, log_weight) + tolerance.NORMAL[case.accumulate] * abs(case.scale)
    theta = np.zeros((case.heads, 1)) if options["theta"] is None else options["theta"]
    cosine = np.sign(case.scale) * np.cos(theta[:, 0] * lag)
    pair = (value * do).sum(-1)  # [h]
    want: dict[str, Any] = {"q": np.zeros(x.q.shape), "k": np.zeros(x.k.shape)}
    allowed: dict[str, Any] = {"q": np.zeros(x.q.shape), "k": np.zeros(x.k.shape)}
    for name, token in (("q", n - 1), ("k", at)):
        want[name][0, token, :, 0] = phi * slope * (size * cosine)[at] * pair
        allowed[name][0, token, :, 0] = 2 * phi * slope * error[at] * pair
    want["v"] = phi**2 * (size * cosine)[None, :, :, None] * do
    allowed["v"] = phi**2 * error[None, :, :, None] * do
    weight, limit = phi**2 * size[at] * pair, 4 * phi**2 * error[at] * pair  # [h]
    spanned = lag[at, 0]
    if case.decay == "head":
        # sums over suffixes: what does not cancel to the last bit counts for each token before the pair, too
        want["log_decay"], allowed["log_decay"] = spanned * weight * cosine[at], (n + at + 1) * limit
    elif case.decay == "token":
        inside = (np.arange(n) > at)[None, :, None]
        want["log_decay"] = inside * weight * cosine[at]
        allowed["log_decay"] = np.broadcast_to(limit, (1, n, case.heads))
    if case.reweight == "lrpe":
        sine = np.sign(case.scale) * np.sin(theta[:, 0] * spanned)
        want["theta"] = -(spanned * weight * sine)[:, None]
        allowed["theta"] = ((spanned + 64) * limit)[:, None]
    allowed = {name: part + tolerance.SUBNORMAL[case.dtype] for name, part in allowed.items()}
    compare_gradients(gradients(of, x), want, allowed, x)


def _counted(g: Array) -> Array:
    """Cumulative sums of few different values [n h]: counting them is exact, adding them up is not."""
    total = np.zeros(g.shape)
    for rate in np.unique(g):
        count = np.cumsum(g == rate, axis=0)
        total += np.where(count > 0, np.maximum(count, 1) * rate, 0.0)
    return total


def _slope(feature_map: str | None) -> float:
    """The derivative of a feature map at 1."""
    gate = 1 / (1 + math.exp(-1))
    return gate * (2 - gate) if feature_map == "silu" else 1.0


def _factor(of: Subject, case: Case, updates: Array, log_weight: Array) -> Array:
    u_out = tolerance.UNIT[case.dtype]
    finite = np.where(np.isfinite(log_weight), -log_weight, 0.0)
    factor: Array = rounding(of, case).factor(case.n + case.d + case.e, updates + 1, finite, u_out)
    return factor
