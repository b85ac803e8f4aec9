"""The parts of TransNormerLLM one by one."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch

import linattn
from linattn.errors import ArgumentTypeError, OptionError, ShapeError, ValueRangeError
from linattn.nn import SGLU, GatedLinearAttention, Lrpe, SimpleRMSNorm, linear_cross_entropy

EPS = np.finfo(np.float64).eps


def gla(**options):
    torch.manual_seed(0)
    options = {"log_decay": linattn.decay.alibi(3), "use_lrpe": True} | options
    return GatedLinearAttention(10, 12, 3, **options)


def test_norm_is_the_formula_and_leaves_zero_rows_alone():
    x = np.random.default_rng(0).standard_normal((4, 5)) * np.array([[1e-3], [1.0], [1e3], [0.0]])
    got = SimpleRMSNorm()(torch.from_numpy(x)).numpy()
    want = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    assert (abs(got - want) <= 8 * EPS * abs(want)).all()
    assert (got[3] == 0).all()


def test_norm_of_bfloat16_rounds_once():
    # squares taken in bfloat16, or float16's overflow at 300^2, would show here
    for dtype in (torch.bfloat16, torch.float16):
        x = (torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
        assert SimpleRMSNorm()(x).dtype == dtype
        assert torch.equal(SimpleRMSNorm()(x), SimpleRMSNorm()(x.float()).to(dtype))


def test_sglu_names_its_matrices_as_released():
    module = SGLU(3, 5).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    w = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert {name: tuple(x.shape) for name, x in w.items()} == {
        "l1.weight": (5, 3),
        "l2.weight": (5, 3),
        "l3.weight": (3, 5),
    }
    want = ((x @ w["l1.weight"].T) * (x @ w["l2.weight"].T)) @ w["l3.weight"].T
    assert (abs(module(x) - want) <= 64 * EPS).all()


def test_a_branch_takes_norms_of_other_classes():
    torch.manual_seed(0)
    norm, x = torch.nn.LayerNorm(10).double(), torch.randn(2, 7, 10, dtype=torch.float64)
    for module in (SGLU(10, 5).double(), gla().double()):
        assert torch.equal(module(x, prenorm=norm), x + module(norm(x)))
    module.norm = torch.nn.RMSNorm(12, eps=module.norm.eps, elementwise_affine=False).double()
    assert (abs(module(x) - gla().double()(x)) <= 1000 * EPS).all()


def test_lrpe_keeps_the_released_shape_and_angles():
    module = Lrpe(2, 3)
    index = np.arange(6.0).reshape(2, 1, 3)
    assert module.theta.shape == (2, 1, 3)
    assert np.allclose(
        module.theta.detach().numpy(), 10000.0 ** (-index / 3), rtol=float(np.finfo(np.float32).eps)
    )
    assert module().theta.requires_grad and module().theta.shape == (2, 3)


def test_half_precision_modules_keep_wide_angles_and_exact_decays():
    table = linattn.decay.transnormer(3, 1, 4)
    module = gla(log_decay=table).to(torch.bfloat16)
    assert module.log_decay.dtype == torch.float64
    assert (module.log_decay.numpy() == table).all()
    assert module.lrpe().theta.dtype == torch.float32
    out, state = module(torch.randn(1, 5, 10, dtype=torch.bfloat16), return_state=True)
    assert out.dtype == torch.bfloat16 and state.kv.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swap", [False, True])
def test_casts_to_half_precisions_leave_angles_as_they_are(dtype, swap):
    module = gla()
    theta = module.lrpe.theta
    exact = theta.detach().clone()
    theta.grad = torch.ones_like(theta)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for cast in (lambda: module.to(dtype), module.half if dtype == torch.float16 else module.bfloat16):
            cast()
            assert module.lrpe.theta is theta and module.qkvu_proj.weight.dtype == dtype
            assert theta.dtype == theta.grad.dtype == torch.float32 and torch.equal(theta.detach(), exact)
            module.float()
        wide = theta.detach() / 3
        theta.grad = None
        theta.data = wide.double() / 7
        module.to(dtype)  # from float64
        assert theta.dtype == torch.float32 and torch.equal(theta.detach(), (wide.double() / 7).float())
        module.double()
        assert theta.dtype == torch.float64 and module.lrpe.theta is theta
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_angles_are_wide_wherever_they_are_made(monkeypatch):
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    module = Lrpe(2, 3)
    assert module.theta.dtype == torch.float32 and copy.deepcopy(module).half().theta.dtype == torch.float32
    module.to("meta", torch.bfloat16)
    assert module.theta.is_meta and module.theta.dtype == torch.float32
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.theta.detach(), module.default().float())
    rounded = {"theta": module.theta.detach().bfloat16()}
    module.load_state_dict(rounded)
    assert module.theta.dtype == torch.float32
    module.load_state_dict(rounded, assign=True)  # somebody's own
    with pytest.warns(UserWarning, match="rounded to bfloat16"):
        assert module.theta.dtype == torch.bfloat16 and module().theta.dtype == torch.float32


def test_decays_are_no_part_of_the_state_dict():
    assert set(gla().state_dict()) == {"qkvu_proj.weight", "out_proj.weight", "lrpe.theta"}
    assert set(gla(use_lrpe=False, log_decay=None).state_dict()) == {"qkvu_proj.weight", "out_proj.weight"}


def test_gradients_reach_every_parameter():
    module = gla()
    module(torch.randn(2, 6, 10)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("use_lrpe", [True, False])
def test_pieces_and_steps_are_the_whole(use_lrpe):
    module, x = gla(use_lrpe=use_lrpe).double(), torch.randn(2, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        want = module(x)
        first, state = module(x[:, :4], return_state=True)
        second = module(x[:, 4:], state=state)
        fresh = module.initial_state(2)
        steps = torch.stack([module.step(x[:, t], fresh) for t in range(9)], 1)
    for got in (torch.cat([first, second], 1), steps):
        assert (abs(got - want) <= 1000 * EPS * max(1.0, float(abs(want).max()))).all()


def test_refusals():
    with pytest.raises(OptionError, match="num_heads must divide hidden_dim, got 5 heads and width 12"):
        GatedLinearAttention(10, 12, 5)
    with pytest.raises(ShapeError, match=r"log_decay must have shape \(3,\)"):
        gla(log_decay=np.zeros(4))


def paid(**given):
    whole = {"x": torch.ones(1, 2), "weight": torch.ones(3, 2), "labels": torch.tensor([0])}
    return linear_cross_entropy(**whole | given)


REFUSED = [
    (lambda: GatedLinearAttention(8, 8, "2"), ArgumentTypeError, "num_heads must be an int, got '2'"),
    (lambda: GatedLinearAttention(8.0, 8, 2), ArgumentTypeError, "embed_dim must be an int, got 8.0"),
    (lambda: GatedLinearAttention(8, True, 1), ArgumentTypeError, "hidden_dim must be an int, got True"),
    (lambda: gla(use_lrpe="no"), ArgumentTypeError, "use_lrpe must be True or False, got 'no'"),
    (lambda: gla(bias=0), ArgumentTypeError, "bias must be True or False, got 0"),
    (lambda: gla(feature_map="nope"), OptionError, "feature_map must be None or one of 'relu'"),
    (lambda: gla(log_decay=np.array([-1.0, 0.1, 0.0])), ValueRangeError, "log_decay must be <= 0"),
    (lambda: gla(log_decay=np.array([-1.0, np.nan, 0.0])), ValueRangeError, "log_decay must be <= 0"),
    (
        lambda: gla(log_decay=["a", "b", "c"]),
        ArgumentTypeError,
        "log_decay must be an array of numbers",
    ),
    (lambda: SGLU(8, 8.0), ArgumentTypeError, "glu_dim must be an int, got 8.0"),
    (lambda: SGLU(8, 8, bias=1), ArgumentTypeError, "bias must be True or False, got 1"),
    (lambda: SimpleRMSNorm(-1.0), ValueRangeError, "eps must be > 0, got -1.0"),
    (lambda: SimpleRMSNorm("1"), ArgumentTypeError, "eps must be a number, got '1'"),
    (lambda: SimpleRMSNorm(fused=None), ArgumentTypeError, "fused must be True or False, got None"),
    (lambda: paid(labels=[0]), ArgumentTypeError, "labels must be a tensor, got list"),
    (lambda: paid(x=np.ones((1, 2))), ArgumentTypeError, "x must be a tensor, got ndarray"),
    (lambda: paid(chunk=1.5), ArgumentTypeError, "chunk must be an int or None, got 1.5"),
    (lambda: paid(chunk=True), ArgumentTypeError, "chunk must be an int or None, got True"),
]


@pytest.mark.parametrize(("make", "error", "says"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_modules_and_losses_are_made_of(make, error, says):
    with pytest.raises(error, match=re.escape(says)):
        make()


def test_modules_take_what_numpy_has_for_sizes_and_decays():
    module = GatedLinearAttention(np.int64(8), np.int32(8), np.int64(2), log_decay=np.array([-np.inf, 0]))
    assert module(torch.ones(1, 3, 8)).isfinite().all()
    assert torch.equal(paid(chunk=np.int64(1)), paid(chunk=1))


def test_chunks_of_a_size_still_to_come():
    class Loss(torch.nn.Module):
        def forward(self, x, weight, labels):
            return linear_cross_entropy(x, weight, labels, chunk=x.shape[0] // 2)

    given = torch.randn(6, 4), torch.randn(7, 4), torch.randint(0, 7, (6,))
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(Loss(), given, dynamic_shapes=({0: rows}, None, {0: rows}), strict=False)
    other = torch.randn(10, 4), given[1], torch.randint(0, 7, (10,))
    torch.testing.assert_close(exported.module()(*other), linear_cross_entropy(*other))
