"""Text as bytes: reading it, holding some of it out, and cutting training windows."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from linattn.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt8

HELD_OUT = 16  # one part in so many is held out
FILES_TO_SPLIT_BY_FILE = 64  # below this many files, a whole file is too coarse a part


@dataclass(frozen=True)
class Text:
    """Bytes to learn from and bytes to be judged by, with what names them.

    train, held_out: uint8 [n]. files: how many were read. skipped: how many in a folder are no text.
    fingerprint: tells whether another reading gave the same bytes.
    """

    train: UInt8[np.ndarray, " n"]
    held_out: UInt8[np.ndarray, " n"]
    files: int
    skipped: int
    fingerprint: str


def read_text(
    path: Path,
    *,
    exclude: Sequence[Path] = (),
    exclude_names: Sequence[str] = (),
    suffixes: Sequence[str] = (),
) -> Text:
    """Read a file, or every text file under a folder in the order of their names, and hold a sixteenth out.

    A folder of many files is split by file, chosen by a checksum of the relative path, so that adding a file
    moves no other one. A single file, or each file of a small folder, gives up its last sixteenth. Names that
    begin with a dot, links to folders, files that are not UTF-8 text and whatever is excluded are left out of
    a folder; suffixes, if given, are the only ones taken.

    Raises DataError when the path is missing, unreadable or empty, or when there is no text in it.
    """
    parts, skipped = _read(path, exclude, exclude_names, suffixes)
    train: list[bytes] = []
    held_out: list[bytes] = []
    for name, data in parts:
        if len(parts) >= FILES_TO_SPLIT_BY_FILE:
            (held_out if zlib.crc32(name.encode()) % HELD_OUT == 0 else train).append(data)
        else:
            cut = len(data) - len(data) // HELD_OUT
            while cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside of a character
                cut += 1
            train.append(data[:cut])
            held_out.append(data[cut:])
    both = b"".join(train), b"".join(held_out)
    fingerprint = f"{len(both[0])}+{len(both[1])}:{zlib.crc32(both[1], zlib.crc32(both[0])):08x}"
    return Text(
        np.frombuffer(both[0], np.uint8), np.frombuffer(both[1], np.uint8), len(parts), skipped, fingerprint
    )


def read_whole(path: Path) -> list[bytes]:
    """Read what `read_text` does, a file or every text file under a folder, without holding anything out."""
    return [data for _, data in _read(path, (), (), ())[0]]


def _read(
    path: Path, exclude: Sequence[Path], exclude_names: Sequence[str], suffixes: Sequence[str]
) -> tuple[list[tuple[str, bytes]], int]:
    if not path.exists():
        raise DataError(f"{path} does not exist; --text needs a text file or a folder of them")
    if not path.is_dir():
        return [("", _read_file(path))], 0
    return _read_folder(path, exclude, exclude_names, suffixes)


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise DataError(f"{path} is empty")
    if reason := _not_text(data):
        raise DataError(f"{path} is not text: {reason}")
    return data


def _read_folder(
    path: Path, exclude: Sequence[Path], exclude_names: Sequence[str], suffixes: Sequence[str]
) -> tuple[list[tuple[str, bytes]], int]:
    parts, skipped = [], 0
    for file in _walk(path, {entry.resolve() for entry in exclude}, set(exclude_names)):
        if suffixes and file.suffix not in suffixes:
            continue
        try:
            data = file.read_bytes()
        except OSError:
            skipped += 1
            continue
        if _not_text(data) is not None:
            skipped += 1
        elif data:
            parts.append((file.relative_to(path).as_posix(), data))
    if not parts:
        found = f"{skipped} files that are not UTF-8 text" if skipped else "no files"
        raise DataError(f"{path} holds no text: {found}")
    return parts, skipped


def _walk(path: Path, exclude: set[Path], exclude_names: set[str]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(path, onerror=fail):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in exclude_names
            and (here / name).resolve() not in exclude
        )
        yield from (
            here / name for name in sorted(files) if not name.startswith(".") and (here / name).is_file()
        )


def _not_text(data: bytes) -> str | None:
    """Say why these bytes are not UTF-8 text, or None if they are."""
    if (where := data.find(0)) >= 0:
        return f"byte {where} is NUL (a binary file, or UTF-16: convert it with iconv -t utf-8)"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8 (convert it with iconv -t utf-8)"
    return None


class Windows:
    """Training batches as a function of the step alone, so that a run can be continued from any step.

    The text is cut into windows of seq_len bytes, each with the byte that follows; an epoch visits every
    window once, in an order drawn from the seed and the epoch's number.

    Raises DataError when the text is too short for one window.
    """

    def __init__(self, text: UInt8[np.ndarray, " n"], seq_len: int, batch: int, seed: int) -> None:
        self.count = (len(text) - 1) // seq_len
        if self.count < 1:
            raise DataError(
                f"the training text has {len(text)} bytes, one window needs {seq_len + 1}: give more text"
            )
        self.text, self.seq_len, self.batch, self.seed = text, seq_len, batch, seed
        self._epoch = -1
        self._order: Int64[np.ndarray, " w"] = np.empty(0, np.int64)

    def __call__(self, step: int) -> Int64[np.ndarray, "b n1"]:
        """Return the batch of a step (from 0): int64 [batch, seq_len + 1]."""
        rows = []
        for index in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(index, self.count)
            if epoch != self._epoch:
                self._epoch, self._order = (
                    epoch,
                    np.random.default_rng([self.seed, epoch]).permutation(self.count),
                )
            start = self._order[place] * self.seq_len
            rows.append(self.text[start : start + self.seq_len + 1])
        return np.stack(rows).astype(np.int64)
