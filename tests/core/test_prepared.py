"""Calls that were made before: whatever is wrong with the next one is refused as it was the first time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linattn
from linattn import LRPE, State, errors, known, prepared, registry
from linattn.backends.torch import backend as built_in

Tensor = torch.Tensor
B, H, D = 2, 3, 4


class Recorder:
    """The built-in backend for torch, with a decode step of its own; it notes what it was given."""

    on_host: bool
    name = "recorder"
    arrays = {"torch": False}  # noqa: RUF012 (a constant)

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, problem: Any) -> str | None:
        return None

    def forward(self, problem: Any, *arrays: Any) -> Any:
        self.given.append((problem, *arrays))
        return built_in.forward(problem, *arrays)

    def decode_step(self, problem: Any, *arrays: Any) -> Tensor:
        self.given.append((problem, *arrays))
        return arrays[2] * 1


@pytest.fixture(params=[False, True], ids=["on a device", "on the host"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A backend whose calls look as if their arrays lay on a device, or not."""
    if not request.param:
        monkeypatch.setattr(prepared, "_on_host", lambda call: False)
    known.forget()
    found = Recorder()
    found.on_host = request.param
    monkeypatch.setitem(registry.known(), found.name, found)
    yield found
    known.forget()


def step(**change: Any) -> Tensor:
    q = torch.ones(B, H, D)
    given = {"q": q, "k": q, "v": q, "state": State.zeros(q, B, H, D, D), "backend": "recorder"} | change
    return linattn.decode_step(
        given.pop("q"), given.pop("k"), given.pop("v"), given.pop("state"), **given
    )  # fmt: skip


ONES = torch.ones(B, H, D)
STEPS: dict[str, tuple[type[errors.LinattnError], str, dict[str, Any]]] = {
    "another rank": (errors.ShapeError, r"q must have shape \[B, H, D\]", {"q": ONES[:, None]}),
    "another dtype": (errors.DtypeError, "share one dtype", {"k": ONES.double()}),
    "another device": (errors.DeviceError, "on one device", {"v": ONES.to("meta")}),
    "another layout": (errors.ArgumentTypeError, "dense tensor", {"k": ONES.to_sparse()}),
    "1 for True": (errors.ArgumentTypeError, "normalize must be True or False, got 0", {"normalize": 0}),
    "True for 1": (errors.ArgumentTypeError, "scale must be a number", {"scale": True}),
    "check": (errors.ArgumentTypeError, "check must be True or False", {"check": 1}),
    "a decay's shape": (errors.ShapeError, "log_decay must have shape", {"log_decay": torch.zeros(B)}),
    "slots' shape": (errors.ShapeError, "slots must have shape", {"slots": torch.arange(3)}),
    "no state": (errors.ArgumentTypeError, "start with State.zeros", {"state": None}),
    "another state": (errors.StateError, "kv must have shape", {"state": State.zeros(ONES, 3, H, D, D)}),
    "a state of another problem": (
        errors.StateError, "its feature_map is", {"state": State.zeros(ONES, B, H, D, D, feature_map="relu")},
    ),
    "an expanded state": (
        errors.StateError, "is expanded",
        {"state": State(torch.zeros(1, H, D, D).expand(B, H, D, D), None, torch.zeros(B, dtype=torch.int64))},
    ),
    "a gradient": (errors.GradientError, "no gradient passes", {"q": ONES.clone().requires_grad_()}),
    "a backend": (errors.UnknownBackendError, "no backend named", {"backend": "tirton"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_after_others_is_refused(recorder: Recorder, name: str) -> None:
    error, words, change = STEPS[name]
    for _ in range(3):
        step()
    for _ in range(2):
        with pytest.raises(error, match=words):
            step(**change)
    assert len(recorder.given) == 3
    step()


def test_values_on_the_host_are_read_every_time(recorder: Recorder) -> None:
    decay, slots = -torch.ones(H), torch.tensor([0, 1])
    for _ in range(2):
        step(log_decay=decay, slots=slots, check=not recorder.on_host)
    for bad in ({"log_decay": -decay, "slots": slots}, {"log_decay": decay, "slots": torch.tensor([1, 1])}):
        with pytest.raises(errors.ValueRangeError):
            step(check=not recorder.on_host, **bad)


def test_a_step_gets_the_arrays_of_its_own_call(recorder: Recorder) -> None:
    for turn in range(3):
        q, k, v = (torch.full((B, H, D), float(turn + i)) for i in range(3))
        state, decay, theta = (
            State.zeros(q, B, H, D, D, reweight=LRPE(q[0])),
            -torch.rand(B, H),
            torch.rand(H, D),
        )
        o = step(q=q, k=k, v=v, state=state, log_decay=decay, reweight=LRPE(theta))
        assert torch.equal(o, v)
        problem, *got, memory, slots = recorder.given[-1]
        assert problem is recorder.given[0][0]
        assert memory is state and slots is None
        for a, b in zip(got, (q, k, v, decay, theta), strict=True):
            assert torch.equal(a, b)


def test_attention_is_no_step_of_the_same_shapes(recorder: Recorder) -> None:
    x = torch.ones(B, H, D)
    for _ in range(2):
        step(state=State.zeros(x, B, H, D, D))
    with pytest.raises(errors.ShapeError, match=r"q must have shape \[B, N, H, D\]"):
        linattn.attention(x, x, x, initial_state=State.zeros(x, B, H, D, D), backend="recorder")


def test_slots_without_a_state_are_refused_after_calls_without_slots(recorder: Recorder) -> None:
    x = torch.ones(1, B, H, D)
    for _ in range(2):
        linattn.attention(x, x, x, backend="recorder")
    with pytest.raises(errors.OptionError, match="slots needs initial_state"):
        linattn.attention(x, x, x, slots=torch.zeros(1, dtype=torch.int64), backend="recorder")


def test_a_table_of_another_dtype_is_brought_along(recorder: Recorder) -> None:
    x = torch.ones(1, B, H, D)
    for dtype in (torch.float32, torch.float64) * 2:
        linattn.attention(x, x, x, log_decay=-torch.ones(H, dtype=dtype), backend="recorder")
        step(log_decay=-torch.ones(H, dtype=dtype))
    assert len(recorder.given) == 8
    assert {call[4].dtype for call in recorder.given} == {torch.float32}


def test_modes_are_seen_by_calls_made_before(recorder: Recorder) -> None:
    x = torch.ones(1, B, H, D)

    def both() -> tuple[Tensor, Tensor]:
        return linattn.attention(x, x, x, backend="recorder"), step()

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ops.add(fn.name())
            return fn(*args, **(kwargs or {}))

    ops: set[str] = set()
    for _ in range(2):
        both()
    with torch.autocast("cpu", torch.bfloat16):
        assert [o.dtype for o in both()] == [torch.bfloat16] * 2
    with Watcher():
        both()
    assert {"linattn::attention", "linattn::decode_step"} <= ops
    with pytest.raises(errors.GradientError, match=r"torch\.func"):
        torch.vmap(lambda q: linattn.attention(q, q, q, backend="recorder"))(torch.ones(2, 1, B, H, D))


def test_a_state_made_in_inference_mode_stays_there(recorder: Recorder) -> None:
    with torch.inference_mode():
        state = State.zeros(torch.ones(1), B, H, D, D)
        for _ in range(3):
            step(state=state)
    with pytest.raises(errors.StateError, match="was made in inference mode"):
        step(state=state)


def test_meta_tensors_a_second_time() -> None:
    x = torch.ones(1, B, H, D, device="meta")
    for _ in range(3):
        assert linattn.attention(x, x, x).shape == x.shape


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_a_layout_without_strides_is_refused() -> None:
    x = torch.ones(1, B, H, D)
    with pytest.raises(errors.ArgumentTypeError, match="k must be a dense tensor"):
        linattn.attention(x, ONES[0].to_sparse_csr(), x)


@pytest.mark.parametrize("part", ["kv", "z", "length"])
def test_every_part_of_a_state_is_asked_whether_it_may_change(part: str) -> None:
    x = torch.rand(2, 3, 4)

    def one(state: State) -> None:
        linattn.decode_step(x, x, x, state, normalize=True)

    for _ in range(3):
        one(State.zeros(x, 2, 3, 4, 4, normalize=True))
    state = State.zeros(x, 2, 3, 4, 4, normalize=True)
    with torch.inference_mode():
        made = getattr(state, part).clone()
    parts = {"kv": state.kv, "z": state.z, "length": state.length} | {part: made}
    with pytest.raises(errors.StateError, match=rf"{part} was made in inference mode"):
        one(State(parts["kv"], parts["z"], parts["length"]))
    assert not parts["kv"].any()


def test_a_pool_without_rows_serves_padding_with_a_fixed_length_too() -> None:
    x = torch.ones(1, 2, 3, 4)
    c = linattn.Cosine(9)
    pool = State.zeros(x, 0, 3, 4, 4, reweight=c)
    o = linattn.attention(x, x, x, initial_state=pool, slots=torch.tensor([-1]), reweight=c)
    assert not o.any()
