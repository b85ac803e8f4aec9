"""Tokens to learn from and to be judged by: bytes or a tokenizer's, of text or of a `datasets` folder."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from linattn.errors import DataError
from linattn.train.data import HELD_OUT, Bytes, File, Text, read_text, text_files
from linattn.train.tokenizers import vocabulary

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8

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


def read_corpus(path: Path, tokenizer: Any = None, *, exclude: Iterable[Path] = ()) -> Corpus:
    """Read text (`read_text`) or a folder that `datasets` wrote (`save_to_disk`, a column "text").

    tokenizer: None for bytes. Its end-of-text token, where it has one, follows every text of a dataset, and
    what every file gave to be learned, and to be held out: as in `read_all`.

    Raises DataError when there is no text, or ids do not fit.
    """
    size = vocabulary(tokenizer)
    if is_dataset(path):
        rows, held, fingerprint = _dataset(path)
        held_out_bytes = sum(len(one.encode()) for one in held)
        return Corpus(encoded(rows, tokenizer), encoded(held, tokenizer), held_out_bytes, size, fingerprint)
    text = read_text(path, exclude=list(exclude))
    parts = (text.train, text.train_ends), (text.held_out, text.held_out_ends)
    train, held_out = (
        data.astype(np.int32) if tokenizer is None else encoded(_cut(data, ends), tokenizer)
        for data, ends in parts
    )
    return Corpus(train, held_out, len(text.held_out), size, text.fingerprint)


def read_plain(path: Path, *, exclude: Iterable[Path] = ()) -> Text:
    """Read bytes as `read_text` does, or those of the rows of a folder that `datasets` wrote.

    Raises DataError when there is no text.
    """
    if not is_dataset(path):
        return read_text(path, exclude=list(exclude))
    rows, held, fingerprint = _dataset(path)
    train, held_out = (np.frombuffer("".join(part).encode(), np.uint8) for part in (rows, held))
    return Text(train, held_out, sum(1 for _ in path.rglob("*.arrow")), 0, fingerprint)


def _cut(data: UInt8[np.ndarray, " n"], ends: Iterable[int]) -> Iterator[str]:
    """The texts of files, one at a time, of bytes that hold them one after the other."""
    start = 0
    for end in ends:
        if end > start:
            yield data[start:end].tobytes().decode("utf-8", "replace")
        start = end


def read_all(
    paths: Sequence[Path], tokenizer: Any = None, *, exclude: Sequence[Path] = ()
) -> tuple[Int32[np.ndarray, " n"] | Bytes, int]:
    """Return the ids of all text of files, folders and datasets in this order, and how many bytes it has.

    Nothing is held out, and datasets are read with all of their splits. Bytes of files and folders are read
    as they are asked for; the ids of a tokenizer and what datasets hold are held whole; of the text of files,
    one file's at a time. exclude: as in `read_text`.

    Raises DataError where a path has no text.
    """
    parts: list[File | list[str]] = []
    for path in paths:
        if is_dataset(path):
            splits = _splits(path)
            parts.append([row for name in splits for row in _rows(path, splits, name)])
        else:
            parts += text_files(path, exclude=exclude)[0]
    files = [part for part in parts if isinstance(part, File)]
    size = sum(
        part.size if isinstance(part, File) else sum(len(one.encode()) for one in part) for part in parts
    )
    if tokenizer is None and len(files) == len(parts):
        return Bytes(files), size
    return encoded(_texts(parts), tokenizer), size


def _texts(parts: Iterable[File | list[str]]) -> Iterator[str]:
    for part in parts:
        yield from [part.read().decode("utf-8", "replace")] if isinstance(part, File) else part


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
        parts += [np.array(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
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


def _splits(path: Path) -> Mapping[str, Any]:
    """The splits of a dataset by name, in their order. Raises DataError where there are none."""
    import datasets

    with _readable(path):
        found = datasets.load_from_disk(str(path))
    splits: Mapping[str, Any] = found if isinstance(found, dict) else {"train": found}
    if not splits:
        raise DataError(f"{path} is a dataset without splits: give it some text")
    return splits


def _dataset(path: Path) -> tuple[list[str], list[str], str]:
    """The texts to learn, those that are held out, and what names both."""
    splits = _splits(path)
    main = "train" if "train" in splits else next(iter(splits))
    train = _rows(path, splits, main)
    other = next((name for name in ("validation", "test") if name in splits and name != main), None)
    if other is not None:
        held_out = _rows(path, splits, other)
    else:
        cut = len(train) - max(1, len(train) // HELD_OUT)
        train, held_out = train[:cut], train[cut:]
    # of the text: the fingerprint of datasets names how the rows came to be
    total = 0
    for row in (*train, *held_out):
        total = zlib.crc32(row.encode() + b"\0", total)
    return train, held_out, f"{len(train)}+{len(held_out)} rows:{total:08x}"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except IndexError as error:  # datasets has no table of nothing
        raise DataError(f"{path} has a split without rows: give it some text") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = str(error).partition("\n")[0]
        if not isinstance(error, (OSError, ValueError)):  # JSON without the fields that datasets expects
            why = f"its JSON files are damaged ({type(error).__name__}: {why})"
        raise DataError(f"{path} cannot be read as a dataset: {why}") from error


def _rows(path: Path, splits: Mapping[str, Any], name: str) -> list[str]:
    """Return the texts of a split of a dataset. Raises DataError where there are none, or a row has none."""
    split = splits[name]
    if "text" not in split.column_names:
        others = ", ".join(split.column_names) or "none at all"
        raise DataError(f'{path} has no column "text", only {others}, in its split {name!r}')
    with _readable(path):
        rows = list(split["text"])
    if not rows:
        raise DataError(f"{path} has a split without rows: give it some text")
    for number, row in enumerate(rows):
        if row is None:
            raise DataError(f"{path} has a row without text in its split {name!r}: row {number}")
        if not isinstance(row, str):
            kind = type(row).__name__
            raise DataError(
                f'{path} has a column "text" of {kind} in its split {name!r}: it must be of strings'
            )
    return rows
