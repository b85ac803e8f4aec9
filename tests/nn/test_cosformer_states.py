"""What CosformerAttention reads from states, and what lengths are of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linattn.errors import ArgumentTypeError, DtypeError, ShapeError, ValueRangeError
from linattn.nn import CosformerAttention


def made(**options):
    torch.manual_seed(0)
    return CosformerAttention(8, 2, batch_first=True, max_len=32, **options)


def test_states_are_read_in_float32_under_autocast():
    """Far from the first keys, what counts is the difference of two large numbers."""
    torch.manual_seed(0)
    longest = 2048
    module = CosformerAttention(64, 4, batch_first=True, max_len=longest)
    source, query = torch.randn(2, longest // 2, 64), torch.randn(2, longest, 64)
    mask = torch.zeros(2, longest // 2, dtype=torch.bool)
    mask[:, :2] = True
    with torch.no_grad():
        wide = copy.deepcopy(module).double()
        want = wide(query.double(), source.double(), source.double(), key_mask=mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            direct = module(query, source, source, key_mask=mask)
            read = module(query, source, source, key_mask=mask, return_state=True)[0]
    off = [float((x - want).abs().max()) for x in (direct, read)]
    assert 0 < off[1] <= 2 * off[0]


@pytest.mark.parametrize("sizes", [(5, 5), (5, 7), (7, 5)])
def test_lengths_are_of_keys(sizes):
    """With a state and without; of the query, too, where it is the key."""
    module, lengths = made(), torch.tensor([2, 5])
    query, key = (torch.randn(2, n, 8) for n in sizes)
    mask = torch.arange(sizes[1]) < lengths[:, None]
    want = module(query, key, key, key_mask=mask)
    torch.testing.assert_close(module(query, key, key, lengths=lengths), want)
    torch.testing.assert_close(module(query, key, key, lengths=lengths, return_state=True)[0], want)
    both = mask & (torch.arange(sizes[1]) > 0)
    want = module(query, key, key, key_mask=both)
    torch.testing.assert_close(module(query, key, key, lengths=lengths, key_mask=both), want)


@pytest.mark.parametrize("batch_first", [True, False])
def test_lengths_of_a_text_are_of_its_rows(batch_first):
    module, x, lengths = made(), torch.randn(2, 5, 8), torch.tensor([2, 5])
    module.batch_first = batch_first
    given = x if batch_first else x.transpose(0, 1)
    direct = module(given, lengths=lengths)
    read = module(given, lengths=lengths, return_state=True)[0]
    torch.testing.assert_close(direct, read)
    behind = (read if batch_first else read.transpose(0, 1))[0, 2:]
    torch.testing.assert_close(behind, module.out_proj.bias.expand_as(behind))


@pytest.mark.parametrize(
    ("lengths", "error", "says"),
    [
        ([2, 5], ArgumentTypeError, "lengths must be an array, got list"),
        (torch.tensor([2.0, 5.0]), DtypeError, "lengths must be int64 or int32, got float32"),
        (torch.tensor([2]), ShapeError, r"lengths must have shape \[B\] = \(2,\), got \(1,\)"),
        (torch.tensor([2, 8]), ValueRangeError, r"lengths must lie in 0 … N = 7, got \[2, 8\]"),
        (torch.tensor([-1, 5]), ValueRangeError, "lengths must lie in 0"),
    ],
)
def test_what_are_no_lengths(lengths, error, says):
    query, key = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    for options in ({}, {"return_state": True}):
        with pytest.raises(error, match=says if not options else "lengths must"):
            made()(query, key, key, lengths=lengths, **options)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(2, 7), DtypeError), (torch.ones(2, 6, dtype=torch.bool), ShapeError),
        (torch.ones(7, dtype=torch.bool), ShapeError), ([[True] * 7] * 2, ArgumentTypeError),
    ],
)  # fmt: skip
def test_masks_beside_lengths(mask, error):
    query, key, lengths = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.tensor([2, 7])
    for given in ({}, {"lengths": lengths}):
        with pytest.raises(error, match="key_mask must"):
            made()(query, key, key, key_mask=mask, **given)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_source_may_be_padded_beyond_max_len(batch_first):
    module = made()
    query, key, lengths = torch.randn(2, 5, 8), torch.randn(2, 40, 8), torch.tensor([2, 32])
    want = module(query, key[:, :32], key[:, :32], lengths=lengths)
    module.batch_first = batch_first

    def turned(x):
        return x if batch_first else x.transpose(0, 1)

    for options in ({}, {"key_mask": torch.ones(2, 40, dtype=torch.bool)}):
        found = module(turned(query), turned(key), turned(key), lengths=lengths, **options)
        torch.testing.assert_close(turned(found), want)
    read = module(turned(query), turned(key), turned(key), lengths=lengths, return_state=True)[0]
    torch.testing.assert_close(turned(read), want)
    with pytest.raises(ValueRangeError, match=r"max_len=32\) is shorter than 33 positions"):
        module(turned(query), turned(key), turned(key), lengths=lengths + 1)


def test_shapes_alone():
    with FakeTensorMode():
        module, x = made(), torch.randn(2, 5, 8)
        found, state = module(x, lengths=torch.tensor([2, 5]), return_state=True)
        again = module(x, state=state, positions=torch.arange(5)[None])
    assert found.shape == again.shape == x.shape
