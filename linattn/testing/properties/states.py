"""States: what is split, decoded, merged or kept in a pool gives what the whole gives."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from linattn.testing import arrays
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import assert_equal, assert_same
from linattn.testing.properties.plan import LONG, Parts, assert_parts, holds, limits, rng_of, truth, twice
from linattn.testing.subject import LETTERS, Natives, Result, Subject, call, natives, require, subject

WHOLE = {"causal": True, "borders": None}
POOL, ROWS = 12, 9
"""States of a pool, and rows of a step on some of them."""


def state_of(parts: Parts, x: Inputs) -> tuple[Any, Any, Any]:
    """A result's state as an input; a kernel without lengths gets them counted."""
    length = parts.get("length")
    if length is None:
        before = np.zeros(len(parts["kv"]), np.int64) if x.state is None else x.state[2]
        length = before + x.case.n
    return parts["kv"], parts.get("z"), length


@holds(WHOLE, sizes=(5, 64, 150, *LONG), fixed={"heads": 2})
def splits_anywhere(target: Any, case: Case) -> None:
    """A call split at any tokens, with the state carried, gives the whole's outputs and final state."""
    of = subject(target)
    case = require(of, case.replace(n=min(case.n, of.reach)), "state")
    require(of, case.replace(state=True), "state")
    x = case.inputs()
    whole = call(of, x, return_state=True)
    cuts = [0, *sorted(int(c) for c in rng_of(case).integers(0, case.n + 1, 3)), case.n]
    part, outputs, state = {}, [], x.state
    for begin, end in itertools.pairwise(cuts):
        piece = x.tokens(begin, end).replace(state=state)
        piece = piece.replace(case=piece.case.replace(state=state is not None))
        part = call(of, piece, return_state=True)
        state = state_of(part, piece)
        outputs.append(part["o"])
    part["o"] = np.concatenate(outputs, axis=1)
    assert_parts(part, whole, twice(limits(of, x)), x)
    if "length" in whole:
        assert_same("length", "s", part["length"], whole["length"])


@holds(WHOLE | {"key_mask": False, "state": True}, longest=40)
def decodes_as_the_whole(target: Any, case: Case) -> None:
    """Tokens decoded one at a time give the definition's outputs and final state, and count themselves."""
    of = subject(target)
    case = require(of, case, "decode")
    x = case.inputs()
    given, outputs = _start(of, x), []
    for t in range(case.n):
        outputs.append(arrays.back(of.decode(*step(of, x, t, given))))
    o = np.stack(outputs, axis=1) if outputs else np.zeros_like(x.v)
    got = {"o": o, **Result(None, given["kv"], given.get("z"), given["length"]).read_state()}
    assert_parts(got, truth(x), limits(of, x, decode=True), x)
    assert x.state is not None
    assert_same("length", "s", got["length"], x.state[2] + case.n)


def _start(of: Subject, x: Inputs) -> Natives:
    given, _ = natives(of, x)
    return given


def step(of: Subject, x: Inputs, t: int, given: Natives) -> tuple[Inputs, Natives]:
    """The arguments of one decode step at token t, on the state that `given` holds."""
    now: Natives = {name: given[name] for name in ("kv", "z", "length", "theta") if name in given}
    now |= {name: given[name][:, t] for name in "qkv"}
    if "log_decay" in given:
        g = given["log_decay"]
        now["log_decay"] = g if g.ndim == 1 else g[:, t]
    return x, now


@holds(
    WHOLE | {"key_mask": False, "state": True},
    layouts=arrays.LAYOUTS,
    wide=True,
    fixed={"n": 1, "batch": 2},
)
def decodes_only_named_rows(target: Any, case: Case) -> None:
    """A decode step with slots changes the named rows of the pool and no other bit; a padding row gives 0."""
    of = subject(target)
    case = require(of, case, "slots")
    x = case.replace(batch=POOL).inputs()
    assert x.state is not None
    rng = rng_of(case)
    slots = rng.permutation(POOL)[:ROWS].astype(np.int64)
    slots[rng.permutation(ROWS)[: rng.integers(4)]] = -1  # a batch is padded to any size
    rows = x.replace(q=x.q[:ROWS], k=x.k[:ROWS], v=x.v[:ROWS], batch=ROWS)
    if x.log_decay is not None and x.log_decay.ndim == 3:
        rows = rows.replace(log_decay=x.log_decay[:ROWS])
    padded = (slots < 0)[:, None, None, None]  # may hold anything
    sick = rows.replace(**{name: np.where(padded, np.nan, getattr(rows, name)) for name in "qkv"})
    given, buffers = natives(of, sick)
    before = _state_parts(given)
    o = arrays.back(of.decode(*step(of, rows, 0, given), arrays.place(slots, of.kind, "", of.device).array))
    after = _state_parts(given)
    _assert_alone(of, sick, given, buffers)
    used = slots >= 0
    named = slots[used]
    others = np.setdiff1d(np.arange(POOL), named)
    for name, value in before.items():
        assert_same(f"{name} of rows that no slot names", LETTERS[name], after[name][others], value[others])
    assert_same("o of a padding row", "b h e", o[~used], np.zeros_like(o[~used]))
    taken = rows.replace(state=tuple(None if part is None else part[named] for part in x.state))
    taken = taken.replace(q=rows.q[used], k=rows.k[used], v=rows.v[used], batch=len(named))
    if taken.log_decay is not None and taken.log_decay.ndim == 3:
        taken = taken.replace(log_decay=taken.log_decay[used])
    got = {"o": o[used][:, None], **{name: value[named] for name, value in after.items()}}
    assert_parts(got, truth(taken), limits(of, taken, decode=True), taken)
    assert_same("length of named rows", "s", got["length"], before["length"][named] + 1)


def _assert_alone(of: Subject, x: Inputs, given: Natives, buffers: dict[str, Any]) -> None:
    """Assert that a call changed its pool at most: no other argument, nothing between or around states."""
    same, original = natives(of, x)
    for name in ("kv", "z", "length"):
        if name in given:
            given[name][...] = same[name]
    for name, buffer in buffers.items():
        what = f"{name}, around it too,"
        assert_same(what, "element", arrays.back(buffer), arrays.back(original[name]))


def _state_parts(given: Natives) -> Parts:
    return {name: arrays.back(given[name]).copy() for name in ("kv", "z", "length") if name in given}


@holds({"causal": True, "state": True}, longest=80, layouts=arrays.LAYOUTS)
def continues_only_named_rows(target: Any, case: Case) -> None:
    """A call with slots continues the named rows of a pool, writes their new state there, and changes no
    other bit.
    """
    of = subject(target)
    case = require(of, case, "state", "pool")
    x = case.inputs()
    assert x.state is not None
    count = len(x.state[2])
    rng = rng_of(case)
    slots = rng.permutation(count + 3)[:count].astype(np.int64)
    pool = x.replace(
        state=tuple(None if part is None else _spread(part, slots, count + 3) for part in x.state)
    )
    padding = rng.random(count) < 0.25  # these begin empty, give 0 and are written nowhere
    named, slots = slots[~padding], np.where(padding, -1, slots)
    given, buffers = natives(of, pool)
    before = _state_parts(given)
    got = of.run(pool, given, slots=arrays.place(slots, of.kind, "", of.device).array).read()
    after = _state_parts(given)
    _assert_alone(of, pool, given, buffers)
    others = np.setdiff1d(np.arange(count + 3), named)
    for name, value in before.items():
        assert_same(f"{name} of rows that no slot names", LETTERS[name], after[name][others], value[others])
    got |= {name: value[named] for name, value in after.items()}
    want, allowed = call(of, x, return_state=True), twice(limits(of, x))
    for s in np.flatnonzero(padding):
        rows = (s, slice(None)) if x.cu_seqlens is None else (0, slice(*x.cu_seqlens[s : s + 2]))
        want["o"][rows] = 0
    for parts in (want, allowed):
        parts |= {name: part[~padding] for name, part in parts.items() if name != "o"}
    assert_parts(got, want, allowed, x)
    assert_same("length of named rows", "s", got["length"], want["length"])


def _spread(part: Any, slots: Any, rows: int) -> Any:
    pool = np.resize(part, (rows, *part.shape[1:])).copy()
    pool[slots] = part
    return pool


@holds(WHOLE, longest=120)
def merges_into_the_whole(target: Any, case: Case) -> None:
    """The states of two halves, the second begun empty, merge into the state of the whole."""
    of = subject(target)
    case = require(of, case, "state", "merge")
    x = case.inputs()
    cut = int(rng_of(case).integers(0, case.n + 1))
    left, right = x.tokens(0, cut), x.tokens(cut, case.n).replace(state=None)
    right = right.replace(case=right.case.replace(state=False))
    results = []
    for piece in (left, right):
        given, _ = natives(of, piece)
        result = of.run(piece, given, return_state=True)
        if result.length is None:
            seen = np.zeros(case.batch, np.int64) if piece.state is None else piece.state[2]
            result.length = arrays.place(seen + piece.case.n, of.kind, "", of.device).array
        results.append(result)
    total = None
    if case.decay == "token":
        assert right.log_decay is not None
        total = arrays.place(right.log_decay.sum(1), of.kind, "float64", of.device).array
    before = [{name: part.copy() for name, part in result.read_state().items()} for result in results]
    got = of.merge(x, results[0], results[1], total)
    read = got.read_state()
    for result, parts in zip(results, before, strict=True):
        for name, part in result.read_state().items():
            assert_same(f"{name} that was merged", LETTERS[name], part, parts[name])
    assert_parts(read, call(of, x, return_state=True), twice(limits(of, x)), x)
    start = np.zeros(case.batch, np.int64) if x.state is None else x.state[2]
    assert_equal("length", read["length"].tolist(), (start + case.n).tolist())
