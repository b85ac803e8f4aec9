"""The CUDA kernels with CuPy arrays and torch tensors: streams, devices, graphs, finite differences."""

from __future__ import annotations

from typing import Any

import pytest

import linattn
from linattn import LRPE, State, registry
from tests.gpu.calls import HEADS, both, captured, drawn, same

torch = pytest.importorskip("torch")
cupy = pytest.importorskip("cupy")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(registry.get("cupy").unavailable() is not None, reason="CuPy finds no CUDA device"),
]


def moved(options: dict[str, Any], device: str) -> dict[str, Any]:
    found = {
        name: value.detach().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if isinstance(options.get("reweight"), LRPE):
        found["reweight"] = LRPE(options["reweight"].theta.to(device))
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
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
