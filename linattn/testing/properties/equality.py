"""Equality with the definition: outputs, states, every gradient, and the closed form far beyond its reach."""

from __future__ import annotations

from typing import Any

import numpy as np

from linattn import absolute, reference, tolerance
from linattn.arrays import Array
from linattn.testing import arrays
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import Mismatch, assert_within
from linattn.testing.properties.plan import assert_parts, holds, limits, rng_of, truth
from linattn.testing.subject import LETTERS, Subject, call, natives, require, rounding, subject

GRADIENT_LETTERS = {"q": "b n h d", "k": "b m h d", "v": "b m h e", "theta": "h d"}


@holds()
def matches_the_reference(target: Any, case: Case) -> None:
    """Outputs equal the definition's within the bound, with the final state (which does too) and without."""
    of = subject(target)
    case = require(of, case)
    x = case.inputs()
    want, allowed = truth(x), limits(of, x)
    assert_parts(call(of, x), want, allowed, x)
    if case.causal and of.missing(case, "state") is None:
        assert_parts(call(of, x, return_state=True), want, allowed, x, "with the final state, ")


@holds(longest=90)
def gradients_match_the_reference(target: Any, case: Case) -> None:
    """Every gradient equals the closed form within the bound."""
    of = subject(target)
    case = require(of, case, "gradients")
    x = case.inputs()
    if not (case.causal and of.missing(case, "state") is None):
        x = x.replace(dstate=None)
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
    got: dict[str, Any], want: dict[str, Any], allowed: dict[str, Any], x: Inputs, share: float = 1.0
) -> None:
    """Assert that every wanted gradient is there, and within `share` times its bound."""
    case = x.case
    for name, value in want.items():
        if value is None:
            continue
        if name not in got:
            raise Mismatch(f"there is no gradient of {name}")
        if name == "initial_state":
            parts = zip(("kv", "z"), got[name], value, allowed[name], strict=True)
            for part, g, w, limit in (part for part in parts if part[2] is not None):
                what = f"gradient of initial_state.{part}"
                assert_within(what, LETTERS[part], g, w, share * limit, case.accumulate)
            continue
        letters = GRADIENT_LETTERS.get(name, "h" if value.ndim == 1 else "b n h")
        dtype = case.dtype if name in ("q", "k", "v") else case.accumulate
        assert_within(f"gradient of {name}", letters, got[name], value, share * allowed[name], dtype)


def gradients(of: Subject, x: Inputs, layout: str | None = None) -> dict[str, Any]:
    """The subject's gradients, as NumPy."""
    case = x.case
    given, _ = natives(of, x, layout)
    assert x.do is not None
    do = arrays.place(x.do, of.kind, case.dtype, of.device, case.layout if layout is None else layout).array
    last = None
    if x.dstate is not None:
        last = tuple(
            None if g is None else arrays.place(g, of.kind, case.accumulate, of.device).array
            for g in x.dstate
        )
    found = of.vjp(x, given, do, last)  # type: ignore[arg-type]
    read: dict[str, Any] = {
        name: arrays.back(g) for name, g in found.items() if name != "initial_state" and g is not None
    }
    if found.get("initial_state") is not None:
        read["initial_state"] = tuple(None if g is None else arrays.back(g) for g in found["initial_state"])
    return read


# elu+1 is left out: its φ(0) = 1 would make the other keys count
NO_OTHER_KEYS = {"feature_map": (None, "relu", "silu"), "key_mask": False, "borders": None, "state": False}


@holds(NO_OTHER_KEYS, sizes=(300, 3000, 20000), fixed={"batch": 1, "d": 1})
def follows_the_closed_form(target: Any, case: Case) -> None:
    """One value at token 0 fades as scale · φ(1)² · λ^i · cos(θ i), at any distance.

    Angles count: a phase formed as theta * position in float32 is off by half a percent of a turn at token
    20 000.
    """
    of = subject(target)
    n = min(case.n, of.reach)
    case = require(of, case.replace(n=n, m=None))
    x = case.inputs()
    value = rng_of(case).integers(1, 9, (case.heads, case.e)).astype(np.float64)
    x = x.replace(q=np.ones_like(x.q), k=np.zeros_like(x.k), v=np.zeros_like(x.v))
    x.k[:, 0], x.v[:, 0] = 1.0, value
    options = x.options()
    i = np.arange(n)[:, None]  # [n h]
    log_weight = np.zeros((n, case.heads))
    if case.decay == "head":
        log_weight = np.where(i > 0, np.where(i > 0, i, 1) * options["log_decay"], 0.0)
    elif case.decay == "token":
        g = options["log_decay"][0]  # few values: counting them is exact, adding them up is not
        for rate in np.unique(g[1:]):
            count = np.cumsum(g[1:] == rate, axis=0)
            log_weight[1:] += np.where(count > 0, np.maximum(count, 1) * rate, 0.0)
    size = float(absolute.feature(np.ones(1), case.feature_map)[0]) ** 2
    size *= abs(case.scale)
    cosine = 1.0 if options["theta"] is None else np.cos(options["theta"][:, 0] * i)
    weight = size * np.exp(log_weight)
    factor = _factor(of, case, i, log_weight)
    error = weight * factor + np.where(log_weight < 0, size * tolerance.NORMAL[case.accumulate], 0.0)
    signed = np.sign(case.scale) * weight * cosine
    want = signed[..., None] * value
    allowed = error[..., None] * value
    if case.normalize:
        want = want / np.maximum(signed, case.eps)[..., None]
        allowed = (allowed + abs(want) * error[..., None]) / np.maximum(signed - error, case.eps)[..., None]
    allowed = allowed + tolerance.SUBNORMAL[case.dtype]
    assert_within("o", "b n h e", call(of, x)["o"], want[None], allowed[None], case.dtype)


def _factor(of: Subject, case: Case, i: Array, log_weight: Array) -> Array:
    round_ = rounding(of, case)
    u_out = tolerance.UNIT[case.dtype]
    finite = np.where(np.isfinite(log_weight), -log_weight, 0.0)
    factor: Array = round_.factor(case.n + case.d + case.e, i / round_.update_every + 1, finite, u_out)
    return factor
