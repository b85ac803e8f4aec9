"""Bits per byte count every byte, with everything before it."""

from __future__ import annotations

import lzma
import math
import zlib

import numpy as np
import pytest
import torch

from linattn.errors import DataError
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.train import bits_per_byte, compressed_bits_per_byte
from linattn.train.evaluate import CHUNK, ROWS, spread


def drawn():
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "hidden_dim": 8, "num_heads": 2, "num_layers": 2, "glu_dim": 8}
    model = TransNormerLM(TransNormerConfig(**sizes)).double()
    torch.nn.init.normal_(model.lm_head.weight)
    return model


def spelled_out(model, row):
    """Every byte from all bytes before it, in one call; the first costs 8 bits."""
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.from_numpy(row[None, :-1].astype(np.int64)))[0], -1).numpy()
    return 8.0 - sum(logs[i, byte] for i, byte in enumerate(row[1:])) / math.log(2)


@pytest.mark.parametrize("n", [1, 2, CHUNK, ROWS * CHUNK * 2 + 3])
def test_is_the_mean_over_every_byte(n):
    model, text = drawn(), np.random.default_rng(0).integers(0, 256, n).astype(np.uint8)
    rows = min(ROWS, max(1, n // CHUNK))
    width = n // rows
    ends = [width * (row + 1) for row in range(rows - 1)] + [n]
    want = sum(spelled_out(model, text[width * row : end]) for row, end in enumerate(ends)) / n
    got = bits_per_byte(model, text)
    # cross entropies are summed in float32
    assert abs(got - want) <= 64 * np.finfo(np.float32).eps * want


def test_an_untrained_head_needs_eight_bits():
    model = TransNormerLM(TransNormerConfig(embed_dim=8, hidden_dim=8, num_heads=2, num_layers=1, glu_dim=8))
    assert abs(bits_per_byte(model, np.arange(200, dtype=np.uint8)) - 8.0) <= 8 * np.finfo(np.float32).eps * 8


def test_the_compressors_are_the_real_ones():
    data = zlib.__doc__.encode() * 3
    bits = compressed_bits_per_byte(np.frombuffer(data, np.uint8))
    assert bits["zlib"] == 8 * len(zlib.compress(data, 9)) / len(data)
    assert bits["lzma"] <= 8 * len(lzma.compress(data)) / len(data)


def test_spread_takes_pieces_from_the_whole_text():
    text = np.arange(1000) // 10
    part = spread(text, 160)
    assert len(part) == 160 and part[0] == 0 and part[-1] == 99
    assert len(np.unique(part[::20])) == ROWS
    assert spread(text, 1000) is text


def test_nothing_to_measure():
    for measure in (lambda x: bits_per_byte(drawn(), x), compressed_bits_per_byte):
        with pytest.raises(DataError, match="no held-out text"):
            measure(np.zeros(0, np.uint8))
