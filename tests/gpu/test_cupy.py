"""The CUDA kernels with CuPy arrays and torch tensors: streams, devices, graphs, finite differences."""

from __future__ import annotations

import concurrent.futures
import warnings
from typing import Any

import pytest

import linattn
from linattn import LRPE, Cosine, State, tolerance
from linattn.backends.cupy import tape
from tests.gpu.calls import HEADS, both, captured, drawn, needs_cupy, needs_two, same

torch = pytest.importorskip("torch", reason="torch is not installed")
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [
    pytest.mark.gpu,
    needs_cupy,
]


def moved(options: dict[str, Any], device: str) -> dict[str, Any]:
    found = {
        name: value.detach().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if isinstance(options.get("reweight"), LRPE):
        found["reweight"] = LRPE(options["reweight"].theta.to(device))
    return found


@needs_two
def test_on_another_device_than_the_current_one(options: dict[str, Any]) -> None:
    x = drawn(dtype=torch.float32, count=4)
    got = both(*(part.to("cuda:1") for part in x), backend="cupy", **moved(options, "cuda:1"))
    assert torch.cuda.current_device() == cupy.cuda.runtime.getDevice() == 0
    assert all(part.device.index == 1 for part in got)
    same([part.to("cuda:0") for part in got], both(*x, backend="cupy", **options))


def test_cupy_arrays_and_torch_tensors_have_the_same_bits(options: dict[str, Any]) -> None:
    q, k, v, do = drawn(dtype=torch.float64, count=4)
    given = {
        name: cupy.asarray(value) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if isinstance(options.get("reweight"), LRPE):
        given["reweight"] = LRPE(cupy.asarray(options["reweight"].theta))
    o, vjp = linattn.attention_vjp(*(cupy.asarray(x) for x in (q, k, v)), **given)
    grads = vjp(cupy.asarray(do))
    assert isinstance(o, cupy.ndarray)
    mine = [torch.as_tensor(x, device="cuda") for x in (o, grads["q"], grads["k"], grads["v"])]
    same(mine, both(q, k, v, do, backend="cupy", **options))


def test_runs_on_the_callers_stream() -> None:
    q, k, v = drawn(dtype=torch.float32)
    want = linattn.attention(q, k, v, backend="cupy")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late = q * 1
        got = linattn.attention(late, k, v, backend="cupy")
    assert not side.query()
    side.synchronize()
    same([got], [want])


def test_is_captured_in_a_graph(options: dict[str, Any]) -> None:
    q, k, v = drawn(dtype=torch.float32)
    graph, o = captured(lambda: linattn.attention(q, k, v, backend="cupy", **options))
    q.mul_(0.5)
    graph.replay()
    same([o], [linattn.attention(q, k, v, backend="cupy", **options)])


@needs_two
def test_cupy_arrays_on_another_device_than_the_current_one() -> None:
    x = [cupy.asarray(part) for part in drawn(dtype=torch.float32)]
    with cupy.cuda.Device(1):
        moved_there = [cupy.array(part) for part in x]
    table = linattn.decay.alibi(HEADS)
    want, _ = linattn.attention(*x, log_decay=table, return_state=True)
    for _ in range(4):
        o, state = linattn.attention(*moved_there, log_decay=table, return_state=True)
        assert {part.device.id for part in (o, state.kv, state.length)} == {1}
        assert cupy.cuda.runtime.getDevice() == 0
        assert (cupy.asnumpy(o) == cupy.asnumpy(want)).all()


def test_called_again_with_other_tensors(options: dict[str, Any]) -> None:
    """What is remembered of a call is about its shapes: not about addresses, aliases or alignment."""
    q, k, v, do = drawn(count=4)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view_as(q).copy_(q)
    assert odd.data_ptr() % 16
    calls = [(q, k, v), (q, q, q), (q.clone(), k.clone(), v), (k, q, k), (odd, k, v), (q, k, v)]
    want = []
    for x in calls:
        tape._seen.clear()
        want.append([part.clone() for part in both(*x, do, backend="cupy", **options)])
    for order in (calls, calls[::-1], calls * 2):
        for x in order:
            place = next(i for i, other in enumerate(calls) if other is x)
            same(both(*x, do, backend="cupy", **options), want[place])


def test_on_several_streams_and_threads(options: dict[str, Any]) -> None:
    inputs = [drawn(count=4, seed=seed) for seed in range(4)]
    want = [both(*x, backend="cupy", **options) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()

    def many(i: int) -> list[Any]:
        with torch.cuda.stream(streams[i]):
            found = [both(*inputs[i], backend="cupy", **options) for _ in range(8)]
        streams[i].synchronize()
        return found

    with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
        for right, found in zip(want, pool.map(many, range(len(inputs))), strict=True):
            for mine in found:
                same(mine, right)


def test_runs_on_cupys_stream() -> None:
    q, k, v = (cupy.asarray(x) for x in drawn(dtype=torch.float32))
    want = linattn.attention(q, k, v)
    cupy.cuda.Device().synchronize()
    for _ in range(4):
        with cupy.cuda.Stream(non_blocking=True) as side:
            late = q * 1
            for _ in range(50):
                late = late * 1
            got = linattn.attention(late, k, v)
        side.synchronize()
        assert (got == want).all()


def test_nothing_is_deprecated() -> None:
    q, k, v = drawn(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            linattn.attention(q, k, v, backend="cupy")


DECODED = {
    "decay": {"log_decay": True},
    "cosformer": {"reweight": Cosine(512), "feature_map": "relu", "normalize": True},
    "lrpe": {"log_decay": True, "lrpe": True, "feature_map": "silu"},
}


@pytest.mark.parametrize(
    "sizes", [(64, 64), (128, 128), (100, 72), (33, 130), (256, 256), (600, 40)], ids=str
)
@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("batch", [2, 300], ids=["few", "many"])
def test_decode_steps_of_usual_sizes(name: str, sizes: tuple[int, int], batch: int) -> None:
    """Several blocks of threads for a head, and states that no cache holds; against torch, in float64."""
    torch.manual_seed(0)
    (d, e), heads = sizes, 3
    options = dict(DECODED[name])
    if options.pop("lrpe", False):
        options["reweight"] = LRPE(torch.rand(heads, d, device="cuda").double())
    if options.pop("log_decay", False):
        options["log_decay"] = -torch.rand(heads, device="cuda").double()
    slots = torch.randperm(batch + 2, device="cuda")[:batch]
    slots[1] = -1
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        token = [torch.randn(batch, heads, size, device="cuda").to(dtype) for size in (d, d, e)]
        named = {part: options.get(part) for part in ("reweight", "feature_map")}
        mine = State.zeros(
            token[0], batch + 2, heads, d, e, normalize=options.get("normalize", False), **named
        )
        mine.kv.uniform_(0, 1)
        if mine.z is not None:
            mine.z.uniform_(1, 2)
        kv, z = (None if x is None else x.to(torch.float64, copy=True) for x in (mine.kv, mine.z))
        other = State(kv, z, mine.length.clone(), mine.feature_map, mine.reweight, d)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        given = {part: value.to(acc) if part == "log_decay" else value for part, value in options.items()}
        for _ in range(3):
            o = linattn.decode_step(*token, mine, slots=slots, backend="cupy", **given)
            want = linattn.decode_step(
                *(part.double() for part in token), other, slots=slots, backend="torch", **options
            )
        unit, own = (tolerance.UNIT[str(kind).removeprefix("torch.")] for kind in (acc, dtype))
        assert (o - want).norm() <= ((d**0.5 + 4) * unit + own) * want.norm()
        assert (mine.kv - other.kv).norm() <= 8 * unit * other.kv.norm()
        assert torch.equal(mine.length, other.length)


def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    if "log_decay" in options and options["log_decay"].ndim == 3:
        options = {"log_decay": options["log_decay"][:, :5, :2]}
    small = {
        name: value[:2] if name == "log_decay" and value.ndim == 1 else value
        for name, value in options.items()
    }
    if "log_decay" in small:
        small["log_decay"] = small["log_decay"].double().requires_grad_()
    if isinstance(options.get("reweight"), LRPE):
        small["reweight"] = LRPE(options["reweight"].theta[:2, :3].double().requires_grad_())
    q, k, v = (x.requires_grad_() for x in drawn(2, 5, 2, 3, dtype=torch.float64))
    decay = small.get("log_decay")

    def call(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return linattn.attention(q, k, v, backend="cupy", **small)

    assert torch.autograd.gradcheck(call, (q, k, v, *([] if decay is None else [decay])))


def test_decode_steps_change_the_state_in_place() -> None:
    q, k, v = (x[:, 0].contiguous() for x in drawn(dtype=torch.float32))
    decay = -torch.rand(HEADS, device="cuda")
    state = State.zeros(q, 2, HEADS, 64, 64)
    other = State.zeros(cupy.asarray(q), 2, HEADS, 64, 64)
    kv = state.kv
    for _ in range(3):
        o = linattn.decode_step(q, k, v, state, log_decay=decay, backend="cupy")
        again = linattn.decode_step(
            *(cupy.asarray(x) for x in (q, k, v)), other, log_decay=cupy.asarray(decay)
        )
    assert state.kv is kv
    assert state.length.tolist() == other.length.tolist() == [3, 3]
    same([o, state.kv], [torch.as_tensor(x, device="cuda") for x in (again, other.kv)])
