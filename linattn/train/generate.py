"""Sampling text from a model, one token at a time, in constant time and memory per token."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from linattn.errors import ValueRangeError
from linattn.models import TransNormerLM
from linattn.train.tokenizers import check_bytes

if TYPE_CHECKING:
    from jaxtyping import Float

PREFILL = 1024  # tokens of a prompt per call, so that a long prompt needs no more memory than a short one
BEFORE = 8  # tokens that say how the next one is spelt: with a space or without
START = b"\n"  # what an empty prompt stands for: a model predicts from something


def generate(
    model: TransNormerLM,
    prompt: bytes,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield `tokens` bytes that continue the prompt.

    temperature: 0 takes the likeliest byte every time. top_k: sample among that many likeliest only. The same
    seed gives the same bytes. The model reads the prompt in chunks, then moves its states one step per byte.

    Raises OptionError for a model that is not over bytes, ValueRangeError for arguments outside their domain;
    both before the first byte. Raises ValueRangeError, too, at a prediction that is no finite number.
    """
    check_bytes(model.config.vocab_size)
    return continue_ids(model, list(prompt or START), tokens, temperature=temperature, top_k=top_k, seed=seed)


def continue_ids(
    model: TransNormerLM,
    prompt: Sequence[int],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield `tokens` ids that continue a prompt of at least one; everything else as in `generate`."""
    if tokens < 0:
        raise ValueRangeError(f"tokens must be at least 0, got {tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueRangeError(f"temperature must be a number from 0 on, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueRangeError(f"top_k must be at least 1, got {top_k}")
    return _generate(model, prompt, tokens, temperature, top_k, seed)


def _generate(
    model: TransNormerLM, prompt: Sequence[int], tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[int]:
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([list(prompt)], device=device)
    states = model.initial_states(1)
    with torch.no_grad():
        for start in range(0, len(prompt), PREFILL):
            logits, states = model(ids[:, start : start + PREFILL], states, return_states=True)
        logits = logits[:, -1]
    for index in range(tokens):
        byte = pick(logits[0], temperature, top_k, generator)
        yield byte
        if index + 1 < tokens:
            logits = model.step(torch.tensor([byte], device=device), states)


def pick(
    logits: Float[torch.Tensor, " v"], temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """Draw one token. On the CPU in float64, so that every device draws the same from the same logits.

    top_k: how many tokens at most may be drawn, where logits are equal, too. Raises ValueRangeError for
    logits that are no finite numbers.
    """
    wide = logits.detach().cpu().double()
    if not wide.isfinite().all():
        raise ValueRangeError(
            "the model predicts NaN or infinity: its training diverged; take an earlier checkpoint"
        )
    if temperature == 0:
        return int(wide.argmax())
    if top_k is not None and top_k < len(wide):
        kept = wide.topk(top_k)
        wide = torch.full_like(wide, -math.inf).scatter(0, kept.indices, kept.values)
    weights = torch.softmax((wide - wide.max()) / temperature, 0)
    return int(torch.multinomial(weights, 1, generator=generator))


def decoded(stream: Iterator[int]) -> Iterator[str]:
    """Turn bytes into text as soon as whole characters are there; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for byte in stream:
        if text := decoder.decode(bytes([byte])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def pieces(tokenizer: Any, prompt: Sequence[int], ids: Iterator[int]) -> Iterator[str]:
    """Turn ids into text as soon as whole characters are there, in view of a few tokens before."""
    recent = list(prompt[-BEFORE:])
    shown = text = tokenizer.decode(recent)
    for one in ids:
        recent.append(one)
        text = tokenizer.decode(recent)
        if not text.endswith("\ufffd") or len(recent) > 4 * BEFORE:
            yield text[len(shown) :]
            recent = recent[-BEFORE:]
            shown = text = tokenizer.decode(recent)
    if text != shown:  # half a character
        yield text[len(shown) :]
