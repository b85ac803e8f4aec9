"""The product on Hopper's tensor cores: every kind of call that it takes, against the specification."""

from __future__ import annotations

import math
from typing import Any

import pytest

import linattn
from linattn import Cosine, testing, tolerance
from linattn.backends.cupy import hopper, tape
from linattn.testing import arrays
from linattn.testing.properties.equality import compare_gradients, gradient_limits
from linattn.testing.properties.plan import assert_parts, limits, truth
from linattn.testing.subject import natives
from tests.gpu.calls import needs_cupy, needs_hopper

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [
    pytest.mark.gpu,
    needs_cupy,
    needs_hopper,
]

SIZES = [(128, 128), (64, 64), (128, 64), (64, 128), (64, 256), (128, 256)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"decay": "head", "rates": (0.0, 1e-3, 0.1)},
    "strong": {"decay": "head", "rates": (1.0, 20.0, 60.0)},
    "reset": {"decay": "head", "rates": (math.inf,)},
    "relu": {"decay": "head", "feature_map": "relu"},
    "silu": {"decay": "head", "feature_map": "silu", "scale": 0.5},
    "sums": {"feature_map": "elu+1", "normalize": True, "values": 1.0},
    "sums that decay": {"feature_map": "relu", "normalize": True, "decay": "head", "scale": 0.5},
    "cosformer": {"feature_map": "relu", "normalize": True, "reweight": "cosine"},
    "cosine": {"reweight": "cosine", "decay": "head", "scale": 0.25},
    "all": {"feature_map": "elu+1", "normalize": True, "reweight": "cosine", "decay": "head", "values": 1.0},
}
LENGTHS = (1, 63, 65, 200)


class Noticed:
    """The kernels of `hopper.launch`, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pieces: int | None = None) -> None:
        self.calls = 0
        tape._seen.clear()  # what is remembered was planned without us
        inner = hopper.launch

        def launch(*args: Any, **keywords: Any) -> None:
            self.calls += 1
            inner(*args, **keywords)

        monkeypatch.setattr(hopper, "launch", launch)
        if pieces is not None:
            monkeypatch.setattr(hopper, "pieces", lambda units, steps, count: min(pieces, steps))


def case(name: str, d: int, e: int, n: int, **more: Any) -> testing.Case:
    found = {"batch": 2, "heads": 2, "values": 4.0, **OPTIONS[name], **more}
    return testing.Case(dtype="bfloat16", d=d, e=e, n=n, seed=n + d + e, **found)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_forward(monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int], pieces: int) -> None:
    d, e = size
    noticed, of = Noticed(monkeypatch, pieces), testing.BackendSubject("cupy", "torch", "cuda")
    takes = not (OPTIONS[name].get("reweight") and d != 64)
    for n in LENGTHS:
        for state in (False, True):
            x = case(name, d, e, n, state=state).inputs()
            given, _ = natives(of, x)
            assert_parts(of.run(x, given, return_state=True).read(), truth(x), limits(of, x), x)
    assert noticed.calls == takes * 2 * len(LENGTHS)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize("name", ["plain", "decay", "strong", "reset", "relu", "silu", "cosine"])
def test_gradients(monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int], pieces: int) -> None:
    d, e = size
    noticed, of = Noticed(monkeypatch, pieces), testing.BackendSubject("cupy", "torch", "cuda")
    for n in LENGTHS:
        for state in (False, True):
            x = case(name, d, e, n, state=state).inputs()
            if not state:
                x = x.replace(dstate=None)
            given, _ = natives(of, x)
            do = arrays.place(x.do, "torch", "bfloat16", "cuda").array
            dstate = None
            if x.dstate is not None:
                dstate = tuple(
                    None if part is None else torch.as_tensor(part, device="cuda").float()
                    for part in x.dstate
                )
            found = of.vjp(x, given, do, dstate)
            names = [part for part in ("q", "k", "v", "log_decay") if found.get(part) is not None]
            want = linattn.reference.gradients(x.q, x.k, x.v, x.do, x.dstate, **x.options())
            read = {part: arrays.back(found[part]) for part in names}
            compare_gradients(read, {part: want[part] for part in names}, gradient_limits(of, x), x)
    assert noticed.calls or (OPTIONS[name].get("reweight") and d != 64)


@pytest.mark.parametrize("n", [65, 1000])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_gradients_with_a_fixed_decay(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], n: int) -> None:
    """Three products, all on tensor cores; against float64 on the same GPU, which other tests check."""
    d, e = size
    torch.manual_seed(n)
    q, k = (torch.randn(2, n, 3, d, device="cuda").bfloat16() for _ in range(2))
    v, do = (torch.randn(2, n, 3, e, device="cuda").bfloat16() for _ in range(2))
    g = torch.tensor([0.0, -0.01, -0.5], device="cuda")

    def gradients(dtype: torch.dtype, decay: torch.Tensor) -> list[torch.Tensor]:
        x = [part.detach().to(dtype, copy=True).requires_grad_() for part in (q, k, v)]
        linattn.attention(*x, log_decay=decay, scale=0.5, backend="cupy").backward(do.to(dtype))
        return [part.grad.double() for part in x]

    noticed = Noticed(monkeypatch)
    found = gradients(torch.bfloat16, g)
    assert noticed.calls == 4
    for got, want in zip(found, gradients(torch.float64, g.double()), strict=True):
        assert (got - want).norm() < tolerance.UNIT["bfloat16"] * want.norm()


def test_the_same_bits_every_time() -> None:
    """A race would show."""
    torch.manual_seed(0)
    for d, options in (
        (128, {"log_decay": -torch.rand(8, device="cuda")}),
        (64, {"reweight": Cosine(4096), "normalize": True}),
    ):
        q, k, v = (torch.randn(2, 3000, 8, d, device="cuda").bfloat16() for _ in range(3))
        given: dict[str, Any] = {"feature_map": "relu", "backend": "cupy", "return_state": True, **options}
        o, state = linattn.attention(q, k, v, **given)
        for _ in range(50):
            again, other = linattn.attention(q, k, v, **given)
            assert torch.equal(o, again)
            assert torch.equal(state.kv, other.kv)


def test_what_bulk_copies_cannot_move_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = Noticed(monkeypatch)
    q, k, v = (torch.randn(1, 100, 2, 65, device="cuda").bfloat16()[..., 1:] for _ in range(3))
    o = linattn.attention(q, k, v, backend="cupy")
    assert noticed.calls == 0
    same = linattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="cupy")
    assert noticed.calls == 1
    want = linattn.attention(q.double(), k.double(), v.double(), backend="cupy")
    for got in (o, same):
        assert (got.double() - want).norm() < tolerance.UNIT["bfloat16"] * want.norm()
