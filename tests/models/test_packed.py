"""Texts back to back in a row stay apart beside masks, caches and compilers, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from linattn.errors import OptionError, ShapeError
from linattn.models.transnormer import TransNormerCache, TransNormerConfig, TransNormerForCausalLM

TEXTS = torch.randint(3, 32, (1, 9), generator=torch.Generator().manual_seed(1)).split([4, 5], 1)
ROW, ONES = torch.cat(TEXTS, 1), torch.ones(1, 9, dtype=torch.int64)
SAID = {
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
    "seq_idx": torch.tensor([[0] * 4 + [1] * 5]),
}
PADDED = "texts back to back have no padding"
said = pytest.mark.parametrize("said", SAID)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=32, decoder_embed_dim=12, hidden_dim=12, decoder_layers=1, decoder_attention_heads=2,
        glu_dim=16, linear_use_lrpe_list=[1], init_std=0.5,
    )  # fmt: skip
    return TransNormerForCausalLM(config).eval()


@pytest.fixture
def apart(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(text).logits for text in TEXTS], 1)


@said
@torch.no_grad()
def test_compiled_beside_a_mask_of_ones(model: Any, apart: torch.Tensor, said: str) -> None:
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ROW, attention_mask=ONES, **{said: SAID[said]}).logits, apart)
    borders = torch.tensor([0, 4, 9])
    torch.testing.assert_close(compiled(ROW, attention_mask=ONES, cu_seqlens=borders).logits, apart)
    with pytest.raises(ShapeError, match=PADDED):
        compiled(ROW, attention_mask=ONES - (ONES.cumsum(1) > 8).long(), **{said: SAID[said]})


@said
@pytest.mark.parametrize("columns", [(0, 2), (2, 0)], ids=["behind", "in front"])
@torch.no_grad()
def test_padding_beside_several_texts_is_refused(model: Any, said: str, columns: tuple[int, int]) -> None:
    mask, place = pad(ONES, columns), pad(SAID[said], columns)
    with pytest.raises(ShapeError, match=PADDED):
        model(pad(ROW, columns), attention_mask=mask, **{said: place})


@torch.no_grad()
def test_positions_and_numbers_of_padding_say_nothing(model: Any) -> None:
    want = model(ROW).logits
    ids, mask = pad(ROW, (2, 2)), pad(ONES, (2, 2))
    for place in (mask.cumsum(1) - 1, (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)):
        found = model(ids, attention_mask=mask, position_ids=place).logits
        torch.testing.assert_close(found[:, 2:-2], want)
    torch.testing.assert_close(model(ids, attention_mask=mask, seq_idx=mask).logits[:, 2:-2], want)


@said
@torch.no_grad()
def test_behind_a_cache(model: Any, apart: torch.Tensor, said: str) -> None:
    found = model(ROW, past_key_values=TransNormerCache(), **{said: SAID[said]})
    torch.testing.assert_close(found.logits, apart)
    assert found.past_key_values.states[0].length.tolist() == [4, 5]  # as behind cu_seqlens
    cache = model(ROW).past_key_values
    with pytest.raises(OptionError, match=f"{said} .*pass cu_seqlens"):
        model(ROW, past_key_values=cache, **{said: SAID[said]})
    model(ROW, past_key_values=cache, position_ids=9 + torch.arange(9)[None])


def test_seq_idx_is_of_every_column(model: Any) -> None:
    with pytest.raises(ShapeError, match=r"seq_idx must have shape \[1, 9\]"):
        model(ROW, seq_idx=SAID["seq_idx"][:, :8])


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@torch.no_grad()
def test_an_exported_model_is_of_one_text_a_row(model: Any, apart: torch.Tensor, masked: bool) -> None:
    given = {"input_ids": ROW, "use_cache": False} | ({"attention_mask": ONES} if masked else {})
    with pytest.raises(OptionError, match=r"seq_idx: .* by torch\.export"):
        torch.export.export(model, (), {**given, "seq_idx": SAID["seq_idx"]}, strict=False)
    plain = torch.arange(9)[None]
    program = torch.export.export(model, (), {**given, "position_ids": plain}, strict=False).module()
    torch.testing.assert_close(program(**given, position_ids=plain).logits, model(ROW).logits)
    with pytest.raises(RuntimeError, match="position_ids begin again"):
        program(**given, position_ids=SAID["position_ids"])
