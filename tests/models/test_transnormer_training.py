"""Training the Hugging Face TransNormerLLM: compiled, under autocast, in half precision."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_transnormer import make, text


def gradients(model, run, ids, **options):
    model.zero_grad()
    loss = run(ids, labels=ids, **options).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_without_a_break(padded):
    model = make().train()
    ids, options = text(2, 11), {}
    if padded:
        options = {"attention_mask": torch.ones_like(ids)}
        options["attention_mask"][0, :3] = 0
    want, before = gradients(model, model, ids, **options)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, after = gradients(model, compiled, ids, **options)
    assert torch.equal(found, want)
    for name, x in before.items():
        assert torch.equal(after[name], x), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_residual_and_the_state_wide(dtype):
    model = make(decoder_embed_dim=32, hidden_dim=36, glu_dim=64).float().train()
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim == 2:  # else small errors grow from layer to layer
                x.normal_(std=x.shape[1] ** -0.5)
    ids = text(2, 40)
    want, before = gradients(model, model, ids)
    with torch.autocast("cpu", dtype):
        found = model(ids, labels=ids, use_cache=True, output_hidden_states=True)
    assert found.hidden_states[1].dtype == torch.float32
    assert {state.kv.dtype for state in found.past_key_values.states} == {torch.float32}
    model.zero_grad()
    found.loss.backward()
    # of some hundred roundings, which point either way
    unit = torch.finfo(dtype).eps
    assert abs(found.loss.detach() - want) <= 5 * unit * want
    for name, x in model.named_parameters():
        assert (x.grad - before[name]).norm() <= 10 * unit * before[name].norm(), name


def test_half_precision_generates_what_its_own_logits_say():
    model = make().bfloat16()
    ids = text(2, 9)
    made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        step = model(made[:, :-1], use_cache=False).logits[:, 8:]
    top = step.float().topk(2).values
    clear = (top[..., 0] - top[..., 1]) > 2.0**-6 * top[..., 0].abs()  # else the order of sums decides
    assert clear.float().mean() > 0.5
    assert torch.equal(step.argmax(-1)[clear], made[:, 9:][clear])


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_loss_of_ones_own_gets_all_logits(chunk):
    model, asked = make().train(), []

    def own(logits, labels, vocab_size, **options):
        asked.append((logits.shape, labels, vocab_size))
        return logits.square().sum()

    model.loss_chunk, ids = chunk, text(2, 11)
    usual = model(ids, labels=ids).loss
    model.loss_function = own
    found = model(ids, labels=ids)
    assert asked[0] == ((2, 11, 23), ids, 23)
    assert torch.equal(found.loss, found.logits.square().sum()) and found.loss > usual
    model.loss_function = type(make()).loss_function.fget(make())  # the usual one again
    assert torch.equal(model(ids, labels=ids).loss, usual)
