"""The Hugging Face TransNormerLLM: its formulas, generation, padding, packed texts, training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from linattn.errors import OptionError, ShapeError, StateError, ValueRangeError
from linattn.models.transnormer import (
    TransNormerCache,
    TransNormerConfig,
    TransNormerForCausalLM,
    preset,
)
from tests.models.test_transnormer_lm import close, restated

VOCAB = 23
SIZES = {
    "vocab_size": VOCAB,
    "decoder_embed_dim": 8,
    "hidden_dim": 12,
    "decoder_layers": 3,
    "decoder_attention_heads": 3,
    "glu_dim": 10,
    "linear_use_lrpe_list": [1, 0, 1],
    "eos_token_id": None,
}
CHOICES = {
    "released": {},
    "paper": {"decay_schedule": "paper", "decoder_attention_heads": 4},
    "one layer": {"decoder_layers": 1, "linear_use_lrpe_list": [1]},
    "no lrpe": {"linear_use_lrpe_list": []},
    "no scale": {"no_scale_embedding": True},
}
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def make(seed=0, **fields):
    torch.manual_seed(seed)
    model = TransNormerForCausalLM(TransNormerConfig(**{**SIZES, **fields})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if name.endswith("theta") else 0.5)
    return model


def text(rows, n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(3, VOCAB, (rows, n)))


def plain(model):
    return {name.removeprefix("model."): x.detach().numpy() for name, x in model.state_dict().items()}


def same(got, want):
    """Equal but for the order of sums: the same numbers in other blocks."""
    close(got.detach(), want.detach().numpy())


def greedy(model, ids, steps):
    """What `generate` must give: the whole text anew for each token."""
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture
def model():
    return make()


@pytest.mark.parametrize("fields", CHOICES.values(), ids=CHOICES)
def test_logits_are_the_formulas(fields):
    model = make(**fields)
    ids = text(2, 13)
    want = np.stack([restated(model.config.parts(), plain(model), row) for row in ids.numpy()])
    with torch.no_grad():
        close(model(ids).logits, want)
        head = model(ids[:, :5], use_cache=True)  # then in pieces, of several tokens and of one
        parts, cache = [head.logits], head.past_key_values
        for start, stop in ((5, 6), (6, 9), (9, 10), (10, 11), (11, 13)):
            found = model(ids[:, start:stop], past_key_values=cache)
            assert found.past_key_values is cache
            parts.append(found.logits)
    close(torch.cat(parts, 1), want)
    assert cache.get_seq_length() == 13
    assert [state.length.tolist() for state in cache.states] == [[13, 13]] * len(cache.states)


def test_generate_is_the_likeliest_token_every_time(model):
    ids = text(3, 7)
    want = greedy(model, ids, 6)
    assert torch.equal(model.generate(ids, generation_config=GREEDY), want)
    # a second generation on the same module, and one without a cache
    assert torch.equal(model.generate(ids, generation_config=GREEDY), want)
    assert torch.equal(model.generate(ids, generation_config=GREEDY, use_cache=False), want)
    chunked = model.generate(ids, generation_config=GREEDY, prefill_chunk_size=3)
    assert torch.equal(chunked, want)


def test_beams_are_scored_as_without_a_cache(model):
    ids = text(2, 5)
    beams = {"num_beams": 4, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), want)
    assert not torch.equal(want, greedy(model, ids, 5))  # else the order of states was not asked for


def test_samples_are_those_of_the_seed(model):
    ids = text(2, 5)
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3, "pad_token_id": 0}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(ids, use_cache=use_cache, **options))
    assert torch.equal(*found) and found[0].shape == (6, 17)
    assert len({tuple(row.tolist()) for row in found[0]}) > 2


@pytest.mark.filterwarnings("ignore:.*right-padding")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace(model, side):
    rows = [text(1, n, seed=n) for n in (3, 9, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        n = tokens.shape[1]
        where = slice(9 - n, 9) if side == "left" else slice(0, n)
        ids[row, where], mask[row, where] = tokens[0], 1
    found = model(ids, attention_mask=mask, use_cache=True)
    for row, tokens in enumerate(rows):
        alone = model(tokens, use_cache=True)
        same(found.logits[row, mask[row].bool()], alone.logits[0])
        for state, of_one in zip(found.past_key_values.states, alone.past_key_values.states, strict=True):
            same(state.kv[row], of_one.kv[0])
            assert state.length[row] == tokens.shape[1]
    made = model.generate(ids, attention_mask=mask, generation_config=GREEDY)
    for row, tokens in enumerate(rows):
        assert torch.equal(made[row, 9:], greedy(model, tokens, 6)[0, tokens.shape[1] :])
    # other numbers under the mask change nothing
    other = torch.where(mask.bool(), ids, text(3, 9, seed=5))
    changed = model(other, attention_mask=mask).logits
    assert torch.equal(changed[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_of_a_padded_prompt(model, chunk):
    ids = text(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 3] = 0
    options = {"attention_mask": mask, "generation_config": GREEDY}
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **options), want)
    cache = model(ids[:, :2], use_cache=True).past_key_values
    with pytest.raises(OptionError, match="prefill_chunk_size"):
        model.generate(ids, past_key_values=cache, generation_config=GREEDY, prefill_chunk_size=chunk)


def test_a_mask_must_agree_with_what_the_states_hold(model):
    """As after a generation in which one row ended before the other."""
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8]])
    cache = model(ids, use_cache=True).past_key_values
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(StateError, match=r"2 real tokens .* its state of row 0 holds 4"):
        model(text(2, 1), attention_mask=mask, past_key_values=cache)
    with pytest.raises(StateError, match="all of the prompt"):
        model.generate(ids, past_key_values=cache, generation_config=GREEDY)


def test_padded_continuations(model):
    """A second turn of other lengths: rows padded on the left, behind states that are not empty."""
    first, second = text(2, 6), text(2, 5, seed=1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache = model(first, use_cache=True).past_key_values
    whole = torch.cat([torch.ones(2, 6, dtype=torch.int64), mask], 1)
    found = model(second, attention_mask=whole, past_key_values=cache)
    want = model(torch.cat([first[:1], second[:1, 2:]], 1), use_cache=True)
    same(found.logits[0, 2:], want.logits[0, 6:])
    same(cache.states[1].kv[0], want.past_key_values.states[1].kv[0])
    one = torch.tensor([[7], [8]])  # a step that only one row takes
    before = cache.states[1].kv[0].clone()
    model(one, attention_mask=torch.tensor([[0], [1]]), past_key_values=cache)
    assert torch.equal(cache.states[1].kv[0], before)
    assert cache.states[1].length.tolist() == [9, 12]


def test_a_prompt_is_kept_for_several_continuations(model):
    ids = text(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    for _ in range(2):
        made = model.generate(ids, past_key_values=copy.deepcopy(cache), generation_config=GREEDY)
        assert torch.equal(made, greedy(model, ids, 6))
    assert cache.get_seq_length() == 6


def test_the_cache_does_not_grow(model):
    with torch.no_grad():
        cache = model(text(2, 1), use_cache=True).past_key_values
        size = cache.nbytes
        for n in (1, 40, 1):
            model(text(2, n), past_key_values=cache)
    assert cache.nbytes == size == sum(2 * 3 * f * 4 * 4 * 8 for f in (2, 1, 2))
    assert "columns=43" in repr(cache)
    cache.batch_repeat_interleave(2)
    assert cache.states[0].length.tolist() == [43] * 4
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.states[0].length.tolist() == [43]
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.has_previous_state()


def test_no_rolling_back(model):
    with pytest.raises(StateError, match="rolled back"):
        TransNormerCache().crop(-1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(text(1, 4), assistant_model=make(), max_new_tokens=3)


def test_packed_texts_do_not_see_each_other(model):
    texts = [text(1, n, seed=n) for n in (4, 1, 7)]
    ids, borders = torch.cat(texts, 1), torch.tensor([0, 4, 5, 12])
    want = torch.cat([model(one).logits for one in texts], 1)
    positions = torch.cat([torch.arange(n) for n in (4, 1, 7)])[None]
    for packed in ({"cu_seqlens": borders}, {"cu_seq_lens_q": borders.int()}, {"position_ids": positions}):
        same(model(ids, **packed).logits, want)
        # nor foretell each other's first token
        losses = [model(one, labels=one).loss * (one.shape[1] - 1) for one in texts if one.shape[1] > 1]
        got = model(ids, labels=ids, **packed).loss
        assert got.item() == pytest.approx(sum(losses).item() / 9, rel=1e-6)
    same(model(ids, seq_idx=torch.tensor([[0] * 4 + [1] + [2] * 7])).logits, want)
    # texts without a token, also at the end, take no label away
    for empty in ([0, 4, 5, 12, 12], [0, 0, 4, 5, 5, 12, 12, 12]):
        assert model(ids, labels=ids, cu_seqlens=torch.tensor(empty)).loss.item() == got.item()
    # position_ids of one text say nothing
    assert torch.equal(model(ids, position_ids=torch.arange(12)[None]).logits, model(ids).logits)


@pytest.mark.parametrize("tokens", [1, 2])
def test_one_of_the_packed_texts_goes_on(model, tokens):
    texts, more = [text(1, n, seed=n) for n in (4, 7)], text(1, tokens, seed=9)
    with torch.no_grad():
        cache = model(torch.cat(texts, 1), cu_seqlens=torch.tensor([0, 4, 11]), use_cache=True)
        borders = torch.tensor([0, 0, tokens])
        found = model(more, cu_seqlens=borders, past_key_values=cache.past_key_values)
        same(found.logits, model(torch.cat([texts[1], more], 1)).logits[:, -tokens:])
    lengths = [state.length.tolist() for state in found.past_key_values.states]
    assert lengths == [[4, 7 + tokens]] * 3


def test_embeddings_instead_of_ids(model):
    ids = text(2, 5)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    made = model.generate(inputs_embeds=embeds, generation_config=GREEDY)
    assert torch.equal(made, greedy(model, ids, 6)[:, 5:])


def test_hidden_states_and_tuples(model):
    ids = text(2, 5)
    found = model(ids, output_hidden_states=True, use_cache=True)
    assert len(found.hidden_states) == 4
    assert torch.equal(model.lm_head(found.hidden_states[-1]), found.logits)
    logits, cache, hidden = model(ids, output_hidden_states=True, use_cache=True, return_dict=False)
    assert torch.equal(logits, found.logits) and len(hidden) == 4 and len(cache) == 3
    found.hidden_states[0].retain_grad()  # what the first layer took, not a view of it
    found.logits[0, 0, 0].backward()
    assert found.hidden_states[0].grad.count_nonzero()
    last = model(ids, logits_to_keep=2).logits
    same(last, found.logits[:, -2:])


def test_every_weight_learns(model):
    ids = text(2, 9)
    found = model(ids, labels=ids)
    want = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.loss.item() == pytest.approx(want.item(), rel=1e-6)  # the loss is formed in float32
    found.loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters()}
    assert all(bool(x.abs().sum() > 0) for x in gradients.values())
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    again = model(ids, labels=ids)
    assert again.past_key_values is None
    again.loss.backward()
    for name, x in model.named_parameters():
        assert torch.equal(x.grad, gradients[name]), name


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_loss_by_chunks_is_the_loss(model, chunk):
    model.train()
    ids = text(2, 9)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    want = model(ids, labels=labels)
    want.loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    model.loss_chunk = chunk
    found = model(ids, labels=labels)
    assert found.logits is None
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)  # both in float32
    found.loss.backward()
    for name, x in model.named_parameters():
        allowed = 100 * torch.finfo(torch.float32).eps * gradients[name].abs().max()  # of sums in float32
        assert (x.grad - gradients[name]).abs().max() <= allowed, name
    half = model(ids, labels=labels, num_items_in_batch=2 * int((labels[:, 1:] != -100).sum()))
    assert half.loss.item() == pytest.approx(found.loss.item() / 2, rel=1e-6)
    given = {"labels": ids, "cu_seqlens": torch.tensor([0, 4, 9]), "ignore_index": int(ids[0, 2])}
    one = {"input_ids": ids[:1], **given, "labels": ids[:1]}
    losses = []
    zeros = torch.nn.Parameter(torch.zeros(VOCAB, dtype=model.dtype))  # a head with a bias is called as it is
    for model.loss_chunk, model.lm_head.bias in ((None, None), (chunk, None), (chunk, zeros)):
        losses.append(model(**one).loss.item())
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)
    model.eval()
    assert model(ids, labels=labels).logits is not None


def test_bad_calls(model):
    with pytest.raises(ValueRangeError, match=r"0 … 22, got 23"):
        model(torch.tensor([[VOCAB]]))
    with pytest.raises(OptionError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ShapeError, match=r"input_ids must have shape \[b, n\]"):
        model(torch.tensor([1, 2]))
    with pytest.raises(OptionError, match="no matrix of weights"):
        model(text(1, 3), output_attentions=True)
    with pytest.raises(ShapeError, match="no matrix of pairs"):
        model(text(1, 3), attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(ShapeError, match=r"must have shape \[1, 3\]"):
        model(text(1, 3), attention_mask=torch.ones(1, 2))
    with pytest.raises(ShapeError, match="back to back"):
        model(text(1, 3), attention_mask=torch.tensor([[1, 1, 0]]), cu_seqlens=torch.tensor([0, 1, 3]))
    with pytest.raises(OptionError, match="TransNormerCache, got tuple"):
        model(text(1, 3), past_key_values=())
    with pytest.raises(OptionError, match="known: 385m"):
        preset("2b")


def test_fields_under_the_names_of_transformers():
    config = TransNormerConfig(
        hidden_size=64, hidden_dim=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        linear_use_lrpe_list=[1, 0],
    )  # fmt: skip
    assert (config.decoder_layers, config.decoder_embed_dim, config.glu_dim) == (2, 64, 96)
    with pytest.raises(OptionError, match="decoder_attention_heads must divide hidden_dim"):
        TransNormerConfig(hidden_dim=64, num_attention_heads=5)
