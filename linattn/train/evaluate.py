"""Bits per byte: of a model on text, and of the compressors everybody has."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from linattn import State
from linattn.errors import DataError, ValueRangeError
from linattn.models import TransNormerLM
from linattn.train.data import Bytes

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8

ROWS, CHUNK = 8, 512  # how much of the text one call sees; the states carry the rest


def spread(text: UInt8[np.ndarray, " n"], limit: int) -> UInt8[np.ndarray, " m"]:
    """Return at most `limit` bytes of a text: evenly spaced stretches, one for each row that is read."""
    if len(text) <= limit:
        return text
    width = max(1, limit // ROWS)
    starts = [row * (len(text) - width) // (ROWS - 1) for row in range(ROWS)]
    return np.concatenate([text[start : start + width] for start in starts])


def bits_per_byte(model: TransNormerLM, text: UInt8[np.ndarray, " n"]) -> float:
    """Return how many bits the model needs per byte of a text, every byte counted.

    The text is cut into a few long rows, each read from its start in chunks with the states carried on, so
    memory does not grow with the text. The first byte of a row is predicted by nothing and counts 8 bits.

    Raises DataError when the text is empty.
    """
    if len(text) == 0:
        raise DataError("there is no held-out text to measure: give more text")
    rows = min(ROWS, max(1, len(text) // CHUNK))
    width = len(text) // rows
    body, rest = text[: rows * width].reshape(rows, width), text[rows * width :]
    nats = 8.0 * math.log(2) * rows
    with torch.no_grad():
        states = model.initial_states(rows)
        for start in range(0, width - 1, CHUNK):
            paid, states = _paid(model, body[:, start : start + CHUNK + 1], states)
            nats += paid
        if len(rest):  # goes on where the last row ends
            last = [state.select([rows - 1]) for state in states]
            nats += _paid(model, text[None, rows * width - 1 :], last)[0]
    return nats / math.log(2) / len(text)


def _paid(
    model: TransNormerLM, ids: Int32[np.ndarray, "b n"] | UInt8[np.ndarray, "b n"], states: list[State]
) -> tuple[float, list[State]]:
    """What the model pays for a piece of each row's text but for its first token, in nats, and the states.

    Only pieces come in here: as the model takes it, a text is eight times as large.
    """
    piece = torch.from_numpy(ids.astype(np.int64)).to(model.lm_head.weight.device)
    logits, states = model(piece[:, :-1], states, return_states=True)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), piece[:, 1:].flatten(), reduction="sum")
    return nats.item(), states


def nats_of(
    model: TransNormerLM,
    ids: Int32[np.ndarray, " n"] | Bytes,
    context: int | None = None,
    chunk: int = 4096,
    *,
    progress: Callable[[int], object] = lambda tokens: None,
) -> float:
    """Return what the model pays for a text's tokens, in nats; a context's first costs log(vocabulary).

    ids: held, or bytes of files, which are read as they are asked for. context: forget everything after so
    many tokens; None: never. The text is read in chunks, the states carried on, so nothing here grows with
    it. progress: told after each chunk how many tokens it had.

    Raises DataError for an empty text, ValueRangeError for ids outside the vocabulary or a context below 1.
    """
    size = model.config.vocab_size
    if len(ids) == 0:
        raise DataError("there is no text to measure")
    if context is not None and context < 1:
        raise ValueRangeError(f"context must be at least 1, got {context}")
    nats = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids), context or len(ids)):
            end = min(begin + (context or len(ids)), len(ids))
            nats += math.log(size)
            states = model.initial_states(1)
            for start in range(begin, end - 1, chunk):
                piece = ids[start : min(start + chunk + 1, end)]
                paid, states = _paid(model, piece[None], states)
                nats += paid
                progress(len(piece) - 1)
    return nats


def compressed_bits_per_byte(text: UInt8[np.ndarray, " n"]) -> dict[str, float]:
    """Return what zlib and lzma need per byte of a text at their strongest, in bits.

    They begin with nothing, where a model has read the training text: the comparison says how far reading
    helped, not who compresses better. Raises DataError when the text is empty.
    """
    if len(text) == 0:
        raise DataError("there is no held-out text to measure: give more text")
    data = text.tobytes()
    sizes = {
        "zlib": len(zlib.compress(data, 9)),
        "lzma": len(lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8.0 * size / len(text) for name, size in sizes.items()}
