"""The cross entropy of a linear head: against torch's own, in chunks, frozen, under what surrounds it."""

from __future__ import annotations

import copy
from unittest import mock

import peft
import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from linattn.errors import DeviceError, DtypeError, GradientError, OptionError, ShapeError, ValueRangeError
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM
from linattn.nn import linear_cross_entropy
from linattn.nn import loss as module
from linattn.tolerance import SLACK, UNIT

T, E, V = 13, 6, 11
IGNORED = -100
SUMS = 64 * UNIT["float64"]  # of sums of so few terms, each of a size around 1


def given(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, E, generator=generator, dtype=torch.float64).to(dtype) for n in (T, V))
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[[2, 3, 8]] = IGNORED
    return x, weight, labels


def wanted(x, weight, labels, factor=1.0, ignore_index=IGNORED):
    """Loss and gradients by torch's operations in float64."""
    leaves = [part.detach().double().requires_grad_() for part in (x, weight)]
    scores = functional.linear(*leaves)
    total = functional.cross_entropy(scores, labels.long(), reduction="sum", ignore_index=ignore_index)
    return total.detach(), *torch.autograd.grad(total * factor, leaves)


def found(x, weight, labels, factor=1.0, run=linear_cross_entropy, **options):
    leaves = [part.detach().requires_grad_() for part in (x, weight)]
    total = run(*leaves, labels, **options)
    return total.detach(), *torch.autograd.grad(total * factor, leaves)


def near(got, want, room=SUMS):
    for mine, other in zip(got, want, strict=True):
        assert (mine - other).abs().max() <= room * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("chunk", [None, 1, 3, T, 100])
def test_is_torchs_cross_entropy(chunk):
    x, weight, labels = given()
    got = found(x, weight, labels, 0.37, chunk=chunk)
    assert [part.dtype for part in got] == [torch.float64] * 3
    near(got, wanted(x, weight, labels, 0.37))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels, chunk=chunk), got[0])


@pytest.mark.parametrize("ignored", [0, 7, -1, 1 << 40])
def test_any_number_may_ask_nothing(ignored):
    x, weight, labels = given()
    labels = labels.masked_fill(labels == IGNORED, ignored)
    got = found(x, weight, labels, ignore_index=ignored, chunk=4)
    near(got, wanted(x, weight, labels, ignore_index=ignored))
    assert not got[1][labels == ignored].any()


def test_labels_of_any_integer_dtype_and_layout():
    x, weight, labels = given()
    want = found(x, weight, labels)
    for dtype in (torch.int32, torch.int16, torch.int8):
        assert all(map(torch.equal, found(x, weight, labels.to(dtype)), want))
    counted = labels.clamp(min=0)
    want = found(x, weight, counted)
    assert all(map(torch.equal, found(x, weight, counted.to(torch.uint8)), want))
    apart = torch.stack([counted, counted], 1)[:, 0]
    parts = (x.T.contiguous().T, weight.T.contiguous().T, apart)
    near(found(*parts, chunk=5), want)


def test_nothing_asked_is_nothing():
    x, weight, labels = given()
    for rows in (slice(0, 0), slice(2, 4)):
        total, dx, dw = found(x[rows], weight, labels[rows], chunk=1)
        assert total == 0 and total.dtype == torch.float64
        assert dx.shape == x[rows].shape and dw.shape == weight.shape
        assert not dx.any() and not dw.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is_asked(bad):
    x, weight, labels = given()
    want = found(x, weight, labels, chunk=4)
    silent, loud = x.clone(), x.clone()
    silent[3], loud[5] = bad, bad
    assert all(map(torch.equal, found(silent, weight, labels, chunk=4), want))
    total, dx, dw = found(loud, weight, labels, chunk=4)
    assert total.isnan() and dx[5].isnan().all() and dw.isnan().all()
    others = torch.arange(T) != 5
    assert torch.equal(dx[others], want[1][others])
    broken = weight.clone()
    broken[4] = bad
    _, dx, _ = found(x, broken, labels, chunk=4)
    assert not dx[labels == IGNORED].any() and dx[labels != IGNORED].isnan().all()


@pytest.mark.parametrize("way", ["x", "weight", "none"])
def test_frozen_parts_cost_nothing(way):
    x, weight, labels = given()
    want = dict(zip(("total", "x", "weight"), found(x, weight, labels, chunk=4), strict=True))
    leaves = {"x": x.clone(), "weight": weight.clone()}
    if way in leaves:
        leaves[way].requires_grad_()
    with FlopCounterMode(display=False) as counted:
        total = linear_cross_entropy(**leaves, labels=labels, chunk=4)
        if way in leaves:
            total.backward()
    assert torch.equal(total.detach(), want["total"])
    for name, leaf in leaves.items():
        assert leaf.grad is None if name != way else torch.equal(leaf.grad, want[name])
    assert counted.get_total_flops() == 2 * T * E * V * (1 if way == "none" else 2)


def test_three_products_and_no_fourth():
    x, weight, labels = given()
    with FlopCounterMode(display=False) as counted:
        found(x, weight, labels, chunk=4)
    assert counted.get_total_flops() == 3 * 2 * T * E * V


def test_logits_are_there_in_chunks():
    x, weight, labels = given()
    with mock.patch.object(module, "_turned", wraps=module._turned) as turned:
        found(x, weight, labels, chunk=5)
    assert [tuple(call.args[0].shape) for call in turned.call_args_list] == [(5, V), (5, V), (3, V)]
    kept = []

    def pack(part):
        kept.append(tuple(part.shape))
        return part

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        linear_cross_entropy(x.requires_grad_(), weight, labels, chunk=5)
    assert (T, V) not in kept and (5, V) not in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_sums_wide(dtype):
    x, weight, labels = given(dtype)
    got = found(x, weight, labels, 0.37, chunk=4)
    assert [part.dtype for part in got] == [torch.float32, dtype, dtype]
    unit = UNIT[str(dtype).removeprefix("torch.")]
    scores = (x.double() @ weight.double().T).abs().max()
    for mine, other in zip(got, wanted(x, weight, labels, 0.37), strict=True):
        # every logit is rounded, and so is every product; one of weight's once a chunk
        assert (mine - other).abs().max() <= SLACK * unit * (1 + scores) * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("lowered", [False, True])
def test_sums_over_tokens_do_not_overflow(lowered):
    labels = torch.zeros(4000, dtype=torch.int64)
    x, weight = torch.full((4000, E), 40.0, dtype=torch.float16), torch.zeros(V, E, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16, enabled=lowered):
        *_, dw = found(x, weight.float() if lowered else weight, labels, 1 / 4000, chunk=3000)
    want = torch.full((V, E), 40 / V)
    want[0] -= 40
    assert (dw - want).abs().max() <= SLACK * UNIT["float16"] * 40


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_autocast_is_that_of_linear(dtypes):
    x, weight, labels = given()
    x, weight = x.to(dtypes[0]), weight.to(dtypes[1])
    with torch.autocast("cpu", torch.bfloat16):
        got = found(x, weight, labels, chunk=4)
        leaves = [part.detach().requires_grad_() for part in (x, weight)]
        scores = functional.linear(*leaves)
        total = functional.cross_entropy(scores.float(), labels, reduction="sum", ignore_index=IGNORED)
        want = (total.detach(), *torch.autograd.grad(total, leaves))
    assert [part.dtype for part in got] == [torch.float32, *dtypes]
    assert abs(got[0] - want[0]) <= 64 * UNIT["float32"] * want[0]  # the same logits
    for mine, other in zip(got[1:], want[1:], strict=True):
        assert (mine - other).abs().max() <= SLACK * UNIT["bfloat16"] * other.abs().max()
    wide = given()
    with torch.autocast("cpu", torch.bfloat16):
        near(found(*wide), wanted(*wide))


def test_a_gradient_is_multiplied_once():
    x, weight, labels = given(torch.bfloat16)
    factor = torch.tensor(1 / 3)  # is another number in bfloat16
    _, dx, _ = found(x, weight, labels)
    _, scaled, _ = found(x, weight, labels, factor)
    assert torch.equal(scaled, (dx.float() * factor).bfloat16())


def test_a_backward_pass_may_be_run_again():
    x, weight, labels = given()
    leaf = x.requires_grad_()
    total = linear_cross_entropy(leaf, weight, labels)
    total.backward(retain_graph=True)
    once = leaf.grad.clone()
    total.backward(torch.tensor(2.0, dtype=torch.float64))
    assert torch.equal(leaf.grad, 3 * once)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_under_torch_compile(compiler):
    x, weight, labels = given()
    torch.compiler.reset()
    run = torch.compile(linear_cross_entropy, fullgraph=True, backend=compiler)
    assert all(
        map(torch.equal, found(x, weight, labels, run=run, chunk=4), found(x, weight, labels, chunk=4))
    )
    narrow = [part.float() for part in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        got, want = found(*narrow, labels, run=run, chunk=4), found(*narrow, labels, chunk=4)
    assert all(map(torch.equal, got, want))


def test_the_op_keeps_its_word():
    x, weight, labels = (part[:4] for part in given())
    labels = labels.clamp(0, 3)
    for asks in ((True, True), (True, False), (False, True)):
        leaves = [part.clone().requires_grad_(ask) for part, ask in zip((x, weight), asks, strict=True)]
        for chunk in (None, 3):
            given_to = (*leaves, labels, chunk, IGNORED, torch.float64, *asks)
            torch.library.opcheck(torch.ops.linattn.linear_cross_entropy.default, given_to)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_transforms_and_forward_mode():
    x, weight, labels = given()
    total, dx, _ = wanted(x, weight, labels)

    def run(x):
        return linear_cross_entropy(x, weight, labels, chunk=4)

    near([torch.func.grad(run)(x)], [dx])
    near([torch.func.vmap(run)(torch.stack([x, x]))], [total.expand(2)])
    value, slope = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    near([value, slope], [total, dx.sum()])
    silent = x.clone()
    silent[3] = torch.nan
    near([torch.func.grad(run)(silent)], [dx])


def test_subclasses_and_fake_tensors_take_operations():
    class Marked(torch.Tensor):
        pass

    x, weight, labels = given()
    for chunk in (None, 4):
        leaf = torch.nn.Parameter(weight.clone())
        total = linear_cross_entropy(x.as_subclass(Marked), leaf, labels, chunk=chunk)
        total.backward()
        want = wanted(x, weight, labels)
        near([total, leaf.grad], [want[0], want[2]])
    with torch._subclasses.FakeTensorMode():
        leaf = torch.empty(T, E, requires_grad=True)
        total = linear_cross_entropy(leaf, torch.empty(V, E), torch.zeros(T, dtype=torch.int64), chunk=4)
        total.backward()
    assert total.shape == () and leaf.grad.shape == (T, E)


def test_double_backward_is_refused():
    x, weight, labels = given()
    for part, other in ((x.requires_grad_(), weight), (x.detach(), weight.requires_grad_())):
        total = linear_cross_entropy(part, other, labels)
        leaf = part if part.requires_grad else other
        (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        with pytest.raises(GradientError, match="linear_cross_entropy cannot be differentiated again"):
            (total + slope.square().sum()).backward()


def test_refusals():
    x, weight, labels = given()
    with pytest.raises(ValueRangeError, match=r"labels must be 0 … 10, or -100 .* row 5 has 11"):
        linear_cross_entropy(x, weight, labels.index_fill(0, torch.tensor([5]), 11))
    with pytest.raises(ValueRangeError, match="row 6 has -1"):
        linear_cross_entropy(x, weight, labels.index_fill(0, torch.tensor([6]), -1))
    with pytest.raises(ShapeError, match=r"\[t, e\], \[v, e\] and \[t\]"):
        linear_cross_entropy(x[None], weight, labels)
    with pytest.raises(ShapeError, match=r"weight \[v, 6\] and labels \[13\]"):
        linear_cross_entropy(x, weight[:, :5], labels)
    with pytest.raises(ShapeError, match=r"labels \[13\]"):
        linear_cross_entropy(x, weight, labels[:-1])
    with pytest.raises(DtypeError, match=r"one floating dtype, got torch\.float32 and torch\.float64"):
        linear_cross_entropy(x.float(), weight, labels)
    with pytest.raises(DtypeError, match=r"integers, got torch\.float64"):
        linear_cross_entropy(x, weight, labels.double())
    with pytest.raises(DeviceError, match="on one device, got cpu, meta and cpu"):
        linear_cross_entropy(x, weight.to("meta"), labels)
    with pytest.raises(OptionError, match="at least 1, or None"):
        linear_cross_entropy(x, weight, labels, chunk=0)


SIZES = {
    "vocab_size": 23, "decoder_embed_dim": 8, "hidden_dim": 12, "decoder_layers": 2,
    "decoder_attention_heads": 3, "glu_dim": 10, "linear_use_lrpe_list": [1, 0], "eos_token_id": None,
}  # fmt: skip


def model(**fields):
    torch.manual_seed(0)
    return TransNormerForCausalLM(TransNormerConfig(**{**SIZES, **fields})).train()


def step(net, chunk):
    """Loss and gradients of a pass."""
    ids = torch.randint(3, 23, (2, 9), generator=torch.Generator().manual_seed(0))
    net.loss_chunk = chunk
    net.zero_grad()
    loss = net(ids, labels=ids.masked_fill(ids % 3 == 0, IGNORED)).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in net.named_parameters() if x.grad is not None}


def alike(got, want):
    eps = torch.finfo(torch.float32).eps
    assert abs(got[0] - want[0]) <= 16 * eps * want[0]
    assert got[1].keys() == want[1].keys()
    for name, slope in got[1].items():
        assert (slope - want[1][name]).abs().max() <= 100 * eps * want[1][name].abs().max(), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_and_without_chunks(tied):
    net = model(tie_word_embeddings=tied)
    want = step(net, None)
    with mock.patch.object(net, "_summed_loss", side_effect=AssertionError):
        for chunk in (1, 5, 100):
            alike(step(net, chunk), want)


def test_a_head_that_is_more_than_its_weight_is_called():
    def doubled(head, given, scores):
        return 2 * scores

    bare = model()
    biased, watched, replaced, shadowed = (copy.deepcopy(bare) for _ in range(4))
    biased.lm_head = torch.nn.Linear(8, 23)
    watched.lm_head.register_forward_hook(doubled)
    replaced.lm_head = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 23, bias=False))
    shadowed.lm_head.forward = lambda x: 3 * functional.linear(x, shadowed.lm_head.weight)
    adapters = peft.LoraConfig(
        r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    tuned = peft.get_peft_model(copy.deepcopy(bare), adapters)
    for net in (biased, watched, replaced, shadowed, tuned.base_model.model):
        alike(step(net, 5), step(net, None))


def test_adapters_elsewhere_leave_the_head_frozen():
    adapters = peft.LoraConfig(
        r=2, target_modules=["qkvu_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    net = peft.get_peft_model(model(), adapters).base_model.model
    want = step(net, None)
    with mock.patch.object(module, "_added", side_effect=AssertionError):
        alike(step(net, 5), want)
    assert all("lora" in name for name in want[1])


def test_a_model_under_torch_compile_and_autocast():
    net = model()
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        want = step(net, 5)
    assert all(slope.dtype == torch.float32 for slope in want[1].values())
    with mock.patch.object(module, "_formed", wraps=module._formed) as formed:
        compiled = torch.compile(net, backend="aot_eager")
        net.loss_chunk = 5
        ids = torch.randint(3, 23, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(ids, labels=ids.masked_fill(ids % 3 == 0, IGNORED)).loss
    assert formed.call_count == 1
    assert abs(loss - want[0]) <= SLACK * UNIT["bfloat16"] * want[0]


def test_training_bounds_its_logits():
    from linattn.train.presets import LOGITS, loss_chunk

    assert loss_chunk(256) == loss_chunk(64000) == 8192
    for vocabulary in (64001, 128001, 262144, 1 << 21):
        chunk = loss_chunk(vocabulary)
        assert chunk % 128 == 0 and 128 <= chunk <= 8192
        assert chunk * vocabulary <= LOGITS < (chunk + 128) * vocabulary or chunk in (128, 8192)
