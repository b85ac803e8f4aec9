"""Memory: strides, guard bands, unwritten buffers, arguments left alone, the same bits again."""

from __future__ import annotations

from typing import Any

from linattn.testing import arrays
from linattn.testing.case import Case, Inputs
from linattn.testing.compare import assert_equal, assert_finite, assert_same
from linattn.testing.properties.equality import (
    compare_gradients,
    gradient_limits,
    gradients,
    pieces,
    upstream,
)
from linattn.testing.properties.plan import assert_parts, holds, limits, twice
from linattn.testing.properties.selection import want_state
from linattn.testing.subject import LETTERS, Subject, call, natives, require, subject

SIZES = (0, 1, 2, 17, 64, 65, 150)
BACKWARD = 40


def _with_gradients(of: Subject, x: Inputs, state: bool) -> Inputs | None:
    """The inputs of a backward pass, where it is offered and short enough to be worth the time."""
    if x.case.n > BACKWARD or of.missing(x.case, "gradients") is not None:
        return None
    return x if state else x.replace(dstate=None)


@holds(sizes=SIZES, layouts=("strided",), fixed={"heads": 2})
def reads_any_strides(target: Any, case: Case) -> None:
    """Arguments in any memory order, with gaps of NaN between their elements, give what plain ones give."""
    _same_as_plain(target, case.replace(layout="strided"))


@holds(sizes=SIZES, layouts=("offset",), fixed={"heads": 2})
def reads_only_its_inputs(target: Any, case: Case) -> None:
    """Arguments between bands of NaN, at an odd offset, give what plain ones give: nothing beside them is
    read.
    """
    _same_as_plain(target, case.replace(layout="offset"))


def _same_as_plain(target: Any, case: Case) -> None:
    of = subject(target)
    case = require(of, case)
    x = case.inputs()
    plain = x.replace(layout="plain")
    state = want_state(of, case)
    got, want = call(of, x, return_state=state), call(of, plain, return_state=state)
    assert_parts(got, want, twice(limits(of, x)), x)
    if (backward := _with_gradients(of, x, state)) is not None:
        found, wanted = gradients(of, backward), gradients(of, backward, "plain")
        compare_gradients(found, wanted, gradient_limits(of, backward), x, 2.0)


@holds(sizes=SIZES, fixed={"heads": 2})
def leaves_its_inputs_alone(target: Any, case: Case) -> None:
    """A call, and its backward pass, change no bit of their arguments or of the memory around them."""
    of = subject(target)
    case = require(of, case.replace(layout="offset"))
    x = case.inputs()
    state = want_state(of, case)
    given, buffers = natives(of, x)
    before = {name: arrays.back(buffer).copy() for name, buffer in buffers.items()}
    of.run(x, given, return_state=state)
    for name, buffer in buffers.items():
        assert_same(f"{name}, around it too,", "element", arrays.back(buffer), before[name])
    if (backward := _with_gradients(of, x, state)) is None or backward.do is None:
        return
    do = arrays.place(backward.do, of.kind, case.dtype, of.device, "offset")
    _, last = upstream(of, backward, "plain")
    sent = arrays.back(do.buffer).copy()
    of.vjp(backward, given, do.array, last)
    assert_same("do, around it too,", "element", arrays.back(do.buffer), sent)
    for name, g, part in zip(("kv", "z"), last or (), backward.dstate or (), strict=False):
        if part is not None:
            assert_same(f"gradient of the state's {name}", "element", arrays.back(g), part)
    for name, buffer in buffers.items():
        assert_same(f"{name} after the backward pass", "element", arrays.back(buffer), before[name])


@holds(sizes=SIZES, fixed={"heads": 2})
def writes_every_output(target: Any, case: Case) -> None:
    """With every fresh buffer full of NaN, outputs, states and gradients are finite: each element is
    written.
    """
    of = subject(target)
    case = require(of, case)
    x = case.inputs()
    state = want_state(of, case)
    # a float16 result may be infinite by right, and only the definition knows
    checked = case.dtype != "float16" or not case.normalize
    with arrays.fresh_buffers_are_nan(of.kind):
        got = call(of, x, return_state=state)
        backward = _with_gradients(of, x, state)
        grads = {} if backward is None else gradients(of, backward)
    if not checked:
        return
    for name, part in got.items():
        assert_finite(name, LETTERS[name], part)
    for name, piece in pieces(grads):
        if case.dtype != "float16":
            assert_finite(f"gradient of {name}", "element", piece)


@holds(sizes=SIZES, fixed={"heads": 2})
def gives_the_same_bits_twice(target: Any, case: Case) -> None:
    """The same inputs give the same bits, run after run, forward and backward."""
    of = subject(target)
    case = require(of, case)
    x = case.inputs()
    state = want_state(of, case)
    first, again = call(of, x, return_state=state), call(of, x, return_state=state)
    for name, part in first.items():
        assert_same(name, LETTERS[name], again[name], part)
    if (backward := _with_gradients(of, x, state)) is not None:
        once, more = gradients(of, backward), gradients(of, backward)
        for (name, want), (_, got) in zip(pieces(once), pieces(more), strict=True):
            assert_same(f"gradient of {name}", "element", got, want)


@holds(sizes=(0, 1, 17, 40), fixed={"heads": 2})
def returns_memory_of_its_own(target: Any, case: Case) -> None:
    """What a call returned stays as it is when another call runs, and shares nothing with its arguments.

    A kernel may hand a state through that no token follows; what serves pools may not.
    """
    of = subject(target)
    if of.missing(case, "pool"):
        case = case.replace(n=max(case.n, 1))
    case = require(of, case)
    x, other = case.inputs(), case.replace(seed=case.seed + 1).inputs()
    state = want_state(of, case)
    given, _ = natives(of, x)
    first = of.run(x, given, return_state=state)
    kept = {name: part.copy() for name, part in first.read().items()}
    call(of, other, return_state=state)
    for name in given:
        given[name][...] = 0
    for name, part in first.read().items():
        assert_same(f"{name} after another call", LETTERS[name], part, kept[name])
    if (backward := _with_gradients(of, x, state)) is not None and backward.do is not None:
        grads = of.vjp(backward, natives(of, x)[0], *upstream(of, backward))
        found = [arrays.back(piece).copy() for _, piece in pieces(grads)]
        gradients(of, other if state else other.replace(dstate=None))
        for (name, piece), part in zip(pieces(grads), found, strict=True):
            assert_same(f"gradient of {name} after another", "element", arrays.back(piece), part)


@holds(sizes=(0, 1, 5, 65), fixed={"heads": 2})
def returns_the_right_kind(target: Any, case: Case) -> None:
    """Outputs and gradients have the arguments' kind, dtype, device and shape; states are float32 or
    wider.
    """
    of = subject(target)
    case = require(of, case)
    x = case.inputs()
    state = want_state(of, case)
    given, _ = natives(of, x)
    result = of.run(x, given, return_state=state)
    like = arrays.facts(given["q"])
    assert_equal("kind, dtype and device of o", arrays.facts(result.o), like)
    assert_equal("shape of o", tuple(result.o.shape), (*x.q.shape[:3], case.e))
    for name in ("kv", "z"):
        part = getattr(result, name)
        if part is not None:
            assert_equal(
                f"kind, dtype and device of {name}", arrays.facts(part), (like[0], case.accumulate, like[2])
            )
    if (backward := _with_gradients(of, x, state)) is None or backward.do is None:
        return
    for name, grad in of.vjp(backward, given, *upstream(of, backward)).items():
        if name in given and grad is not None:
            assert_equal(
                f"kind, dtype and device of the gradient of {name}",
                arrays.facts(grad),
                arrays.facts(given[name]),
            )
            assert_equal(f"shape of the gradient of {name}", tuple(grad.shape), tuple(given[name].shape))
