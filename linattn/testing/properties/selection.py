"""What does not exist: other sequences, tokens past a length, masked keys, a decay of zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from linattn import reference
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import assert_same
from linattn.testing.properties.equality import compare_gradients, gradient_limits, gradients
from linattn.testing.properties.plan import LONG, assert_parts, holds, limits, rng_of, truth, twice
from linattn.testing.subject import Subject, call, require, subject

MIXED = (0, 1, 70, 150, *LONG)


def want_state(of: Subject, case: Case) -> bool:
    """Whether the final state is there to be looked at."""
    return case.causal and of.missing(case, "state") is None


@holds({"borders": "packed"}, sizes=MIXED, fixed={"heads": 1})
def packs_as_if_separate(target: Any, case: Case) -> None:
    """Sequences packed back to back give what each gives in a call of its own, zero-length ones included."""
    of = subject(target)
    count = max(case.sequences, 70 if case.seed % 3 == 0 else 2)
    case = require(of, case.replace(n=min(case.n, of.reach), m=None, sequences=count))
    x = case.inputs()
    if case.seed % 2 and case.n:
        x.cu_seqlens[1] = 0  # type: ignore[index]  # often enough, one of no length
    state = want_state(of, case)
    packed, allowed = call(of, x, return_state=state), twice(limits(of, x))
    assert x.cu_seqlens is not None
    for s, (begin, end) in enumerate(zip(x.cu_seqlens[:-1], x.cu_seqlens[1:], strict=True)):
        alone = x.tokens(int(begin), int(end)).replace(cu_seqlens=None, packed=False)
        if x.state is not None:
            alone = alone.replace(state=tuple(p if p is None else p[s : s + 1] for p in x.state))
        want = call(of, alone, return_state=state)
        got = {name: part[:, begin:end] if name == "o" else part[s : s + 1] for name, part in packed.items()}
        limit = {
            name: part[:, begin:end] if name == "o" else part[s : s + 1] for name, part in allowed.items()
        }
        assert_parts(got, want, limit, x, f"sequence {s}: ")


@holds({"borders": "lengths"}, sizes=(1, 33, 150, *LONG), fixed={"heads": 1, "batch": 2})
def cuts_at_lengths(target: Any, case: Case) -> None:
    """Tokens at and after a row's length do not exist, whatever they hold: outputs 0, the state of the cut
    row, the same gradients.
    """
    of = subject(target)
    case = require(of, case.replace(n=min(case.n, of.reach), m=None))
    x = case.inputs()
    assert x.lengths is not None
    state = want_state(of, case)
    allowed = twice(limits(of, x))
    whole = x.replace(**{name: getattr(x, name).copy() for name in ("q", "k", "v", "do")})
    for b, length in enumerate(x.lengths):
        for part in (x.q, x.k, x.v, x.do):
            part[b, length:] = np.nan  # type: ignore[index]
    if case.n <= 40 and of.missing(case, "gradients") is None:
        hidden, whole = (y if state else y.replace(dstate=None) for y in (x, whole))
        compare_gradients(gradients(of, hidden), gradients(of, whole), gradient_limits(of, whole), x, 2.0)
    got = call(of, x, return_state=state)
    for b, length in enumerate(int(n) for n in x.lengths):
        padding = got["o"][b, length:]
        assert_same(f"o of row {b} after its length", "n h e", padding, np.zeros_like(padding))
        want = call(of, _cut(x, b, length), return_state=state)
        row = {
            name: part[b : b + 1, :length] if name == "o" else part[b : b + 1] for name, part in got.items()
        }
        limit = {
            name: part[b : b + 1, :length] if name == "o" else part[b : b + 1]
            for name, part in allowed.items()
        }
        assert_parts(row, want, limit, x, f"row {b}: ")


def _cut(x: Inputs, b: int, length: int) -> Inputs:
    alone = x.sequence(b)
    alone = alone.replace(lengths=None, case=alone.case.replace(lengths=False))
    return alone.tokens(0, length)


@holds({"causal": True, "decay": ("head", "token"), "borders": None}, sizes=(2, 17, 40, 150))
def forgets_at_minus_infinity(target: Any, case: Case) -> None:
    """From a log decay of -inf on, nothing before it shows in outputs, states and gradients; where pools are
    served, whose rows hold what an earlier text left, not even a state of NaN.
    """
    of = subject(target)
    case = require(of, case.replace(n=min(case.n, of.reach), m=None))
    x, other = case.inputs(), case.replace(seed=case.seed + 1).inputs()
    assert x.log_decay is not None
    t = int(rng_of(case).integers(case.n))
    x.log_decay[(slice(None), t) if x.log_decay.ndim == 3 else ...] = -np.inf
    past = np.arange(case.n)[:, None, None] < t
    sick = x.replace(**{name: np.where(past, getattr(other, name), getattr(x, name)) for name in "qkv"})
    gone = sick
    if x.state is not None and other.state is not None:
        kv, z, length = x.state
        sick = sick.replace(state=(*other.state[:2], length))
        nothing = (np.full_like(kv, np.nan), None if z is None else np.full_like(z, np.nan))
        gone = sick if of.missing(case, "pool") else sick.replace(state=(*nothing, length))
    state = want_state(of, case)
    got, want, allowed = call(of, gone, return_state=state), truth(x), limits(of, x)
    got["o"], want["o"], allowed["o"] = (parts["o"][:, t:] for parts in (got, want, allowed))
    assert_parts(got, want, allowed, x, f"after a reset at token {t}: ")
    if case.n <= 40 and of.missing(case, "gradients") is None:
        sick, x = (y if state else y.replace(dstate=None) for y in (sick, x))
        assert x.do is not None
        found, limit = gradients(of, sick), gradient_limits(of, x)
        wanted = reference.gradients(x.q, x.k, x.v, x.do, x.dstate, **x.options())
        names = ("q", "k", "v", *(("log_decay",) if case.decay == "token" else ()))
        later, should, within = (
            {name: parts[name][:, t:] for name in names}
            | ({"initial_state": parts["initial_state"]} if t == 0 and x.state is not None else {})
            for parts in (found, wanted, limit)
        )
        compare_gradients(later, should, within, x, label=f"after a reset at token {t}: ")


@holds(
    {"key_mask": True, "feature_map": (None, "relu", "silu")}, sizes=(1, 33, 150, *LONG), fixed={"heads": 1}
)
def takes_masked_keys_as_zero(target: Any, case: Case) -> None:
    """A masked key and value count as zeros, whatever they hold, NaN included; so do their gradients."""
    of = subject(target)
    case = require(of, case.replace(n=min(case.n, of.reach), m=None))
    require(of, case.replace(key_mask=False))
    x = case.inputs()
    assert x.key_mask is not None
    masked = ~x.key_mask[..., None, None]
    zeros = x.replace(k=np.where(masked, 0.0, x.k), v=np.where(masked, 0.0, x.v))
    zeros = zeros.replace(key_mask=None, case=zeros.case.replace(key_mask=False))
    hidden = x.replace(k=np.where(masked, np.nan, x.k), v=np.where(masked, np.nan, x.v))
    state = want_state(of, case)
    assert_parts(
        call(of, hidden, return_state=state), call(of, zeros, return_state=state), twice(limits(of, x)), x
    )
    if case.n <= 40 and of.missing(case, "gradients") is None:
        hidden, zeros = (
            (hidden, zeros) if state else (hidden.replace(dstate=None), zeros.replace(dstate=None))
        )
        want = gradients(of, zeros)
        want |= {name: np.where(masked, 0.0, want[name]) for name in ("k", "v")}
        compare_gradients(gradients(of, hidden), want, gradient_limits(of, hidden), hidden, 2.0)


@holds({"decay": ("head", "token")}, sizes=(2, 65, 150, *LONG), fixed={"heads": 1, "rates": (0.0,)})
def takes_zero_decay_as_none(target: Any, case: Case) -> None:
    """A log decay of exactly 0, of either sign, is no decay: the future stays unseen, nothing is divided or
    lost.
    """
    of = subject(target)
    case = require(of, case.replace(n=min(case.n, of.reach), m=None))
    plain = case.replace(decay=None)
    require(of, plain)
    x = case.inputs()
    none = x.replace(log_decay=None, case=plain)
    if case.seed % 2 and x.log_decay is not None:
        x = x.replace(log_decay=-x.log_decay)  # -slopes of a head that never forgets
    state = want_state(of, case)
    assert_parts(
        call(of, x, return_state=state), call(of, none, return_state=state), twice(limits(of, none)), x
    )
