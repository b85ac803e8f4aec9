"""Both causal models as transformers, Trainer and its pipelines use them."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, pad
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linattn.errors import OptionError, ShapeError, StateError, ValueRangeError
from linattn.models.cosformer import CosformerConfig, CosformerForCausalLM
from linattn.models.huggingface.newer import CACHE, cache_of
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM
from linattn.models.transnormer.modeling import TransNormerBlock
from linattn.models.transnormer_lm import steppers

IDS = torch.randint(5, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["transnormer", "cosformer"])
def model(request: Any) -> Any:
    torch.manual_seed(0)
    if request.param == "transnormer":
        config = TransNormerConfig(
            vocab_size=64, decoder_embed_dim=32, hidden_dim=32, decoder_layers=2, decoder_attention_heads=2,
            glu_dim=48, linear_use_lrpe_list=[1, 0], init_std=0.2,
        )  # fmt: skip
        return TransNormerForCausalLM(config).eval()
    return CosformerForCausalLM(
        CosformerConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=128, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def test_label_smoothing_asks_for_the_next_token(model: Any, tmp_path: Any) -> None:
    """Trainer shifts labels by itself then, where it finds the model's name among the causal ones."""
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, use_cpu=True, report_to=[])
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": IDS, "labels": IDS})
    torch.testing.assert_close(found, model(IDS, labels=IDS).loss)
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # so do pipelines


@pytest.mark.parametrize("smoothing", [1e-9, 0.1])
def test_smoothed_losses_of_padded_texts_teach_what_those_alone_do(
    model: Any, tmp_path: Any, smoothing: float
) -> None:
    """Trainer forms this loss from the logits, and asks for a first token where padding comes before it."""
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=smoothing, use_cpu=True, report_to=[]
    )  # fmt: skip
    trainer, texts = Trainer(model, arguments), (IDS[:1], IDS[1:, 3:])
    ids, mask = pad(IDS, (2, 0)), pad(torch.ones_like(IDS), (2, 0))
    mask[1, :5] = 0

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [*model.parameters()]))

    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = trainer.compute_loss(model, given)
    counts = [text.shape[1] - 1 for text in texts]
    alone = [
        count * trainer.compute_loss(model, {"input_ids": text, "labels": text})
        for text, count in zip(texts, counts, strict=True)
    ]
    # first tokens are asked of zeros: the logarithm of 64 each, and no gradient
    total, items = sum(alone), sum(counts) + len(texts)
    torch.testing.assert_close(found, (total + len(texts) * math.log(64)) / items)
    torch.testing.assert_close(gradients(found), gradients(total / items))


@pytest.mark.parametrize(
    ("model", "chunk"), [("transnormer", None), ("transnormer", 4), ("cosformer", None)], indirect=["model"]
)
@torch.no_grad()
def test_a_text_padded_on_the_left_has_the_loss_it_has_alone(model: Any, chunk: int | None) -> None:
    model.loss_chunk = chunk
    padded, mask = pad(IDS, (3, 0)), pad(torch.ones_like(IDS), (3, 0))
    model.train(chunk is not None)
    found = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(found, model(IDS, labels=IDS).loss)


@pytest.mark.parametrize(
    ("model", "chunk"), [("transnormer", None), ("transnormer", 4), ("cosformer", None)], indirect=["model"]
)
@pytest.mark.parametrize("kind", [int, torch.tensor])
@torch.no_grad()
def test_what_trainer_counts_is_what_is_asked(model: Any, chunk: int | None, kind: Any) -> None:
    """Trainer counts every label of a column after the first; nothing foretells a text's first token."""
    model.loss_chunk = chunk
    whole_row = torch.randint(5, 64, (1, 12), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([pad(IDS, (3, 0)), whole_row])
    mask = torch.cat([pad(torch.ones_like(IDS), (3, 0)), torch.ones_like(whole_row)])
    mask[1, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model.train(chunk is not None)
    lengths, counts = [9, 5, 12], [9, 5, 11]  # of each row

    def loss(rows: slice, items: int) -> Any:
        return model(
            ids[rows], attention_mask=mask[rows], labels=labels[rows], num_items_in_batch=kind(items)
        ).loss

    texts = [row[None, -n:] for row, n in zip(ids, lengths, strict=True)]
    alone = [model(text, labels=text).loss for text in texts]
    sums = [(n - 1) * mean for n, mean in zip(lengths, alone, strict=True)]
    for rows in (slice(0, 2), slice(1, 3), slice(0, 3)):
        want = sum(sums[rows]) / sum(n - 1 for n in lengths[rows])
        torch.testing.assert_close(loss(rows, sum(counts[rows])), want)
    shares = [loss(slice(row, row + 1), sum(counts)) for row in range(3)]  # a step of three passes
    weighed = [n * mean / sum(counts) for n, mean in zip(counts, alone, strict=True)]
    torch.testing.assert_close(shares, weighed)


@torch.no_grad()
def test_a_cache_has_two_names(model: Any) -> None:
    """Newer transformers says cache where others say past_key_values, and `generate` goes on by either."""
    begun = cache_of(model(IDS[:, :4], use_cache=True))
    first, second = copy.deepcopy(begun), copy.deepcopy(begun)
    wanted = model(IDS[:, 4:], past_key_values=first)
    found = model(IDS[:, 4:], cache=second)
    assert torch.equal(found.logits, wanted.logits)
    assert cache_of(found) is second and cache_of(wanted) is first and second.columns == 9
    with pytest.raises(OptionError, match="two names of the same"):
        model(IDS[:, 4:], past_key_values=first, cache=second)
    inner = model.model if hasattr(model, "model") else model.decoder
    assert cache_of(inner(IDS[:, 4:], cache=begun)) is begun and begun.columns == 9
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    whole = model.generate(IDS, **options)
    kept = cache_of(model(IDS[:, :4], use_cache=True))
    assert torch.equal(model.generate(IDS, **{CACHE: kept}, **options), whole) and kept.columns == 11


def test_layers_that_transformers_wraps_take_steps(model: Any) -> None:
    """Newer transformers puts a function around `forward` of every layer that can be checkpointed."""
    assert not isinstance(model, TransNormerForCausalLM) or steppers(model.model.layers) is not None

    class Wrapped(TransNormerBlock):
        @functools.wraps(TransNormerBlock.forward)
        def forward(self, *given: Any, **more: Any) -> Any:
            return TransNormerBlock.forward(self, *given, **more)

    class Own(TransNormerBlock):
        def forward(self, *given: Any, **more: Any) -> Any:
            return TransNormerBlock.forward(self, *given, **more)

    config = TransNormerConfig(decoder_embed_dim=32, hidden_dim=32, decoder_attention_heads=2, glu_dim=48)
    assert steppers([Wrapped(config.parts(), 0)]) is not None and steppers([Own(config.parts(), 0)]) is None


@torch.no_grad()
def test_a_pass_in_which_nothing_is_asked_adds_nothing(model: Any) -> None:
    ids, mask = torch.tensor([[0, 0, 7]]), torch.tensor([[0, 0, 1]])
    labels = torch.tensor([[-100, -100, 7]])
    for items in (5, torch.tensor(5)):
        assert model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss == 0


@torch.no_grad()
def test_labels_that_are_shifted_already_are_counted_as_they_are(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    shifted = pad(IDS, (0, 1), value=-100)[:, 1:].contiguous()
    given = {"attention_mask": mask, "labels": IDS, "shift_labels": shifted, "num_items_in_batch": 16}
    want = cross_entropy(model(IDS, attention_mask=mask).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, **given).loss, want)


def test_no_token_is_asked_for_by_its_own_output(model: Any) -> None:
    ids, mask = torch.tensor([[0, 0, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    labels = torch.tensor([[-100, -100, 7, -100]])
    assert model(ids, attention_mask=mask, labels=labels).loss.isnan()  # nothing foretells a first token


@pytest.mark.parametrize("model", ["transnormer"], indirect=True)
@pytest.mark.parametrize("said", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_several_rows_of_packed_texts(model: Any, said: str, chunk: int | None) -> None:
    model.loss_chunk = chunk
    cuts = (4, 6)  # where each row's second text begins
    position = torch.stack([torch.cat([torch.arange(cut), torch.arange(9 - cut)]) for cut in cuts])
    number = torch.stack([(torch.arange(9) >= cut).int() for cut in cuts])
    options = {said: position if said == "position_ids" else number, "use_cache": False}
    texts = [part for row, cut in zip(IDS, cuts, strict=True) for part in (row[:cut], row[cut:])]
    alone = [model(text[None], use_cache=False).logits[0] for text in texts]
    found = model(IDS, labels=IDS, output_hidden_states=True, **options)
    torch.testing.assert_close(found.logits, torch.cat(alone).view(2, 9, -1))
    assert all(rows.shape == (2, 9, 32) for rows in found.hidden_states)
    asked = [(logits[:-1], text[1:]) for logits, text in zip(alone, texts, strict=True)]
    want = cross_entropy(*map(torch.cat, zip(*asked, strict=True)))
    torch.testing.assert_close(model.train()(IDS, labels=IDS, **options).loss, want)
    with pytest.raises(ShapeError, match="in one row, so b must be 1, got 2"):
        model(IDS, cu_seqlens=torch.tensor([0, 9, 18]))


@pytest.mark.parametrize("rows", [40, 80])
def test_an_embedding_put_in_place_has_ids_of_its_own(model: Any, rows: int) -> None:
    model.set_input_embeddings(torch.nn.Embedding(rows, 32))
    model(torch.tensor([[0, rows - 1]]))
    with pytest.raises(ValueRangeError, match=f"0 … {rows - 1}, got {rows}"):
        model(torch.tensor([[0, rows]]))


def test_a_cache_of_another_model(model: Any) -> None:
    cache = model(IDS, use_cache=True).past_key_values
    before = [state.clone() for state in cache.states]
    for wrong in (cache.states[:1], cache.states * 2):
        cache.states = wrong
        with torch.no_grad(), pytest.raises(StateError, match=f"hold 2 states, got {len(wrong)}"):
            model(IDS[:, :1], past_key_values=cache)
        for state, old in zip(wrong, before, strict=False):
            assert torch.equal(state.kv, old.kv) and torch.equal(state.length, old.length)


def test_a_configuration_that_asks_for_attentions_is_refused(model: Any) -> None:
    model.config.output_attentions = True
    with pytest.raises(OptionError, match="output_attentions"):
        model(IDS)
    model(IDS, output_attentions=False)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_traced_by_jit_for_any_size_and_mask(model: Any) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    module, mask = Logits(), torch.ones_like(IDS)
    longer, holes = torch.randint(5, 64, (3, 70)), torch.ones(3, 70, dtype=torch.int64)
    holes[1, :20] = 0
    traced = torch.jit.trace(module, (IDS, mask), check_trace=False)
    for args in ((IDS, mask), (longer, holes), (longer, torch.ones_like(holes))):
        torch.testing.assert_close(traced(*args), module(*args))
