"""Tokens to learn from and to be judged by: bytes or a tokenizer's, of text or of a `datasets` folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from linattn.errors import DataError
from linattn.train.data import HELD_OUT, read_text, read_whole

if TYPE_CHECKING:
    from jaxtyping import Int32

PIECE = 1 << 20  # characters of a text that a tokenizer gets at once


@dataclass(frozen=True)
class Corpus:
    """train, held_out: int32 [n] token ids, texts one after the other. held_out_bytes: of the held-out text.

    vocab_size: ids are below it. fingerprint: tells whether another reading gave the same text.
    """

    train: Int32[np.ndarray, " n"]
    held_out: Int32[np.ndarray, " n"]
    held_out_bytes: int
    vocab_size: int
    fingerprint: str


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder. Raises DataError where there is none."""
    from transformers import AutoTokenizer

    import linattn.models.transnormer  # noqa: F401 (the Auto classes know it then)

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; --tokenizer needs one that save_pretrained wrote")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no tokenizer: {str(error).splitlines()[0]}") from error


def own_tokenizer(checkpoint: Path) -> Any:
    """Return the tokenizer that lies in a checkpoint's folder, or None: its text is bytes."""
    return load_tokenizer(checkpoint) if (checkpoint / "tokenizer_config.json").is_file() else None


def read_corpus(path: Path, tokenizer: Any = None, *, exclude: Iterable[Path] = ()) -> Corpus:
    """Read text (`read_text`) or a folder that `datasets` wrote (`save_to_disk`, a column "text").

    tokenizer: None for bytes. Its end-of-text token, where it has one, follows every text of a dataset.

    Raises DataError when there is no text, or ids do not fit.
    """
    if is_dataset(path):
        train, held_out, fingerprint = _dataset(path)
    else:
        text = read_text(path, exclude=list(exclude))
        train, held_out = (
            [part.tobytes().decode("utf-8", "replace")] for part in (text.train, text.held_out)
        )
        fingerprint = text.fingerprint
    size = 256 if tokenizer is None else max(tokenizer.get_vocab().values()) + 1  # there may be holes
    return Corpus(
        encoded(train, tokenizer),
        encoded(held_out, tokenizer),
        sum(len(one.encode()) for one in held_out),
        size,
        fingerprint,
    )


def read_all(path: Path, tokenizer: Any = None) -> tuple[Int32[np.ndarray, " n"], int]:
    """Return the ids of all text of a file, a folder or a dataset, none held out, and how many bytes it has.

    Raises DataError when there is none.
    """
    if is_dataset(path):
        train, held_out, _ = _dataset(path)
        texts = [*train, *held_out]
    else:
        texts = [part.decode("utf-8", "replace") for part in read_whole(path)]
    return encoded(texts, tokenizer), sum(len(one.encode()) for one in texts)


def is_dataset(path: Path) -> bool:
    """Whether `datasets` wrote a folder."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def encoded(texts: Iterable[str], tokenizer: Any) -> Int32[np.ndarray, " n"]:
    """Return the ids of texts one after the other: bytes without a tokenizer."""
    if tokenizer is None:
        return np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int32)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[np.ndarray] = []
    for one in texts:
        parts += [np.array(tokenizer(piece, add_special_tokens=False)["input_ids"], np.int32)
                  for piece in _pieces(one)]  # fmt: skip
        parts.append(np.array(end, np.int32))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends, so that a tokenizer never has all of it at once."""
    start = 0
    while start < len(text):
        stop = len(text) if start + PIECE >= len(text) else text.rfind("\n", start, start + PIECE) + 1
        stop = stop if stop > start else start + PIECE
        yield text[start:stop]
        start = stop


def _dataset(path: Path) -> tuple[list[str], list[str], str]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a dataset: {error}") from error
    splits = found if isinstance(found, dict) else {"train": found}
    main = splits.get("train", next(iter(splits.values())))
    if "text" not in main.column_names:
        raise DataError(f'{path} has no column "text", only {", ".join(main.column_names)}')
    for name, split in splits.items():
        if any(one is None for one in split["text"]):
            raise DataError(f"{path} has a row without text in its split {name!r}")
    other = next((splits[name] for name in ("validation", "test") if name in splits), None)
    if other is None:
        cut = len(main) - max(1, len(main) // HELD_OUT)
        train, held_out = list(main[:cut]["text"]), list(main[cut:]["text"])
    else:
        train, held_out = list(main["text"]), list(other["text"])
    return train, held_out, str(main._fingerprint)
