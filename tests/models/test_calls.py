"""Calls of the models: what is understood in several ways, and what is refused before it is computed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPast

from linattn.errors import (
    ArgumentTypeError,
    CheckpointError,
    DtypeError,
    OptionError,
    ShapeError,
    ValueRangeError,
)
from linattn.models.cosformer import (
    CosformerConfig,
    CosformerForCausalLM,
    CosformerForConditionalGeneration,
    CosformerForMaskedLM,
)
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM, preset

IDS = torch.randint(5, 32, (2, 8), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])  # three texts in a row


def transnormer() -> Any:
    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=32, decoder_embed_dim=16, hidden_dim=16, decoder_layers=2, decoder_attention_heads=2,
        glu_dim=24, linear_use_lrpe_list=[1, 0], init_std=0.3,
    )  # fmt: skip
    return TransNormerForCausalLM(config).eval()


def cosformer(kind: Any = CosformerForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = CosformerConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.3, **fields,
    )  # fmt: skip
    return kind(config).eval()


MODELS = {
    "transnormer": transnormer,
    "cosformer": cosformer,
    "masked": lambda: cosformer(CosformerForMaskedLM),
    "pair": lambda: cosformer(
        CosformerForConditionalGeneration, num_decoder_layers=1, decoder_start_token_id=1
    ),
}


def call(name: str, ids: torch.Tensor = IDS, **given: Any) -> Any:
    if name == "pair":
        given |= {"input_ids": IDS, "decoder_input_ids": ids}
        if "attention_mask" in given:
            given["decoder_attention_mask"] = given.pop("attention_mask")
    else:
        given["input_ids"] = ids
    return MODELS[name]()(**given)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("columns", [7, 9, 16])
def test_a_mask_is_as_wide_as_the_text(name: str, columns: int) -> None:
    with pytest.raises(ShapeError, match=r"attention_mask must have shape \[2, 8\]"):
        call(name, attention_mask=torch.ones(2, columns, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("name", ["transnormer", "cosformer"])
def test_a_mask_behind_a_cache_is_of_what_is_new_or_of_all(name: str) -> None:
    model = MODELS[name]()
    mask = pad(torch.ones_like(IDS), (3, 0))
    padded = pad(IDS, (3, 0))

    def rest(mask: torch.Tensor) -> torch.Tensor:
        cache = model(
            padded[:, :6], attention_mask=pad(torch.ones(2, 3), (3, 0)), use_cache=True
        ).past_key_values
        return model(padded[:, 6:], attention_mask=mask, past_key_values=cache).logits

    assert torch.equal(rest(mask), rest(mask[:, 6:]))
    with pytest.raises(ShapeError, match=r"\[2, 5 or 11\], .* got \(2, 8\)"):
        rest(mask[:, :8])


@torch.no_grad()
def test_a_mask_without_padding_leaves_texts_back_to_back_apart() -> None:
    model = transnormer()
    texts = [IDS[:1, :3], IDS[:1, 3:4], IDS[:1, 4:]]
    alone = torch.cat([model(text).logits for text in texts], 1)
    options = {"position_ids": POSITIONS, "use_cache": False}
    for mask in (None, torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool)):
        torch.testing.assert_close(model(IDS[:1], attention_mask=mask, **options).logits, alone)
    # the positions of padded texts begin again at the text
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    options["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    padded = model(IDS[:1], attention_mask=mask, **options).logits[:, 3:]
    torch.testing.assert_close(padded, model(IDS[:1, 3:]).logits)


@torch.no_grad()
def test_positions_of_one_row_are_those_of_all() -> None:
    model = transnormer()
    one, both = (
        model(IDS, position_ids=ids, use_cache=False).logits for ids in (POSITIONS, POSITIONS.expand(2, -1))
    )
    assert torch.equal(one, both)
    assert not torch.equal(one, model(IDS).logits)
    for wrong in (POSITIONS[0], POSITIONS[:, :7], POSITIONS.expand(3, -1), POSITIONS.expand(3, 2, -1)):
        with pytest.raises(ShapeError, match=r"position_ids must have shape \[2, 8\]"):
            model(IDS, position_ids=wrong, use_cache=False)


LABELS: list[tuple[Any, type[Exception], str]] = [
    (IDS[0], ShapeError, r"labels must have shape \[2, 8\], as the input, got \[8\]"),
    (IDS.T, ShapeError, r"got \[8, 2\]"),
    (IDS[:, :5], ShapeError, r"got \[2, 5\]"),
    (IDS + 20, ValueRangeError, r"labels must lie in 0 … 31, or be -100 where nothing is asked, got"),
    (-IDS, ValueRangeError, r"labels must lie in 0 … 31"),
    (IDS.tolist(), ArgumentTypeError, "labels must be a tensor, got list"),
    (IDS.double(), DtypeError, "labels must be integers, got float64"),
    (IDS > 9, DtypeError, "labels must be integers, got bool"),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("labels", "error", "says"), LABELS)
def test_labels_are_looked_at_first(name: str, labels: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(name, labels=labels)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16])
@torch.no_grad()
def test_labels_are_integers_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    shifted = {"shift_labels": IDS.flip(1).to(dtype)} if name in ("transnormer", "cosformer") else {}
    want = call(name, labels=IDS, **{name: x.long() for name, x in shifted.items()}).loss
    assert torch.equal(call(name, labels=IDS.to(dtype), **shifted).loss, want)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_labels_may_be_views(name: str) -> None:
    names = ["labels", "shift_labels"] if name in ("transnormer", "cosformer") else ["labels"]
    for view in (IDS.T.contiguous().T, pad(IDS, (1, 1))[:, 1:-1], IDS[:1].expand(2, -1)):
        found, want = (call(name, **dict.fromkeys(names, x)).loss for x in (view, view.contiguous()))
        assert torch.equal(found, want)


@pytest.mark.parametrize("name", ["transnormer", "cosformer"])
@pytest.mark.parametrize(("labels", "error", "says"), LABELS)
def test_shifted_labels_are_looked_at_too(name: str, labels: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"{'' if says.startswith('got') else 'shift_'}{says}"):
        call(name, labels=IDS, shift_labels=labels)


@pytest.mark.parametrize("name", ["transnormer", "cosformer"])
def test_labels_ask_for_all_logits(name: str) -> None:
    whole = call(name, labels=IDS)
    for every in (8, 0, None, np.int64(0), np.int64(8), slice(None), slice(0, 8), slice(-9, None)):
        assert torch.equal(call(name, labels=IDS, logits_to_keep=every).loss, whole.loss)
    for some in (1, 7, np.int64(7), slice(7), slice(1, None), slice(None, None, 2), torch.tensor([7])):
        with pytest.raises(OptionError, match="labels ask for every column's logits"):
            call(name, labels=IDS, logits_to_keep=some)
        assert call(name, logits_to_keep=some).loss is None


EMBEDDED = {
    "transnormer": ("inputs_embeds", {}),
    "cosformer": ("inputs_embeds", {}),
    "masked": ("inputs_embeds", {}),
    "source": ("inputs_embeds", {"decoder_input_ids": IDS}),
    "text": ("decoder_inputs_embeds", {"input_ids": IDS}),
    "encoded": ("encoder_outputs", {"decoder_input_ids": IDS}),
}


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_embeddings_have_the_dtype_of_the_weights(name: str, dtype: torch.dtype) -> None:
    make, (field, rest) = MODELS.get(name, MODELS["pair"]), EMBEDDED[name]
    embeds, model = make().get_input_embeddings()(IDS), make().to(dtype)

    def logits(dtype: torch.dtype) -> torch.Tensor:
        given = embeds.to(dtype)
        found: torch.Tensor = model(**{field: (given,) if name == "encoded" else given}, **rest).logits
        return found

    for other in (torch.bfloat16, torch.float32, torch.float64):
        if other == dtype:
            assert logits(other).dtype == dtype
            continue
        says = "(inputs_embeds|encoder_hidden_states) must have the dtype of the model's weights, "
        with pytest.raises(DtypeError, match=f"{says}{str(dtype)[6:]}, got {str(other)[6:]}"):
            logits(other)
        with torch.autocast("cpu", torch.bfloat16):
            if torch.float64 in (dtype, other):  # which it leaves alone
                with pytest.raises(DtypeError, match=says):
                    logits(other)
            elif dtype == torch.float32 or name in (
                "transnormer",
                "encoded",
            ):  # LayerNorm: narrower rows only
                assert logits(other).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["transnormer", "cosformer", "pair"])
def test_generate_takes_rows_of_prompts(name: str) -> None:
    model = MODELS[name]()
    for wrong in (IDS[0], IDS[:0], IDS[None]):
        with pytest.raises(ShapeError, match=r"input_ids must have shape \[b, n\], .* got "):
            model.generate(wrong, max_new_tokens=2)
    with pytest.raises(ShapeError, match=r"inputs_embeds must have shape \[b, n, e\]"):
        model.generate(inputs_embeds=torch.zeros(2, 16), max_new_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["transnormer", "cosformer"])
def test_wrong_labels_move_no_cache(name: str) -> None:
    model = MODELS[name]()
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ShapeError):
        model(IDS, past_key_values=cache, labels=IDS[:, :5])
    assert cache.get_seq_length() == 8


def test_labels_that_ask_nothing_may_say_so_otherwise() -> None:
    model = transnormer()
    labels = IDS.masked_fill(IDS > 20, -1)
    torch.testing.assert_close(
        model(IDS, labels=labels, ignore_index=-1).loss,
        model(IDS, labels=labels.masked_fill(labels == -1, -100)).loss,
    )


@pytest.mark.parametrize("chunk", [2.5, "a", -1, True])
def test_a_chunk_of_the_loss_is_a_number_of_tokens(chunk: Any) -> None:
    model = transnormer().train()
    model.loss_chunk = chunk
    with pytest.raises(ValueRangeError, match=r"loss_chunk must be None or a number of tokens"):
        model(IDS, labels=IDS)


@torch.no_grad()
def test_what_an_encoder_gave_comes_by_name_or_in_order() -> None:
    model = MODELS["pair"]()
    rows = model.encoder(IDS).last_hidden_state
    want = model(IDS, decoder_input_ids=IDS).logits
    named = BaseModelOutputWithPast(last_hidden_state=rows)
    for given in (named, dict(named), (rows,), [rows, None]):
        assert torch.equal(model(encoder_outputs=given, decoder_input_ids=IDS).logits, want)
    for wrong in ({}, (), rows, "rows"):
        with pytest.raises(OptionError, match="encoder_outputs must have last_hidden_state"):
            model(encoder_outputs=wrong, decoder_input_ids=IDS)


@pytest.mark.parametrize("size", [0, -1, 2.5, "a"])
@pytest.mark.parametrize("name", ["transnormer", "cosformer"])
def test_a_prompt_is_read_in_pieces_of_at_least_a_token(name: str, size: Any) -> None:
    with pytest.raises(OptionError, match="prefill_chunk_size must be a number of tokens"):
        MODELS[name]().generate(IDS, max_new_tokens=2, prefill_chunk_size=size)


def test_embeddings_are_not_read_in_pieces() -> None:
    model = transnormer()
    embeds = model.get_input_embeddings()(IDS)
    with pytest.raises(OptionError, match="prefill_chunk_size cuts ids into pieces"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2, prefill_chunk_size=3)


def test_a_preset_has_only_fields_that_exist() -> None:
    assert preset("385m", decay_schedule="paper", dtype="bfloat16", hidden_size=512).decoder_embed_dim == 512
    with pytest.raises(OptionError, match="has no field 'decay_shedule'"):
        preset("385m", decay_shedule="paper")
    for name in (385, None, "2b"):
        with pytest.raises(OptionError, match=f"no preset named {name!r}; known: 385m, 1b"):
            preset(name)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 7 // 10)


def code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"lm_head.weight": os.getcwd}, 2))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "its pickled weights"),
        (lambda path: os.truncate(path, 0), "its pickled weights are damaged"),
        (lambda path: path.write_text("hello " * 100), "its pickled weights are damaged"),
        (code, "damaged, or hold more than tensors"),
    ],
    ids=["cut", "empty", "text", "code"],
)
def test_damaged_pickles_say_so(damage: Any, says: str, tmp_path: Path) -> None:
    model = transnormer()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again = TransNormerForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    damage(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=says):
        TransNormerForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
