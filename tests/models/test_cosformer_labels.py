"""What a cosFormer classifier may be asked: classes, several at once, numbers; sentences for the rest."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from linattn.errors import ArgumentTypeError, DtypeError, ShapeError, ValueRangeError
from linattn.models.cosformer import CosformerForConditionalGeneration, CosformerForSequenceClassification
from tests.models.test_cosformer import build, text

IDS = text(2, 5)
SEVERAL = {"problem_type": "multi_label_classification"}
NUMBERS = {"problem_type": "regression"}


def asked(labels, **fields):
    """Loss, logits and the kind of problem that it was."""
    model = build(CosformerForSequenceClassification, **fields)
    found = model(IDS, labels=labels)
    found.loss.backward()
    return found.loss.detach(), found.logits.detach(), model.config.problem_type


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_classes_of_any_integer_dtype(dtype, shape):
    loss, logits, problem = asked(torch.tensor([2, 0], dtype=dtype).view(shape))
    assert problem == "single_label_classification"
    assert torch.equal(loss, functional.cross_entropy(logits, torch.tensor([2, 0])))


def test_a_text_may_be_left_out():
    loss, logits, _ = asked(torch.tensor([2, -100]))
    assert torch.equal(loss, functional.cross_entropy(logits[:1], torch.tensor([2])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
def test_several_classes_at_once(dtype):
    some = torch.tensor([[0, 1, 1], [1, 0, 0]])
    loss, logits, _ = asked(some.to(dtype), **SEVERAL)
    wanted = some.to(dtype if dtype.is_floating_point else torch.float32)  # torch's loss has its dtype
    assert torch.equal(loss, functional.binary_cross_entropy_with_logits(logits, wanted))
    if dtype.is_floating_point:
        assert asked(some.to(dtype))[2] == SEVERAL["problem_type"]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_number(shape):
    loss, logits, problem = asked(torch.tensor([2.5, -7.0], dtype=torch.float64).view(shape), num_labels=1)
    assert problem == "regression"
    assert torch.equal(loss, ((logits[:, 0] - torch.tensor([2.5, -7.0])) ** 2).mean())
    loss, logits, _ = asked(torch.full((2, 3), 4), **NUMBERS)
    assert torch.equal(loss, ((logits - 4) ** 2).mean())


REFUSED = [
    ([0, 1], {}, ArgumentTypeError, "labels must be a tensor, got list"),
    (np.array([0, 1]), {}, ArgumentTypeError, "labels must be a tensor, got ndarray"),
    (torch.tensor([0, 3]), {}, ValueRangeError, "lie in 0 … 2, or be -100 where nothing is asked, got 3"),
    (torch.tensor([-1, 0]), {}, ValueRangeError, "got -1"),
    (torch.tensor([0, 1, 2]), {}, ShapeError, r"shape \[2\] for problem_type 'single_label.*', got \[3\]"),
    (torch.tensor(1), {}, ShapeError, r"got \[\]"),
    (torch.tensor([[0, 1, 1], [1, 0, 0]]), {}, ShapeError, r"must have shape \[2\] .*, got \[2, 3\]"),
    (
        torch.tensor([0.0, 1.0]),
        {},
        ShapeError,
        r"shape \[2, 3\] for problem_type 'multi_label_classification'",
    ),
    (
        torch.tensor([0.0, 1.0]),
        {"problem_type": "single_label_classification"},
        DtypeError,
        "must be integers, the classes' numbers for .*, got float32",
    ),
    (torch.zeros(2, 3, dtype=torch.complex64), SEVERAL, DtypeError, "must be real numbers .* got complex64"),
    (torch.full((2, 3), -100), SEVERAL, ValueRangeError, "at once must lie in 0 … 1, got -100"),
    (torch.full((2, 3), torch.nan), SEVERAL, ValueRangeError, "got nan"),
    (torch.zeros(2), NUMBERS, ShapeError, r"shape \[2, 3\] for problem_type 'regression', got \[2\]"),
    (torch.zeros(3), {"num_labels": 1}, ShapeError, r"shape \[2\] for problem_type 'regression', got \[3\]"),
]


@pytest.mark.parametrize(("labels", "fields", "error", "sentence"), REFUSED, ids=[row[3] for row in REFUSED])
def test_refusals(labels, fields, error, sentence):
    model = build(CosformerForSequenceClassification, **fields)
    before = copy.deepcopy(model.config)
    with pytest.raises(error, match=sentence):
        model(IDS, labels=labels)
    assert model.config.problem_type == before.problem_type  # the first labels that are taken decide


@pytest.mark.parametrize("ignored", [-100, -1])
def test_labels_that_ask_nothing_are_padding_of_the_decoder(ignored):
    """Whatever number says so, they are no tokens."""
    model = build(CosformerForConditionalGeneration, num_decoder_layers=1).train(False)
    labels = torch.tensor([[4, ignored, 5, 6], [2, 3, ignored, ignored]])
    given = torch.tensor([[1, 4, 0, 5], [1, 2, 3, 0]])  # begun by decoder_start_token_id
    assert (model.config.decoder_start_token_id, model.config.pad_token_id) == (1, 0)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), given)
    ids = text(2, 5)
    found = model(ids, labels=labels, ignore_index=ignored)
    logits = model(ids, decoder_input_ids=given).logits
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=ignored)
    assert torch.equal(found.logits, logits) and torch.equal(found.loss, loss)
