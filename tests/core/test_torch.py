"""What torch users build on: autograd, compilers, autocast, transforms refused, what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import linattn
from linattn import LRPE, Cosine, State, errors

B, N, H, D, E = 2, 37, 2, 3, 5
Tensor = torch.Tensor
# torch's own forward mode compiles TorchScript on first use, which torch itself calls deprecated.
OWN_WARNING = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def x() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "q": (B, N, H, D), "k": (B, N, H, D), "v": (B, N, H, E), "theta": (H, D), "kv": (B, H, 2 * D, E),
        "z": (B, H, 2 * D),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["head"] = -torch.rand(H, dtype=torch.float64)
    tensors["token"] = -torch.rand(B, N, H, dtype=torch.float64)
    tensors["z"] = tensors["z"].abs()
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def everything(decay: str, normalize: bool) -> tuple[list[str], Callable[..., Any]]:
    """A call with every differentiable input, and the names of those."""
    names = ["q", "k", "v", decay, "theta", "kv", *(["z"] if normalize else [])]

    def call(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, theta: Tensor, kv: Tensor, z: Tensor | None = None
    ) -> Any:
        start = State(kv, z, torch.zeros(B, dtype=torch.int64))
        o, final = linattn.attention(
            q, k, v, log_decay=log_decay, reweight=LRPE(theta), feature_map="elu+1", normalize=normalize,
            initial_state=start, return_state=True,
        )  # fmt: skip
        return (o, final.kv) if final.z is None else (o, final.kv, final.z)

    return names, call


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_of_every_differentiable_input(x: dict[str, Tensor], decay: str, normalize: bool) -> None:
    names, call = everything(decay, normalize)
    assert torch.autograd.gradcheck(call, [x[name] for name in names], fast_mode=True)


def test_gradcheck_not_causal_cross(x: dict[str, Tensor]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, head: Tensor) -> Any:
        return linattn.attention(
            q[:, :20], k, v, log_decay=head, reweight=Cosine(64), feature_map="silu", causal=False
        )

    assert torch.autograd.gradcheck(call, [x[name] for name in ("q", "k", "v", "head")], fast_mode=True)


OPTIONS = (None, "elu+1", True, 1e-6, True, 1.0, True, "ieee", False, "torch")


@pytest.mark.parametrize("seqlens", [False, True])
def test_opcheck_of_attention(x: dict[str, Tensor], seqlens: bool) -> None:
    q, k, v = (x[name][: 1 if seqlens else B].detach().requires_grad_() for name in "qkv")
    cu = torch.tensor([0, 9, N]) if seqlens else None
    args = (q, k, v, x["head"], x["theta"], None, None, cu, x["kv"], x["z"], *OPTIONS)
    torch.library.opcheck(torch.ops.linattn.attention.default, args)
    options = (64, "relu", True, 1e-6, False, 1.0, False, "ieee", False, "auto")
    plain = (q, k, v, *[None] * 7, *options)
    torch.library.opcheck(torch.ops.linattn.attention.default, plain)


@pytest.mark.parametrize("slots", [False, True])
def test_opcheck_of_decode_step(x: dict[str, Tensor], slots: bool) -> None:
    q, k, v, kv, z = (x[name].detach() for name in ("q", "k", "v", "kv", "z"))
    place = torch.tensor([1, -1]) if slots else None
    args = (
        q[:, 0], k[:, 0], v[:, 0], kv, z, torch.zeros(B, dtype=torch.int64), x["head"].detach(),
        x["theta"].detach(), place, None, "elu+1", True, 1e-6, 1.0, "ieee", "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.linattn.decode_step.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(x: dict[str, Tensor], dynamic: bool) -> None:
    names, call = everything("token", True)

    def loss(*tensors: Tensor) -> Tensor:
        return sum(part.sin().sum() for part in call(*tensors))  # type: ignore[return-value]

    inputs = [x[name] for name in names]
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(*inputs), inputs),
        torch.autograd.grad(loss(*inputs), inputs),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_compiled_with_a_length_that_changes() -> None:
    compiled = torch.compile(linattn.cosformer_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 70, 33):
        q = torch.randn(1, n, 2, 4)
        assert torch.equal(compiled(q, q, q), linattn.cosformer_attention(q, q, q))


@torch.no_grad()
def test_compiled_states_slots_and_steps(x: dict[str, Tensor]) -> None:
    def serve(q: Tensor, k: Tensor, v: Tensor, pool: State, slots: Tensor) -> tuple[Tensor, Tensor, State]:
        o = linattn.attention(q, k, v, log_decay=decay, initial_state=pool, slots=slots)
        step = linattn.decode_step(q[:, 0], k[:, 0], v[:, 0], pool, log_decay=decay, slots=slots)
        _, fresh = linattn.attention(q, k, v, return_state=True)
        return o, step, fresh

    decay = linattn.decay.alibi(H)  # a NumPy table
    q, k, v = (x[name].detach() for name in "qkv")
    slots = torch.tensor([3, -1])
    pools = [State.zeros(q, 5, H, D, E) for _ in range(2)]
    got = torch.compile(serve, fullgraph=True, backend="aot_eager")(q, k, v, pools[0], slots)
    want = serve(q, k, v, pools[1], slots)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2].kv, want[2].kv)
    assert torch.equal(pools[0].kv, pools[1].kv)
    assert pools[0].length.tolist() == [0, 0, 0, N + 1, 0]
    assert (want[0][1] == 0).all()


def test_used_twice_in_one_graph(x: dict[str, Tensor]) -> None:
    q, k, v = x["q"], x["k"], x["v"]
    o = linattn.attention(q, k, v)
    twice = linattn.attention(o[..., :D], k, v) + linattn.attention(q, k, o)
    loss = (twice * twice).sum()
    (got,) = torch.autograd.grad(loss, k, retain_graph=True)
    (again,) = torch.autograd.grad(loss, k)
    assert torch.equal(got, again)
    assert torch.autograd.gradcheck(
        lambda k: linattn.attention(linattn.attention(q, k, v)[..., :D], k, v).sum(), [k], fast_mode=True
    )


def test_autocast_lowers_q_k_v_and_keeps_the_tables() -> None:
    q, k = torch.randn(1, 9, 2, 4, requires_grad=True), torch.randn(1, 9, 2, 4).bfloat16()
    theta = torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        o = linattn.attention(q, k, q, reweight=LRPE(theta))
    assert o.dtype == torch.bfloat16
    o.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
    assert theta.grad is not None and theta.grad.dtype == torch.float32


def test_what_is_kept_for_backward_is_the_inputs_and_at_most_o() -> None:
    sizes: list[int] = []
    q = torch.randn(1, 512, 2, 16, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linattn.cosformer_attention(q, q, q, causal=True)
    assert sum(sizes) <= 4 * q.numel()  # q, k, v, o


def test_second_derivatives_are_refused(x: dict[str, Tensor]) -> None:
    (grad,) = torch.autograd.grad(linattn.attention(x["q"], x["k"], x["v"]).sum(), x["q"], create_graph=True)
    with pytest.raises(errors.GradientError, match="double backward is not offered"):
        grad.sum().backward()


@OWN_WARNING
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_are_refused(transform: str) -> None:
    q = torch.randn(3, 1, 4, 2, 2)

    def run(q: Tensor) -> Tensor:
        return linattn.attention(q, q, q).sum()

    transforms: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.vmap(run)(q),
        "grad": lambda: torch.func.grad(run)(q[0]),
        "jvp": lambda: torch.func.jvp(run, (q[0],), (q[0],)),
    }
    with pytest.raises(errors.GradientError, match=r"torch\.func transforms"):
        transforms[transform]()


@OWN_WARNING
def test_forward_mode_is_refused() -> None:
    q = torch.randn(1, 4, 2, 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(errors.GradientError, match="forward-mode"):
            linattn.attention(dual, q, q)


def test_meta_tensors_give_shapes() -> None:
    q = torch.empty(2, 9, 3, 4, device="meta")
    o, state = linattn.attention(q, q, q, return_state=True, reweight=Cosine(16))
    assert o.shape == (2, 9, 3, 4)
    assert state.kv.shape == (2, 3, 8, 4)
    assert state.kv.device.type == "meta"


def test_a_process_wide_setting_does_not_round_float32(x: dict[str, Tensor]) -> None:
    q, k, v = (x[name].detach().float() for name in "qkv")
    want = linattn.attention(q, k, v)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = linattn.attention(q, k, v)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, want)
