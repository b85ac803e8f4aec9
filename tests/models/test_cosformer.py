"""cosFormer models against their formulas written out pair by pair, and against generation by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from linattn.models.cosformer import (
    CosformerCache,
    CosformerConfig,
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
    CosformerForSequenceClassification,
)

V, M = 11, 16
SIZES = {
    "vocab_size": V, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "max_position_embeddings": M, "dropout": 0.0, "num_labels": 3,
    "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
KINDS = {
    "relu": {},
    "elu, no table": {"act_fun": "elu", "position_embeddings": "none", "hidden_act": "silu"},
    "one layer, untied": {"num_hidden_layers": 1, "tie_word_embeddings": False, "layer_norm_eps": 1e-3},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def build(model, **fields):
    if model is CosformerForConditionalGeneration:
        fields = {"num_decoder_layers": 2, **fields}
    torch.manual_seed(0)
    made = model(CosformerConfig(**{**SIZES, **fields})).double().eval()
    for name, parameter in made.named_parameters():
        parameter.data.normal_(std=0.1 if name.endswith("bias") else 0.5)
        if name.endswith("norm.weight"):
            parameter.data += 1.0
    return made


def text(rows, n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(3, V, (rows, n)))


class Restated:
    """The formulas as they are published, in float64, pair by pair; texts without padding, [n] ids."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: x.detach().numpy() for name, x in model.state_dict().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.layer_norm_eps)
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, name, x, source, causal):
        def phi(y):
            elu = np.where(y > 0, y + 1, np.exp(np.minimum(y, 0)))
            return np.maximum(y, 0) if self.config.act_fun == "relu" else elu

        q, k = phi(self.linear(f"{name}.q_proj", x)), phi(self.linear(f"{name}.k_proj", source))
        v, out = self.linear(f"{name}.v_proj", source), np.zeros_like(x)
        d = x.shape[1] // self.config.num_attention_heads
        for first in range(0, x.shape[1], d):
            part = slice(first, first + d)
            for i in range(len(x)):
                last = i + 1 if causal else len(source)
                w = [q[i, part] @ k[j, part] * math.cos(math.pi * (i - j) / (2 * M)) for j in range(last)]
                out[i, part] = np.array(w) @ v[:last, part] / max(sum(w), 1e-6)
        return self.linear(f"{name}.out_proj", out)

    def act(self, x):
        if self.config.hidden_act == "silu":
            return x / (1 + np.exp(-x))
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def stack(self, name, ids, layers, causal, source=None):
        table = "decoder" if "decoder.embed_tokens.weight" in self.weights else "encoder"
        x = self.weights[f"{table}.embed_tokens.weight"][np.asarray(ids)]
        if self.config.position_embeddings == "learned":
            x = x + self.weights[f"{name}.embed_positions.weight"][: len(x)]
        for layer in range(layers):
            block = f"{name}.layers.{layer}"
            y = self.norm(f"{block}.attention_norm", x)
            x = x + self.attention(f"{block}.attention", y, y, causal)
            if source is not None:
                y = self.norm(f"{block}.cross_attention_norm", x)
                x = x + self.attention(f"{block}.cross_attention", y, source, causal=False)
            y = self.norm(f"{block}.mlp_norm", x)
            x = x + self.linear(f"{block}.fc2", self.act(self.linear(f"{block}.fc1", y)))
        return self.norm(f"{name}.norm", x)

    def encoder(self, ids):
        return self.stack("encoder", ids, self.config.num_hidden_layers, causal=False)

    def logits(self, ids, source=None):
        """Of the masked LM; of the causal one; of the encoder-decoder, where there is a source."""
        if source is not None:
            rows = self.stack("decoder", ids, self.config.num_decoder_layers, True, self.encoder(source))
        elif "encoder.norm.weight" in self.weights:
            rows = self.encoder(ids)
        else:
            rows = self.stack("decoder", ids, self.config.num_hidden_layers, causal=True)
        return rows @ self.weights["lm_head.weight"].T


def close(got, want):
    """Equal up to rounding: some hundred additions in a row per layer, of numbers up to the largest logit."""
    allowed = 2000 * np.finfo(np.float64).eps * max(1.0, abs(want).max())
    got = got.detach().numpy()
    assert got.shape == want.shape and got.dtype == np.float64
    assert abs(want).max() > 0.1
    assert (abs(got - want) <= allowed).all(), f"{abs(got - want).max():.3e} > {allowed:.3e}"


@kinds
def test_the_encoder_is_the_formulas_whatever_the_padding(kind):
    model = build(CosformerForMaskedLM, **kind)
    ids, restated = text(3, 9), Restated(model)
    close(model(ids).logits, np.stack([restated.logits(row) for row in ids]))
    mask = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0, 1, 0]]
    )
    logits = model(ids, mask).logits
    for row, real in enumerate(mask.bool()):
        close(logits[row, real], restated.logits(ids[row, real]))
    classifier = build(CosformerForSequenceClassification, **kind)
    rows = [Restated(classifier).encoder(ids[row, real])[0] for row, real in enumerate(mask.bool())]
    close(classifier(ids, mask).logits, Restated(classifier).linear("classifier", np.stack(rows)))


@kinds
@torch.no_grad()
def test_the_causal_model_is_the_formulas_in_one_go_in_pieces_and_by_tokens(kind):
    model = build(CosformerForCausalLM, **kind)
    ids = text(2, 13)
    want = np.stack([Restated(model).logits(row) for row in ids])
    close(model(ids).logits, want)
    for cuts in ([5, 6, 9, 13], range(1, 14)):
        cache, pieces, start = CosformerCache(), [], 0
        for end in cuts:
            pieces.append(model(ids[:, start:end], past_key_values=cache).logits)
            start = end
        close(torch.cat(pieces, 1), want)
        assert cache.get_seq_length() == 13 and cache.states[0].length.tolist() == [13, 13]
    assert cache.nbytes == model(ids[:, :1]).past_key_values.nbytes


@kinds
@torch.no_grad()
def test_padding_leaves_no_trace_in_the_causal_model(kind):
    model = build(CosformerForCausalLM, **kind)
    ids, more, restated = text(3, 9), text(3, 4, seed=1), Restated(model)
    mask = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0, 1, 0]]
    )
    first = model(ids, mask)
    cache = copy.deepcopy(first.past_key_values)
    assert cache.get_seq_length() == 9 and cache.states[0].length.tolist() == [6, 5, 4]
    ragged = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    again = copy.deepcopy(cache)
    second = model(more, torch.cat([mask, ragged], 1), past_key_values=cache).logits
    columns = [model(more[:, [t]], ragged[:, [t]], past_key_values=again).logits for t in range(4)]
    steps = torch.cat(
        [model(more[:, [t]], past_key_values=first.past_key_values).logits for t in range(4)], 1
    )
    for row, real in enumerate(mask.bool()):
        known, new = ids[row, real], ragged[row].bool()
        close(first.logits[row, real], restated.logits(known))
        close(steps[row], restated.logits(torch.cat([known, more[row]]))[len(known) :])
        want = restated.logits(torch.cat([known, more[row, new]]))[len(known) :]
        close(second[row, new], want)
        close(torch.cat(columns, 1)[row, new], want)


@kinds
@torch.no_grad()
def test_the_encoder_decoder_is_the_formulas_with_and_without_a_cache(kind):
    model = build(CosformerForConditionalGeneration, **kind)
    source, ids, restated = text(3, 7), text(3, 12, seed=1), Restated(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    want = np.stack([restated.logits(ids[row], source[row, real]) for row, real in enumerate(mask.bool())])
    close(model(source, mask, ids, use_cache=False).logits, want)
    close(model(source, mask, ids).logits, want)
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]] * 3)
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.int64), ids[:, :9]], 1)
    close(model(source, mask, padded, left, use_cache=False).logits[:, 3:], want[:, :9])
    for cuts in ([5, 6, 9, 12], range(1, 13)):
        cache, pieces, start = CosformerCache(), [], 0
        seen = model.encoder(source, mask)
        for end in cuts:
            found = model(None, mask, ids[:, start:end], encoder_outputs=seen, past_key_values=cache)
            pieces.append(found.logits)
            start = end
        close(torch.cat(pieces, 1), want)
    assert len(cache.states) == 4 and [s.length.tolist() for s in cache.states[2:]] == [[5, 3, 7]] * 2


def greedy(logits_of, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, torch.tensor([int(np.argmax(logits_of(ids)[-1]))])])
    return ids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_the_argmax_by_hand(side, use_cache):
    model = build(CosformerForCausalLM)
    texts = [text(1, n, seed=n)[0] for n in (5, 3, 7)]
    want = [greedy(Restated(model).logits, ids, 6)[len(ids) :] for ids in texts]
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, known in enumerate(texts):
        place = slice(7 - len(known), None) if side == "left" else slice(len(known))
        ids[row, place], mask[row, place] = known, 1
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    assert torch.equal(found[:, 7:], torch.stack(want))
    assert len({tuple(row.tolist()) for row in want}) == 3


def test_generate_continues_a_cache_by_several_tokens():
    model = build(CosformerForCausalLM)
    ids, more = text(2, 5), text(2, 3, seed=1)
    first = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, more], 1)
    found = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, torch.stack([greedy(Restated(model).logits, row, 4) for row in longer]))


def test_the_encoder_decoder_generates_as_by_hand():
    model = build(CosformerForConditionalGeneration)
    source, mask = text(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = model.generate(source, attention_mask=mask, max_new_tokens=8, do_sample=False)
    want = [
        greedy(lambda ids, known=source[row, real]: Restated(model).logits(ids, known), torch.tensor([1]), 8)
        for row, real in enumerate(mask.bool())
    ]
    assert torch.equal(found, torch.stack(want))
    assert not torch.equal(want[0], want[1])
    prompt = text(2, 3, seed=4)
    found = model.generate(
        source, attention_mask=mask, decoder_input_ids=prompt, max_new_tokens=4, use_cache=False, num_beams=2
    )
    cached = model.generate(
        source, attention_mask=mask, decoder_input_ids=prompt, max_new_tokens=4, num_beams=2
    )
    assert torch.equal(found, cached) and cached.shape == (2, 8)  # a start is put before the prompt


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def best(logits_of, ids, n, width):
    """Keep the `width` likeliest continuations by every word, n times: (score, ids), best first."""
    kept = [(0.0, ids)]
    for _ in range(n):
        longer = []
        for score, known in kept:
            chance = log_softmax(logits_of(known)[-1])
            longer += [(score + chance[word], torch.cat([known, torch.tensor([word])])) for word in range(V)]
        kept = sorted(longer, key=lambda pair: -pair[0])[:width]
    return kept


@pytest.mark.parametrize("kind", [CosformerForCausalLM, CosformerForConditionalGeneration])
def test_beams_are_the_search_by_hand(kind):
    model, source = build(kind), text(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    found = model.generate(
        source, attention_mask=mask, max_new_tokens=5, num_beams=4, num_return_sequences=4,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    restated = Restated(model)
    for row, real in enumerate(mask.bool()):
        known = source[row, real]
        if kind is CosformerForCausalLM:
            want = best(restated.logits, known, 5, 4)
        else:
            want = best(lambda ids, known=known: restated.logits(ids, known), torch.tensor([1]), 5, 4)
        sequences = found.sequences[row * 4 : row * 4 + 4, -5:]
        assert torch.equal(sequences, torch.stack([ids[-5:] for _, ids in want]))
        scores = np.array([score for score, _ in want])
        # transformers keeps its beams' scores in float32
        error = abs(found.sequences_scores[row * 4 : row * 4 + 4].numpy() - scores)
        assert (error <= 8 * np.finfo(np.float32).eps * abs(scores)).all()


def test_sampling_draws_from_the_logits():
    model = build(CosformerForCausalLM)
    ids = text(1, 4).expand(400, 4)
    torch.manual_seed(0)
    drawn = model.generate(ids, max_new_tokens=1, do_sample=True, top_k=0)[:, -1]
    chance = np.exp(log_softmax(Restated(model).logits(ids[0]))[-1])
    share = np.bincount(drawn.numpy(), minlength=V) / 400
    assert (
        abs(share - chance) <= 4 * np.sqrt(chance * (1 - chance) / 400) + 1 / 400
    ).all()  # four deviations


@torch.no_grad()
def test_columns_of_padding_may_outnumber_the_longest_text():
    ids = text(2, M + 3)
    mask = (torch.arange(M + 3) >= 3).long().expand(2, -1)
    model = build(CosformerForCausalLM)
    close(model(ids, mask).logits[0, 3:], Restated(model).logits(ids[0, 3:]))
    model = build(CosformerForConditionalGeneration)
    for use_cache in (True, False):
        logits = model(ids, mask, ids, mask, use_cache=use_cache).logits
        close(logits[0, 3:], Restated(model).logits(ids[0, 3:], ids[0, 3:]))


@torch.no_grad()
def test_a_row_may_be_padding_alone():
    ids, mask = text(2, 5), torch.tensor([[0] * 5, [1] * 5])
    for kind in (CosformerForMaskedLM, CosformerForCausalLM):
        model = build(kind)
        logits = model(ids, mask).logits
        close(logits[1], Restated(model).logits(ids[1]))
        assert logits.isfinite().all()
        assert model(ids, torch.zeros_like(ids)).logits.isfinite().all()
    for nothing in (ids[:, :0], ids[:0]):
        assert model(nothing).logits.shape == (*nothing.shape, V)
