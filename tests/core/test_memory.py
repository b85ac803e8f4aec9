"""What arrays may look like in memory: negated views, nested tensors, states that overlap, mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import linattn
from linattn import LRPE, State, errors, registry
from linattn.backends import Saved
from linattn.backends.torch import TorchBackend

Tensor = torch.Tensor
B, N, H, D = 2, 5, 3, 4


class Reader(TorchBackend):
    """The built-in backend for torch, as one that reads memory: a negated view would have the wrong sign."""

    name = "reader"
    arrays = {"torch": False}  # noqa: RUF012 (a constant)

    def look(self, *given: Any) -> None:
        for x in given:
            if isinstance(x, State):
                self.look(x.kv, x.z, x.length)
            elif isinstance(x, Saved):
                self.look(*vars(x).values())
            elif isinstance(x, Tensor):
                assert not x.is_neg()

    def forward(self, problem: Any, *arrays: Any) -> Any:
        self.look(*arrays)
        return super().forward(problem, *arrays)

    def backward(self, problem: Any, saved: Any, do: Tensor, dstate: Any) -> Any:
        self.look(saved, do, dstate)
        return super().backward(problem, saved, do, dstate)

    def decode_step(self, problem: Any, *arrays: Any) -> Tensor:
        self.look(*arrays)
        return super().decode_step(problem, *arrays)


@pytest.fixture(autouse=True)
def _reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.known(), "reader", Reader())


def negated(*shape: int, real: bool = False) -> Tensor:
    """A view whose signs are not those in memory."""
    z = torch.randn(*shape, dtype=torch.complex128)
    x = torch.complex(z.real, z.imag.abs() if real else z.imag).conj().imag
    assert x.is_neg()
    return x


@pytest.mark.parametrize("which", ["q", "k", "v", "log_decay", "theta", "state"])
def test_negated_views_have_their_sign(which: str) -> None:
    torch.manual_seed(0)
    x: dict[str, Any] = {name: torch.randn(B, N, H, D, dtype=torch.float64) for name in "qkv"}
    x |= {"log_decay": -torch.rand(H, dtype=torch.float64), "theta": torch.rand(H, D, dtype=torch.float64)}
    shapes = {"log_decay": (H,), "theta": (H, D)}
    kv = torch.randn(B, H, 2 * D, D, dtype=torch.float64)
    if which == "state":
        kv = negated(B, H, 2 * D, D)
    else:
        x[which] = negated(*shapes.get(which, (B, N, H, D)), real=which == "log_decay")

    def run(x: dict[str, Any], kv: Tensor, backend: str) -> list[Tensor]:
        state = State(kv, None, torch.zeros(B, dtype=torch.int64))
        options: dict[str, Any] = {"log_decay": x["log_decay"], "reweight": LRPE(x["theta"])}
        leaves = [x[name].detach().requires_grad_() for name in "qkv"]
        out = []
        for _ in range(2):  # as the first of its kind, and as one that is remembered
            with torch.no_grad():
                out.append(linattn.attention(*leaves, initial_state=state, backend=backend, **options))
            o = linattn.attention(*leaves, initial_state=state, backend=backend, **options)
            out += [o.detach(), *torch.autograd.grad(o, leaves, negated(B, N, H, D) * 0 + 1)]
            own = State(kv.resolve_neg().clone(), None, torch.zeros(B, dtype=torch.int64))
            token = [part[:, 0].detach() for part in leaves]
            out += [linattn.decode_step(*token, own, backend=backend, **options), own.kv]
        return out

    plain = {name: part.resolve_neg() for name, part in x.items()}
    run(plain, kv.resolve_neg(), "reader")  # what is remembered of these must not serve the others
    for mine, right in zip(run(x, kv, "reader"), run(plain, kv.resolve_neg(), "torch"), strict=True):
        assert torch.equal(mine, right)


def test_gradients_may_be_negated_views() -> None:
    x = [torch.randn(B, N, H, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    do = negated(B, N, H, D)

    def gradients(backend: str, do: Tensor) -> Any:
        return torch.autograd.grad(linattn.attention(*x, backend=backend), x, do)

    for mine, right in zip(gradients("reader", do), gradients("torch", do.resolve_neg()), strict=True):
        assert torch.equal(mine, right)


def test_negated_views_have_their_sign_without_autograd_too() -> None:
    given = [negated(B, N, H, D) for _ in range(4)]
    start, end = (State(negated(B, H, D, D), None, torch.zeros(B, dtype=torch.int64)) for _ in range(2))

    def plain(state: State) -> State:
        return State(state.kv.resolve_neg(), None, state.length)

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, start: State, end: State) -> list[Any]:
        (o, state), vjp = linattn.attention_vjp(
            q, k, v, initial_state=start, return_state=True, backend=backend
        )
        found = vjp(do, end)
        return [o, state.kv, *(found[name] for name in "qkv"), found["initial_state"].kv]

    right = run("torch", *(x.resolve_neg() for x in given), plain(start), plain(end))
    for mine, wanted in zip(run("reader", *given, start, end), right, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_nested_tensors_are_refused() -> None:
    x = torch.randn(1, N, H, D)
    nested = torch.nested.nested_tensor([torch.randn(N, H, D)])
    for given in ((nested, x, x), (x, nested, x), (x, x, nested)):
        with pytest.raises(errors.ArgumentTypeError, match="must be a dense tensor, it is nested"):
            linattn.attention(*given)
    with pytest.raises(errors.ArgumentTypeError, match="q must be a dense tensor, it is nested"):
        linattn.decode_step(nested, x[:, 0], x[:, 0], State.zeros(x, 1, H, D, D))


def test_a_step_refuses_a_mixture() -> None:
    x = torch.randn(1, H, D)
    with pytest.raises(errors.ArgumentTypeError, match="one kind of array, got torch, numpy, torch"):
        linattn.decode_step(x, x.numpy(), x, State.zeros(x, 1, H, D, D))


def test_states_that_change_may_not_overlap() -> None:
    x, length = torch.randn(3, H, D), torch.zeros(3, dtype=torch.int64)
    memory = torch.zeros(1000)
    wrong = {
        "overlaps itself": memory.as_strided((3, H, D, D), (D * D, D * D, D, 1)),
        "is expanded": memory[: H * D * D].view(1, H, D, D).expand(3, H, D, D),
        "is a negated view": torch.zeros(3, H, D, D, dtype=torch.complex64).conj().imag,
    }
    for says, kv in wrong.items():
        with pytest.raises(errors.StateError, match=says):
            linattn.decode_step(x, x, x, State(kv, None, length))
    apart = [
        memory[: 3 * H * D * D * 2].view(3, H, D, D, 2)[..., 1],
        memory[: 3 * H * D * D].view(H, 3, D, D).transpose(0, 1),
        memory[: 6 * H * D * D].view(6, H, D, D)[::2],
        memory[: 3 * H * D * D].view(3, H, D, D).mT,
    ]
    for kv in apart:
        linattn.decode_step(x, x, x, State(kv, None, length))


def test_meta_tensors_have_no_values_to_check() -> None:
    x = torch.empty(1, N, H, D, device="meta")
    o = linattn.attention(x, x, x, log_decay=torch.empty(H, device="meta"), check=True)
    assert o.shape == x.shape


def test_storages_stay_their_owners() -> None:
    """NumPy fixes the size of what it looks at, and FSDP frees parameters between calls."""
    theta, lengths, q = torch.ones(2, 4), torch.tensor([3]), torch.randn(1, 5, 2, 4)
    linattn.attention(q, q, q, reweight=linattn.LRPE(theta), lengths=lengths)
    assert theta.untyped_storage().resizable() and lengths.untyped_storage().resizable()
