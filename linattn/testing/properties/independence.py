"""What must not reach a result: the future, other rows, other heads, another sequence's NaN."""

from __future__ import annotations

from typing import Any

import numpy as np

from linattn.arrays import Array
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import assert_same
from linattn.testing.properties.equality import gradients, pieces
from linattn.testing.properties.plan import LONG, Parts, assert_parts, holds, limits, rng_of, twice
from linattn.testing.properties.selection import want_state
from linattn.testing.subject import LETTERS, call, require, subject

MIXED = (2, 17, 64, 150, *LONG)


def _mixed(x: Inputs, other: Inputs, take: Any) -> Inputs:
    """x with q, k, v and a per-token decay taken from `other` where `take(array)` is true."""
    changed = {}
    for name in ("q", "k", "v", "log_decay"):
        mine, theirs = getattr(x, name), getattr(other, name)
        if mine is not None and mine.ndim >= 3:
            changed[name] = np.where(take(mine), theirs, mine)
    return x.replace(**changed)


@holds({"causal": True}, sizes=MIXED, fixed={"heads": 1})
def is_causal(target: Any, case: Case) -> None:
    """Changing the finite future changes no bit of the outputs before it."""
    of = subject(target)
    case = require(of, case.replace(n=min(case.n, of.reach)))
    x, other = case.inputs(), case.replace(seed=case.seed + 1).inputs()
    # beside a block's edge as often as anywhere else
    rng = rng_of(case)
    t = int(rng.integers(0, case.n))
    if rng.random() < 0.5:
        t -= t % 16
    future = _mixed(x, other, lambda a: np.arange(a.shape[1]).reshape(1, -1, *(1,) * (a.ndim - 2)) >= t)
    got, want = call(of, future)["o"], call(of, x)["o"]
    assert_same(f"o before token {t}", "b n h e", got[:, :t], want[:, :t])


@holds({"borders": (None, "lengths")}, sizes=MIXED, fixed={"heads": 1})
def keeps_rows_apart(target: Any, case: Case) -> None:
    """Changing one batch row changes no bit of another, and a row alone gives what it gives among others."""
    of = subject(target)
    case = require(of, case.replace(batch=2, n=min(case.n, of.reach), m=None))
    x, other = case.inputs(), case.replace(seed=case.seed + 1).inputs()
    state = want_state(of, case)
    row = int(rng_of(case).integers(2))
    changed = _mixed(x, other, lambda a: np.arange(2).reshape(2, *(1,) * (a.ndim - 1)) != row)
    if x.state is not None:
        changed = changed.replace(state=_other_rows(x, other, row))
    want = call(of, x, return_state=state)
    _assert_same_parts(call(of, changed, return_state=state), want, row)
    alone = x.sequence(row)
    mine = {name: part[row : row + 1] for name, part in want.items()}
    assert_parts(call(of, alone, return_state=state), mine, twice(limits(of, alone)), alone, "a row alone: ")


def _other_rows(x: Inputs, other: Inputs, row: int) -> Any:
    assert x.state is not None and other.state is not None
    parts: list[Any] = []
    for mine, theirs in zip(x.state[:2], other.state[:2], strict=True):
        if mine is None or theirs is None:
            parts.append(None)
            continue
        changed = theirs.copy()
        changed[row] = mine[row]
        parts.append(changed)
    return (*parts, x.state[2])


def _assert_same_parts(got: Parts, want: Parts, row: int) -> None:
    for name, part in want.items():
        letters = LETTERS[name].partition(" ")[2]
        assert_same(f"{name} of row {row}", letters, got[name][row], part[row])


@holds(sizes=MIXED, fixed={"heads": 3, "d": 3, "e": 2})
def keeps_heads_apart(target: Any, case: Case) -> None:
    """Changing one head changes no bit of another."""
    of = subject(target)
    case = require(of, case.replace(n=min(case.n, of.reach), m=None))
    x, other = case.inputs(), case.replace(seed=case.seed + 1).inputs()
    state = want_state(of, case)
    head = int(rng_of(case).integers(3))
    changed = _mixed(
        x, other, lambda a: (np.arange(3) == head)[None, None, :].reshape(1, 1, 3, *(1,) * (a.ndim - 3))
    )
    want, got = call(of, x, return_state=state), call(of, changed, return_state=state)
    rest = [h for h in range(3) if h != head]
    assert_same("o of the other heads", "b n h e", got["o"][:, :, rest], want["o"][:, :, rest])
    for name in ("kv", "z"):
        if name in want:
            assert_same(f"{name} of the other heads", LETTERS[name], got[name][:, rest], want[name][:, rest])


@holds(sizes=MIXED, fixed={"heads": 2})
def keeps_nan_in_its_sequence(target: Any, case: Case) -> None:
    """A NaN reaches no other sequence: no bit of their outputs, states and gradients changes."""
    of = subject(target)
    case = case.replace(n=max(2, min(case.n, of.reach)), m=None, batch=2, sequences=max(2, case.sequences))
    case = require(of, case)
    x = case.inputs()
    rng = rng_of(case)
    t, row = int(rng.integers(case.n)), 0 if case.packed else int(rng.integers(2))
    sick = x.replace(**{name: getattr(x, name).copy() for name in "qkv"})
    for name in rng.permutation(["q", "k", "v"])[:2]:
        getattr(sick, name)[row, t] = np.nan
    state = want_state(of, case)
    got, want = call(of, sick, return_state=state), call(of, x, return_state=state)
    reached = {"o": _reached(x, row, t)[:, :, None, None]}
    sequence = row
    if x.cu_seqlens is not None:
        sequence = int(np.searchsorted(x.cu_seqlens, t, side="right")) - 1
    own_sequence = np.arange(len(x.q) if x.cu_seqlens is None else len(x.cu_seqlens) - 1) == sequence
    for name in ("kv", "z"):
        if name in want:
            reached[name] = own_sequence.reshape(-1, *(1,) * (want[name].ndim - 1))
    for name, own in reached.items():
        what = f"{name}, out of reach of a NaN in row {row} at token {t},"
        assert_same(what, LETTERS[name], np.where(own, want[name], got[name]), want[name])
    if case.n > 64 or of.missing(case, "gradients") is not None:
        return
    sick, x = (y if state else y.replace(dstate=None) for y in (sick, x))
    found, wanted = gradients(of, sick), gradients(of, x)
    for (name, g), (_, without) in zip(pieces(found), pieces(wanted), strict=True):
        if g.ndim < 3:
            continue  # of a table that all sequences share
        own = own_sequence if name == "initial_state" else _reached(x, row, t)
        own = own.reshape(*own.shape, *(1,) * (g.ndim - own.ndim))
        what = f"gradient of {name}, out of reach of a NaN in row {row} at token {t},"
        assert_same(what, "element", np.where(own, without, g), without)


def _reached(x: Inputs, row: int, t: int) -> Array:
    """Where a NaN at token t of a row may show: its own sequence."""
    reached = np.zeros(x.q.shape[:2], bool)
    begin, end = 0, x.case.n
    if x.cu_seqlens is not None:
        s = int(np.searchsorted(x.cu_seqlens, t, side="right")) - 1
        begin, end = int(x.cu_seqlens[s]), int(x.cu_seqlens[s + 1])
    reached[row, begin:end] = True
    return reached
