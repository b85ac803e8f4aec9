"""Generation: through decode steps, the same numbers as a full forward."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from linattn.errors import OptionError, ValueRangeError
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.train import generate
from linattn.train.generate import PREFILL, decoded, pick


def drawn(**changes):
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "hidden_dim": 8, "num_heads": 2, "num_layers": 2, "glu_dim": 8} | changes
    model = TransNormerLM(TransNormerConfig(**sizes, linear_use_lrpe_list=(1, 0))).double()
    torch.nn.init.normal_(model.lm_head.weight, std=5.0)
    return model


@pytest.mark.parametrize("prompt", [b"ab", b"x" * (PREFILL + 5), b""])
def test_greedy_is_the_argmax_of_the_whole_forward(prompt):
    model = drawn()
    got = list(generate(model, prompt, 12, temperature=0))
    text = list(prompt or b"\n")
    with torch.no_grad():
        for byte in got:
            assert byte == int(model(torch.tensor([text]))[0, -1].argmax())
            text.append(byte)


def test_a_seed_fixes_the_text_and_a_second_run_is_not_disturbed_by_the_first():
    model = drawn()
    first = list(generate(model, b"ab", 40, seed=1))
    assert list(generate(model, b"ab", 40, seed=1)) == first
    assert list(generate(model, b"ab", 40, seed=2)) != first


def test_bytes_come_one_by_one_and_end():
    assert len(list(itertools.islice(generate(drawn(), b"a", 10**9), 3))) == 3
    assert list(generate(drawn(), b"a", 0)) == []


def test_pick_follows_temperature_and_top_k():
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    assert pick(logits, 0, None, generator) == 2
    assert {pick(logits, 100.0, 2, generator) for _ in range(200)} == {2, 3}
    assert {pick(logits, 100.0, 99, generator) for _ in range(400)} == {0, 1, 2, 3}
    draws = [pick(logits, 1.0, None, generator) for _ in range(4000)]
    share = math.exp(3) / sum(map(math.exp, logits.tolist()))
    spread = math.sqrt(share * (1 - share) / 4000)
    assert abs(draws.count(2) / 4000 - share) < 5 * spread
    assert pick(logits * 1e30, 1e-30, None, generator) == 2  # no overflow


def test_top_k_is_a_bound_where_logits_are_equal():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        assert len({pick(torch.zeros(50), 1.0, count, generator) for _ in range(200)}) == count
    tied = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    drawn = {pick(tied, 100.0, 2, generator) for _ in range(200)}
    assert len(drawn) == 2 and 0 in drawn and 4 not in drawn


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_prediction_that_is_no_number_is_refused(value, temperature):
    model = drawn()
    with torch.no_grad():
        model.lm_head.weight[3] = value
    with pytest.raises(ValueRangeError, match="the model predicts NaN or infinity"):
        list(generate(model, b"ab", 3, temperature=temperature))
    with pytest.raises(ValueRangeError, match="the model predicts NaN or infinity"):
        pick(torch.tensor([0.0, value, 1.0]), temperature, None, torch.Generator())


def test_text_appears_when_its_characters_are_whole():
    assert list(decoded(iter("aé€".encode()))) == ["a", "é", "€"]
    assert "".join(decoded(iter(b"a\xff\xe2"))) == "a\ufffd\ufffd"


def test_refusals_come_before_the_first_byte():
    for changes, sentence in (
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be a number from 0 on, got -0.5"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ):
        with pytest.raises(ValueRangeError, match=sentence):
            generate(drawn(), b"a", **({"tokens": 1} | changes))
    with pytest.raises(OptionError, match="vocabulary must be 256, it is 11"):
        generate(drawn(vocab_size=11), b"a", 1)
