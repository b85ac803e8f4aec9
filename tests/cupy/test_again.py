"""Calls that came before: the same results from a tape, for other arrays, devices and shapes."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import linattn
from linattn import Cosine, State, checked, known, testing
from linattn.arrays import kind_of
from linattn.backends.cupy import CupyBackend, memory, sources, tape
from linattn.testing.subject import Natives, Result
from tests.cupy import pretended
from tests.cupy.hosted import COMPILER, Host
from tests.cupy.recorded import COSFORMER, Recorder
from tests.triton.drawing import check, drawn, rows

torch = pytest.importorskip("torch", reason="torch is not installed")

needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="g++ is not installed, by which the kernels run on a CPU"
)
LENGTHS = (1, 31, 33, 70)
TIMES = 3  # the third call is the first that does not plan


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    tape._seen.clear()


class Often(testing.BackendSubject):
    """The backend on torch tensors: every call is made several times, and the last one's result looked at."""

    def __init__(self) -> None:
        super().__init__(CupyBackend(runner=Host(), arrays={"torch": False}), "torch", "cpu")
        self.reach = 1000

    def axes(self) -> dict[str, tuple[Any, ...]]:
        return {"dtype": ("float32", "float64")}

    def run(
        self, x: testing.Inputs, given: Natives, *, return_state: bool = False, slots: Any = None
    ) -> Result:
        if slots is None:  # a pool would change every time
            for _ in range(TIMES - 1):
                super().run(x, given, return_state=return_state)
        return super().run(x, given, return_state=return_state, slots=slots)


PROPERTIES = ("matches_the_reference", "reads_any_strides", "splits_anywhere", "decodes_as_the_whole")


@needs_compiler
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    of = Often()
    assert check(of, name, (drawn(name, row, LENGTHS) for row in rows(of, name)))
    tapes = [found for *_, found in tape._seen.values() if found]
    assert any(found.steps for found in tapes)


def gradients(backend: CupyBackend, arrays: list[Any], **options: Any) -> list[Any]:
    leaves = [x.detach().requires_grad_() for x in arrays[:3]]
    o = linattn.attention(*leaves, backend=backend, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, arrays[3])]


CALLS: dict[str, dict[str, Any]] = {
    "decay": {"log_decay": torch.tensor([-0.1, -0.3])},
    "cosformer": COSFORMER,
    "not causal": COSFORMER | {"causal": False},
    "both ways": {"log_decay": torch.tensor([-0.1, -0.3]), "causal": False},
    "lengths": {"lengths": torch.tensor([20, 7])},
}


@needs_compiler
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_the_same_every_time(name: str) -> None:
    backend, options = CupyBackend(runner=Host(), arrays={"torch": False}), CALLS[name]
    inputs = [[torch.randn(2, 40, 2, 8) for _ in range(4)] for _ in range(5)]
    inputs[3][1] = inputs[3][0]  # one array in two places
    for arrays in inputs:
        fresh = CupyBackend(runner=Host(), arrays={"torch": False})
        got, want = (gradients(one, arrays, **options) for one in (backend, fresh))
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_a_plan_is_for_arrays_that_are_like_its_own() -> None:
    backend = CupyBackend(runner=Recorder(), arrays={"torch": False})
    problem = linattn.explain(*(torch.zeros(1, 8, 2, 4),) * 3, backend=backend).problem

    def steps(do: Any) -> list[str]:
        runner = backend.given
        assert isinstance(runner, Recorder)
        runner.kernels.clear()
        x = torch.zeros(1, 8, 2, 4)
        saved = linattn.backends.Saved(x, x, x)
        backend.backward(problem, saved, do, None)
        return [one.name for one in runner.kernels]

    plain = torch.zeros(1, 8, 2, 4)
    turned = torch.zeros(1, 2, 8, 4).transpose(1, 2)
    odd = torch.zeros(65)[1:].view(1, 8, 2, 4)
    want = steps(plain)
    for _ in range(2):
        for do in (plain, turned, odd):
            assert steps(do) == want
    found = next(found for *_, found in tape._seen.values() if found)
    x = torch.zeros(1, 8, 2, 4)
    arrays = [x, x, x, None, None, None, None, plain, *[None] * 6]
    assert found.play(tuple(arrays)) is not None
    for other in (turned, odd, plain.double(), plain[:, :7], None):
        arrays[7] = other
        assert found.play(tuple(arrays)) is None


class Noted(Recorder):
    """Keeps what kernels are told; of an array bulk copies are told its address, again and again."""

    def __init__(self) -> None:
        super().__init__(architecture=90)
        self.told: list[tuple[str, bytes]] = []

    def __call__(
        self, file: str, kernel: str, arguments: bytes, grid: int, threads: int, shared: int, like: Any
    ) -> None:
        self.told.append((file, arguments))

    def maps(self, *arrays: Any) -> bytes:
        return b"".join(memory.address(x).to_bytes(8, "little") * 16 for x in arrays)


def test_bulk_copies_are_told_about_new_arrays() -> None:
    runner = Noted()
    backend = CupyBackend(runner=runner, arrays={"torch": False})
    decay = torch.tensor([-0.1, -0.2])
    for turn in range(4):
        runner.told.clear()
        q, k, v = (torch.zeros(2, 600, 2, 64, dtype=torch.bfloat16) for _ in range(3))
        o = linattn.attention(q, k, v, log_decay=decay, backend=backend)
        assert [file for file, _ in runner.told] == ["hopper.cu"] * len(runner.told), turn
        layout = [name for name, _ in sources.fields("product.cu", "Arguments")]
        for _, told in runner.told:
            maps = (len(told) - 8 * len(layout)) // 128
            words = struct.unpack(f"<{len(told) // 8}Q", told)
            named = dict(zip(layout, words[16 * maps :], strict=False))
            assert words[: 16 * maps : 16][:3] == words[15 : 16 * maps : 16][:3]
            for place, name, x in ((0, "x", q), (1, "y", k), (2, "w", v), (maps - 1, "out", o)):
                assert words[16 * place] == named[name] == x.data_ptr(), (turn, name)
            assert named["log_decay"] == decay.data_ptr()
            assert named["N"] == 600


def test_what_cannot_be_planned_is_worked_out_every_time() -> None:
    """A state with gaps is copied, which is no launch of a kernel of ours."""
    backend = CupyBackend(runner=Recorder(), arrays={"torch": False})
    q = torch.zeros(2, 8, 2, 4)
    state = State(torch.zeros(2, 2, 4, 8)[..., ::2], None, torch.zeros(2, dtype=torch.int64))
    for _ in range(3):
        linattn.attention(q, q, q, initial_state=state, backend=backend)
    assert [found for *_, found in tape._seen.values()] == [False]


def test_memory_of_passes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "LIMIT", 3)
    backend = CupyBackend(runner=Recorder(), arrays={"torch": False})
    for n in range(1, 9):
        q = torch.zeros(1, n, 2, 4)
        linattn.attention(q, q, q, backend=backend)
    assert len(tape._seen) <= 3


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found = pretended.module()
    monkeypatch.setitem(sys.modules, "cupy", found)
    known.forget()
    yield found
    known.forget()


@needs_compiler
def test_cupy_arrays_are_checked_once(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And have the same bits as the same kernels find for NumPy arrays, which are planned every time."""
    backend, other_backend = (CupyBackend(runner=Host(), arrays={kind: False}) for kind in ("cupy", "numpy"))
    asked: list[str | None] = []
    plain = checked.problem_of

    def noticed(call: Any, **keywords: Any) -> Any:
        asked.append(kind_of(call.q))
        return plain(call, **keywords)

    monkeypatch.setattr(checked, "problem_of", noticed)
    decay = np.array([-0.1, -0.2], np.float32)
    for table in (decay, cupy.asarray(decay)):
        asked.clear()
        for seed in range(4):
            q, k, v = np.random.default_rng(seed).standard_normal((3, 1, 40, 2, 8), np.float32)
            given: dict[str, Any] = {"log_decay": decay, "return_state": True, "backend": other_backend}
            want, other = linattn.attention(q, k, v, **given)
            given |= {"log_decay": table, "backend": backend}
            o, state = linattn.attention(*map(cupy.asarray, (q, k, v)), **given)
            rows = [x[:, 3] for x in (q, k, v)]
            after = linattn.decode_step(*rows, other, log_decay=decay, backend=other_backend)
            token = linattn.decode_step(
                *map(cupy.asarray, rows), state, log_decay=table, backend=backend
            )  # fmt: skip
            for mine, right in ((o, want), (token, after), (state.kv, other.kv)):
                assert (mine.get() == right).all()
            assert state.length.get().tolist() == [41]
        assert asked.count("cupy") == 2


def test_true_is_no_1(cupy: Any) -> None:
    q = cupy.asarray(np.zeros((1, 4, 2, 8), np.float32))
    backend = CupyBackend(runner=Recorder(), arrays={"cupy": False})
    for _ in range(2):
        linattn.attention(q, q, q, causal=True, backend=backend)
        with pytest.raises(linattn.errors.ArgumentTypeError, match="causal must be True or False, got 1"):
            linattn.attention(q, q, q, causal=1, backend=backend)  # type: ignore[arg-type]


def test_cupy_arrays_are_made_on_the_device_of_the_call(cupy: Any) -> None:
    backend = CupyBackend(runner=Recorder(), arrays={"cupy": False})
    with cupy.cuda.Device(1):
        q = cupy.asarray(np.zeros((1, 4, 2, 8), np.float32))
    for _ in range(3):
        o, state = linattn.attention(q, q, q, log_decay=np.zeros(2), return_state=True, backend=backend)
        assert {x.device.id for x in (o, state.kv, state.length)} == {1}
        assert pretended.Device.current == 0
    state.length = q  # not looked at: a state of another call
    with pytest.raises(linattn.errors.LinattnError):
        linattn.attention(q, q, q, initial_state=state, backend=backend)


def test_arrays_of_another_kind_are_refused(cupy: Any) -> None:
    x = np.zeros((1, 4, 2, 8), np.float32)
    q = cupy.asarray(x)
    with pytest.raises(linattn.errors.ArgumentTypeError, match="one kind of array, got cupy, numpy, cupy"):
        linattn.attention(q, x, q)
    with pytest.raises(linattn.errors.UnsupportedError, match="takes cupy or torch arrays, got numpy"):
        linattn.attention(x, x, x, backend="cupy")
    with cupy.cuda.Device(1):
        k = cupy.asarray(x)
    with pytest.raises(linattn.errors.DeviceError, match="on one device, got cuda:0, cuda:1, cuda:0"):
        linattn.attention(q, k, q)
    mask = np.ones((1, 4), bool)
    with pytest.raises(linattn.errors.ArgumentTypeError, match="key_mask must be a cupy array as q is"):
        linattn.attention(q, q, q, key_mask=mask)


def test_cosine_is_told_apart_by_its_length(cupy: Any) -> None:
    q = cupy.asarray(np.zeros((1, 4, 2, 8), np.float32))
    backend = CupyBackend(runner=Recorder(), arrays={"cupy": False})
    for _ in range(2):
        linattn.attention(q, q, q, reweight=Cosine(4), backend=backend)
        with pytest.raises(linattn.errors.ValueRangeError, match="shorter than the call's 4 positions"):
            linattn.attention(q, q, q, reweight=Cosine(3), backend=backend)
