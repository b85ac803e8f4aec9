"""MiniMax of Hugging Face transformers on linattn: the same model where the original is right."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import linattn
from linattn import errors

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import MiniMaxConfig, MiniMaxForCausalLM  # noqa: E402
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention  # noqa: E402

from linattn.integrations.transformers import patch_minimax  # noqa: E402

Tensor = torch.Tensor
TOL = {"rtol": 1e-5, "atol": 1e-5}  # in float64; the original's slopes are rounded to float32


@pytest.fixture(scope="module")
def original() -> Any:
    """Four layers, three of them lightning, blocks of 8 tokens: lengths below cross several.

    The first is another: where it is a lightning layer, the original's cache counts no tokens.
    """
    return of_layers("flll")


def of_layers(kinds: str) -> Any:
    """A model of lightning (l) and full attention (f) layers."""
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=len(kinds),
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        block_size=8,
        layer_types=[{"l": "linear_attention", "f": "full_attention"}[kind] for kind in kinds],
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MiniMaxForCausalLM(config).eval().double()
    model.set_experts_implementation("eager")  # the others know no float64
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture
def patched(original: Any) -> Iterator[Any]:
    model = copy.deepcopy(original)
    with patch_minimax(model):
        yield model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 7, 8, 41])
def test_logits_are_the_original_s(original: Any, patched: Any, n: int) -> None:
    ids = tokens(2, n)
    mine, theirs = patched(ids), original(ids)
    torch.testing.assert_close(mine.logits, theirs.logits, **TOL)
    for layer, kv in enumerate(theirs.past_key_values.linear_cache):
        if isinstance(kv, Tensor):
            torch.testing.assert_close(mine.past_key_values.linear_cache[layer], kv, **TOL)


@torch.no_grad()
def test_states_and_attentions_are_the_original_s(original: Any, patched: Any) -> None:
    ids = tokens(2, 19)
    mine, theirs = (m(ids, output_attentions=True, output_hidden_states=True) for m in (patched, original))
    for name in ("attentions", "hidden_states"):
        for x, y in zip(mine[name], theirs[name], strict=True):
            torch.testing.assert_close(x, y, **TOL)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_the_original_s(original: Any, patched: Any, side: str) -> None:
    ids, mask = tokens(3, 21), torch.ones(3, 21, dtype=torch.int64)
    for row, pads in enumerate((0, 4, 13)):
        mask[row, slice(None, pads) if side == "left" else slice(21 - pads, None)] = 0
    mine, theirs = patched(ids, attention_mask=mask), original(ids, attention_mask=mask)
    torch.testing.assert_close(mine.logits[mask.bool()], theirs.logits[mask.bool()], **TOL)


@torch.no_grad()
def test_left_padding_changes_nothing(patched: Any) -> None:
    ids = tokens(1, 20)
    whole = patched(ids).logits
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.int64), ids], 1)
    mask = (torch.arange(29) >= 9).long()[None]
    places = (torch.arange(29) - 9).clamp(min=0)[None]
    found = patched(padded, attention_mask=mask, position_ids=places).logits[:, 9:]
    torch.testing.assert_close(found, whole, **TOL)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(20, 1, 1, 1), (5, 11, 7), (1, 22), (22, 1)])
def test_a_sequence_may_be_continued_in_pieces(patched: Any, cuts: tuple[int, ...]) -> None:
    ids = tokens(2, sum(cuts))
    whole = patched(ids).logits
    cache, found, at = MiniMaxCache(), [], 0
    for n in cuts:
        places = torch.arange(at, at + n)[None]
        found.append(patched(ids[:, at : at + n], past_key_values=cache, use_cache=True, position_ids=places))
        at += n
    torch.testing.assert_close(torch.cat([x.logits for x in found], 1), whole, **TOL)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}], ids=str)
def test_it_generates_what_the_original_does(original: Any, patched: Any, options: dict[str, Any]) -> None:
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5] = 0

    def run(model: Any) -> Any:
        torch.manual_seed(1)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=15, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip

    mine, theirs = run(patched), run(original)
    assert torch.equal(mine.sequences, theirs.sequences)
    for x, y in zip(mine.logits, theirs.logits, strict=True):
        torch.testing.assert_close(x, y, **TOL)


LIGHTNING_FIRST = ("lf", "lllf", "lfl", "lflf")


@torch.no_grad()
@pytest.mark.parametrize("kinds", LIGHTNING_FIRST)
def test_a_lightning_layer_first_counts_tokens(kinds: str) -> None:
    """Padded texts generate what they would alone, and texts go on by any number of tokens."""
    model = of_layers(kinds)
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.int64)
    mask[0, :6] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    alone = [
        model.generate(row[None], use_cache=False, **options)[0, len(row) :] for row in (ids[0, 6:], ids[1])
    ]
    with patch_minimax(model):
        whole = model(ids[1:], use_cache=False).logits
        found = model.generate(ids, attention_mask=mask, **options)[:, 17:]
        assert torch.equal(found, torch.stack(alone))
        cache, pieces = MiniMaxCache(), []
        for piece in ids[1:].split((9, 1, 5, 2), 1):  # no position_ids: the cache says where they are
            pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == 17
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **TOL)


@pytest.mark.parametrize("kinds", ["flll", *LIGHTNING_FIRST])
def test_beams_take_their_states_along(kinds: str) -> None:
    model = of_layers(kinds)
    ids = tokens(2, 12)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "num_beams": 3, "do_sample": False}
    whole = model.generate(ids, use_cache=False, **options)
    with patch_minimax(model):
        assert torch.equal(model.generate(ids, **options), whole)
        several = model.generate(ids, num_return_sequences=2, **options)
    assert torch.equal(several[::2], whole)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pads", [0, 4])
def test_a_cache_without_keys_counts_tokens(beams: int, pads: int) -> None:
    """A second turn reads what is new; what the cache has seen would weigh in twice."""
    model, ids, more = of_layers("ll"), tokens(2, 9), tokens(2, 4, seed=1)
    mask = torch.ones(2, 18, dtype=torch.int64)
    mask[0, :pads] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    with patch_minimax(model):
        cache = MiniMaxCache()
        said = model.generate(ids, attention_mask=mask[:, :9], past_key_values=cache, **options)
        assert cache.get_seq_length() == 13  # the last token is not read yet
        text, options["num_beams"] = torch.cat([said, more], 1), beams
        whole = model.generate(text, attention_mask=mask, use_cache=False, **options)
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        found = model.generate(text, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(found, whole)
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.get_seq_length() == 22
        cache.reset()
        assert cache.get_seq_length() == 0


def test_gradients_are_the_original_s(original: Any, patched: Any) -> None:
    ids = tokens(2, 30)
    for model in (original, patched):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
    theirs = dict(original.named_parameters())
    for name, weight in patched.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(weight.grad, theirs[name].grad, **TOL)
    original.zero_grad()


@torch.no_grad()
def test_a_narrow_model_keeps_a_wide_state(original: Any, patched: Any) -> None:
    """States and decays stay float32 in bfloat16: the original's state drifts, and its decays are rounded."""
    ids, layer = tokens(1, 60), 2
    wide = original(ids).past_key_values.linear_cache[layer]
    error = {}
    for name, model in (("ours", patched), ("theirs", copy.deepcopy(original))):
        model.bfloat16()
        cache = MiniMaxCache()
        for i in range(ids.shape[1]):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, position_ids=torch.tensor([[i]]))
        kv = cache.linear_cache[layer]
        error[name] = float((kv.float() - wide).norm() / wide.norm())
        assert (kv.dtype == torch.float32) == (name == "ours")
    assert error["ours"] < 0.6 * error["theirs"], error


def test_it_is_undone(original: Any) -> None:
    model = copy.deepcopy(original)
    plain = MiniMaxLightningAttention.forward
    first = patch_minimax(model)
    assert all("forward" in vars(m) for m in model.modules() if isinstance(m, MiniMaxLightningAttention))
    with patch_minimax(model, backend="torch"):
        pass
    assert all("forward" in vars(m) for m in model.modules() if isinstance(m, MiniMaxLightningAttention))
    first.undo()
    first.undo()
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(RuntimeError, match="mine"), patch_minimax():
        assert MiniMaxLightningAttention.forward is not plain
        raise RuntimeError("mine")
    assert MiniMaxLightningAttention.forward is plain


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that calls of `linattn.attention` name; MiniMax is as it was, whatever a test does."""
    monkeypatch.setattr(MiniMaxLightningAttention, "forward", MiniMaxLightningAttention.forward)
    seen: list[str] = []
    real = linattn.attention

    def noted(*args: Any, **keywords: Any) -> Any:
        seen.append(keywords["backend"])
        return real(*args, **keywords)

    monkeypatch.setattr(linattn, "attention", noted)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_patches_are_undone_in_any_order(
    original: Any, chosen: list[str], of_class: bool, order: tuple[int, ...]
) -> None:
    """While any is left the newest computes, with its own options; then the original does."""
    model, ids = copy.deepcopy(original), tokens(1, 9)
    plain = MiniMaxLightningAttention.forward
    backends = ("auto", "torch", ("torch",))
    patches = [patch_minimax(None if of_class else model, backend=backend) for backend in backends]
    left = [0, 1, 2]
    for number in order:
        patches[number].undo()
        patches[number].undo()
        left.remove(number)
        chosen.clear()
        model(ids)
        assert chosen == ([backends[left[-1]]] * 3 if left else [])
    assert MiniMaxLightningAttention.forward is plain
    assert not any("forward" in vars(part) for part in model.modules())


@torch.no_grad()
def test_a_patch_inside_itself(original: Any, chosen: list[str]) -> None:
    model, ids = copy.deepcopy(original), tokens(1, 9)
    with patch_minimax(model):
        with patch_minimax(model):
            model(ids)
        model(ids)
        assert chosen == ["auto"] * 6
    model(ids)
    assert len(chosen) == 6 and not any("forward" in vars(part) for part in model.modules())


@torch.no_grad()
def test_a_model_s_patch_computes_before_its_class_s(original: Any, chosen: list[str]) -> None:
    with patch_minimax(original), patch_minimax(backend="torch"):
        original(tokens(1, 9))
    assert chosen == ["auto"] * 3


@torch.no_grad()
@pytest.mark.parametrize("of_class", [False, True])
def test_a_wrapper_over_a_patch_stays_and_finds_the_original(
    original: Any, chosen: list[str], of_class: bool
) -> None:
    """As the hooks of accelerate do: what lay below when they came is what they call for ever."""
    model, ids, calls = copy.deepcopy(original), tokens(1, 9), []
    patch = patch_minimax(None if of_class else model)
    place = MiniMaxLightningAttention if of_class else model.model.layers[2].self_attn
    below = place.forward

    def wrapper(*args: Any, **keywords: Any) -> Any:
        calls.append(place)
        return below(*args, **keywords)

    place.forward = wrapper
    model(ids)
    patch.undo()
    got = model(ids).logits
    assert len(chosen) == 3 and len(calls) == (6 if of_class else 2)
    assert torch.equal(got, original(ids).logits)


@pytest.mark.parametrize(
    ("named", "error", "says"),
    [
        ("foo", errors.UnknownBackendError, "no backend named 'foo'; known: "),
        (("torch", "foo"), errors.UnknownBackendError, "no backend named 'foo'"),
        ((), errors.ArgumentTypeError, "backend must name at least one backend"),
        (None, errors.ArgumentTypeError, "backend must be 'auto', a name"),
        ("numpy", errors.UnsupportedError, "numpy  takes numpy arrays, got torch"),
    ],
)
def test_a_backend_that_cannot_be_is_refused_at_once(
    original: Any, named: Any, error: type[Exception], says: str
) -> None:
    plain = MiniMaxLightningAttention.forward
    for target in (original, None):
        with pytest.raises(error, match=says):
            patch_minimax(target, backend=named)
    assert MiniMaxLightningAttention.forward is plain
    assert not any("forward" in vars(part) for part in original.modules())
    patch_minimax(original, backend=linattn.registry.get("torch")).undo()


@torch.no_grad()
@pytest.mark.parametrize("target", [None, MiniMaxForCausalLM, MiniMaxLightningAttention])
@pytest.mark.parametrize("named", ["auto", "torch"])
def test_every_model_at_once(original: Any, target: Any, named: str, chosen: list[str]) -> None:
    ids = tokens(1, 9)
    want = original(ids).logits
    with patch_minimax(target, backend=named):
        torch.testing.assert_close(original(ids).logits, want, **TOL)
    assert chosen == [named] * 3
    original(ids)
    assert len(chosen) == 3


def test_refusals(patched: Any) -> None:
    for wrong, says in (
        (torch.nn.Linear(2, 2), "Linear has no MiniMaxLightningAttention layer"),
        ("model", "str has no MiniMaxLightningAttention layer"),
        (torch.nn.Linear, "takes a MiniMax model or class, got class Linear"),
    ):
        with pytest.raises(errors.ArgumentTypeError, match=says):
            patch_minimax(wrong)
    cache, layer, x = MiniMaxCache(), patched.model.layers[1].self_attn, torch.randn(3, 5, 32).double()
    layer(x[:2], None, None, cache)
    with pytest.raises(errors.StateError, match="the cache of layer 1 must have shape"):
        layer(x, None, None, cache)


def test_a_patched_model_is_copied_and_saved_as_any_other(original: Any, patched: Any, tmp_path: Any) -> None:
    other = copy.deepcopy(patched)
    layer = other.model.layers[1].self_attn
    assert layer.forward.__self__ is layer
    patched.save_pretrained(tmp_path)
    loaded = MiniMaxForCausalLM.from_pretrained(tmp_path)
    loaded.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens(1, 5)).logits, original(tokens(1, 5)).logits, **TOL)


@torch.no_grad()
def test_a_patched_model_is_pickled_and_its_copies_are_their_own(original: Any) -> None:
    model = MiniMaxForCausalLM(original.config).eval()  # without the hooks of transformers, which stay behind
    patch_minimax(model)
    file, ids = io.BytesIO(), tokens(1, 9)
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        layer = other.model.layers[1].self_attn
        assert layer.forward.__self__ is layer
        assert torch.equal(other(ids).logits, model(ids).logits)
        layer.out_proj.weight.zero_()
        assert not torch.equal(other(ids).logits, model(ids).logits)
