"""What torch users build on: autograd, compilers, autocast, transforms refused, what is kept for backward."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import linattn
from linattn import LRPE, Cosine, State, errors, tolerance

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


ONCE = """
import torch, linattn
graphs = []
run = torch.compile(
    lambda *x: linattn.attention(*x, backend="torch") * 1.0, fullgraph=True,
    backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
)
x = [torch.randn(1, 8, 2, 4) for _ in range(3)]
for _ in range(3):
    run(*x)
assert len(graphs) == 1, len(graphs)
"""


def test_a_compiled_first_call_is_compiled_once() -> None:
    subprocess.run([sys.executable, "-c", ONCE], check=True)


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


def test_gradients_in_batches_are_refused() -> None:
    q = torch.randn(1, 4, 2, 2, requires_grad=True)
    many = torch.randn(3, *q.shape)

    o = linattn.attention(q, q, q)

    def gradient(do: Tensor) -> Tensor:
        return torch.autograd.grad(o, q, do, retain_graph=True)[0]

    for run in (
        lambda: torch.vmap(gradient)(many),
        lambda: torch.autograd.grad(o, q, many, is_grads_batched=True),
        lambda: torch.autograd.functional.jacobian(
            lambda x: linattn.attention(x, q, q).sum(3), q, vectorize=True
        ),
    ):
        with pytest.raises(errors.GradientError, match="gradients in batches"):
            run()


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


def test_autocast_lowers_the_inputs_and_not_the_sums() -> None:
    """The state is float32 whatever the inputs are, inside autocast as outside of it."""
    q, k, v = (torch.randn(2, 200, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    want, memory = linattn.attention(q, k, v, return_state=True)
    steps = memory.clone()
    step = linattn.decode_step(q[:, 0], k[:, 0], v[:, 0], steps)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = linattn.attention(q.float(), k.float(), v.float(), return_state=True)
        leaf = q.float().requires_grad_()
        recorded = linattn.attention(leaf, k.float(), v.float())
        again = memory.clone()
        stepped = linattn.decode_step(q[:, 0].float(), k[:, 0].float(), v[:, 0].float(), again)
        assert linattn.explain(q.float(), k.float(), v.float()).problem.dtype == "bfloat16"
    for a, b in ((got, want), (recorded, want), (state.kv, memory.kv), (stepped, step), (again.kv, steps.kv)):
        assert torch.equal(a, b)


def test_a_setting_goes_on_following_the_one_it_followed() -> None:
    x = torch.ones(1, 2, 1, 1)
    whole, products = torch.backends, torch.backends.mkldnn.matmul
    before = products.fp32_precision, whole.fp32_precision
    try:
        products.fp32_precision, whole.fp32_precision = "none", "bf16"
        linattn.attention(x, x, x)
        assert products.fp32_precision == "bf16"
        whole.fp32_precision = "ieee"
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision, whole.fp32_precision = before


def test_calls_that_need_other_settings_wait_and_leave_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from linattn.backends.torch import _MatmulSetting

    class Global:
        fp32_precision = "users"

    place, held, order = Global(), _MatmulSetting(), []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with held.held(place, "ieee"):
            order.append(("first", place.fp32_precision))
            inside.set()
            leave.wait(10)

    def second() -> None:
        with held.held(place, "tf32"):
            order.append(("second", place.fp32_precision))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    with held.held(place, "ieee"):  # the same value: no waiting
        threads[1].start()
        order.append(("third", place.fp32_precision))
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == [("first", "ieee"), ("third", "ieee"), ("second", "tf32")]
    assert place.fp32_precision == "users"


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (
            "takes max_len from the length",
            lambda q, s: linattn.attention(q, q, q, reweight=Cosine(), return_state=True),
        ),
        (
            "its feature_map is 'relu'",
            lambda q, s: linattn.attention(q, q, q, feature_map="silu", initial_state=s),
        ),
        (
            "its feature_map is 'relu'",
            lambda q, s: linattn.decode_step(q[:, 0], q[:, 0], q[:, 0], s, feature_map="silu"),
        ),
    ],
)
def test_compiled_calls_refuse_what_eager_ones_refuse(words: str, call: Callable[..., Any]) -> None:
    q = torch.randn(1, 8, 2, 4)
    _, state = linattn.attention(q, q, q, feature_map="relu", return_state=True)
    with pytest.raises(Exception, match=words), torch.no_grad():  # compilers wrap errors in their own
        torch.compile(call, fullgraph=True, backend="aot_eager")(q, state)


def test_the_released_angles_keep_their_gradient() -> None:
    angles = torch.nn.Parameter(torch.rand(2, 1, 4))
    with torch.no_grad():
        reweight = LRPE(angles)
    q = torch.rand(1, 8, 2, 4)
    linattn.attention(q, q, q, reweight=copy.deepcopy(reweight))
    linattn.attention(q, q, q, reweight=reweight).sum().backward()
    assert angles.grad is not None and angles.grad.shape == (2, 1, 4)


def test_a_table_may_be_a_view_and_may_change_after_the_call() -> None:
    q = torch.randn(1, 8, 2, 4)
    table = np.array([-0.1, -0.2], np.float32)
    leaf = q.clone().requires_grad_()
    o = linattn.attention(leaf, q, q, log_decay=table)
    (before,) = torch.autograd.grad(o.sum(), leaf, retain_graph=True)
    table[:] = -3
    (after,) = torch.autograd.grad(o.sum(), leaf)
    assert torch.equal(before, after)
    backwards = linattn.decay.alibi(2)[::-1]
    assert torch.equal(
        linattn.attention(q, q, q, log_decay=backwards),
        linattn.attention(q, q, q, log_decay=backwards.copy()),
    )
    table.flags.writeable = False
    linattn.attention(q, q, q, log_decay=table)


def test_narrow_gradients_do_not_feel_the_rounded_output() -> None:
    """do · o cancels when values share a large mean; formed from a bfloat16 o it is several percent off."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 128, 1, 16).bfloat16() for _ in range(4))
    v = v + 10
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = q.to(dtype).requires_grad_()
        o = linattn.cosformer_attention(leaf, k.to(dtype), v.to(dtype), causal=True)
        grads.append(torch.autograd.grad(o, leaf, do.to(dtype))[0].double())
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error < 4 * tolerance.UNIT["bfloat16"]
