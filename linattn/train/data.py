"""Text as bytes: finding it, reading it, holding some of it out, and cutting training windows."""

from __future__ import annotations

import bisect
import codecs
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from linattn.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt8

HELD_OUT = 16  # one part in so many is held out
FILES_TO_SPLIT_BY_FILE = 64  # below this many files, a whole file is too coarse a part
BLOCK = 1 << 20  # bytes of a file that are looked at, or kept, at once


def counted(number: int, noun: str) -> str:
    """Return "1 file", "2,000 files" and the like."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Text:
    """Bytes to learn from and bytes to be judged by, with what names them.

    train, held_out: uint8 [n]. files: how many were read. skipped: how many in a folder are no text.
    fingerprint: tells whether another reading gave the same bytes. train_ends, held_out_ends: where what
    each file gave to them ends; two ends are the same where it gave nothing.
    """

    train: UInt8[np.ndarray, " n"]
    held_out: UInt8[np.ndarray, " n"]
    files: int
    skipped: int
    fingerprint: str
    train_ends: tuple[int, ...] = ()
    held_out_ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class File:
    """A file that was found to be text. name: below its folder, with slashes. size: the bytes it had then."""

    path: Path
    name: str
    size: int

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Return its bytes, or some of them. Raises DataError where they can no longer be read."""
        stop = self.size if stop is None else stop
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(data) < stop - start:
            raise DataError(f"{self.path} became shorter while it was read: leave it alone, and start again")
        return data


class Bytes:
    """The bytes of files one after the other, read from the disk where they are asked for.

    It has a length, and a slice of it, forwards, is uint8 [n]. Memory is that of a slice and a block.
    """

    def __init__(self, files: Sequence[File]) -> None:
        self.files = files
        self._starts = np.cumsum([0, *(file.size for file in files)]).tolist()
        self._first, self._block = 0, b""  # what was read last, and where it begins

    def __len__(self) -> int:
        """How many bytes."""
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> UInt8[np.ndarray, " n"]:
        start, stop, step = where.indices(len(self))
        stop = max(start, stop)
        if not self._first <= start <= stop <= self._first + len(self._block):
            self._first = start
            self._block = b"".join(self._read(start, min(len(self), max(stop, start + BLOCK))))
        return np.frombuffer(self._block, np.uint8)[start - self._first : stop - self._first : step]

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[index + 1])
            yield self.files[index].read(start - self._starts[index], end - self._starts[index])
            start, index = end, index + 1


def read_text(
    path: Path,
    *,
    exclude: Sequence[Path] = (),
    exclude_names: Sequence[str] = (),
    suffixes: Sequence[str] = (),
) -> Text:
    """Read a file, or every text file under a folder in the order of their names, and hold a sixteenth out.

    A folder of many files is split by file, chosen by a hash of the relative path, so that adding a file
    moves no other one; where it chooses none or all, one file is held out. A single file, or each file of a
    small folder, gives up its last sixteenth. Names that begin with a dot, links to folders, files that are
    not UTF-8 text and whatever is excluded are left out of a folder; suffixes, if given, are the only ones
    taken.

    Raises DataError when the path is missing, unreadable or empty, or when there is no text in it.
    """
    files, skipped = text_files(path, exclude=exclude, exclude_names=exclude_names, suffixes=suffixes)
    chosen = _held_out([file.name for file in files]) if len(files) >= FILES_TO_SPLIT_BY_FILE else None
    train: list[bytes] = []
    held_out: list[bytes] = []
    for file in files:
        data = file.read()
        if chosen is not None:
            (held_out if file.name in chosen else train).append(data)
        else:
            cut = len(data) - len(data) // HELD_OUT
            while cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside of a character
                cut += 1
            train.append(data[:cut])
            held_out.append(data[cut:])
    both = b"".join(train), b"".join(held_out)
    fingerprint = f"{len(both[0])}+{len(both[1])}:{zlib.crc32(both[1], zlib.crc32(both[0])):08x}"
    return Text(
        np.frombuffer(both[0], np.uint8),
        np.frombuffer(both[1], np.uint8),
        len(files),
        skipped,
        fingerprint,
        *(tuple(np.cumsum([len(part) for part in parts]).tolist()) for parts in (train, held_out)),
    )


def _held_out(names: Sequence[str]) -> set[str]:
    """Choose about a sixteenth of names, each by itself; at least one, and not all."""
    # a hash of which every bit depends on every letter: names that count up are spread, too
    numbers = {
        name: int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
        for name in names
    }
    chosen = {name for name, number in numbers.items() if number % HELD_OUT == 0}
    return chosen if 0 < len(chosen) < len(names) else {min(names, key=numbers.__getitem__)}


def text_files(
    path: Path,
    *,
    exclude: Sequence[Path] = (),
    exclude_names: Sequence[str] = (),
    suffixes: Sequence[str] = (),
) -> tuple[list[File], int]:
    """Return the files that `read_text` reads, none of them empty, and how many of a folder are no text.

    They are looked at in blocks: memory does not grow with them. Raises DataError as `read_text` does.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; --text needs a text file or a folder of them")
    if path.is_dir():
        return _folder_files(path, exclude, exclude_names, suffixes)
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder")
    try:
        size, reason = _look(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if reason:
        raise DataError(f"{path} is not text: {reason}")
    if not size:
        raise DataError(f"{path} is empty")
    return [File(path, "", size)], 0


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror}")


def _folder_files(
    path: Path, exclude: Sequence[Path], exclude_names: Sequence[str], suffixes: Sequence[str]
) -> tuple[list[File], int]:
    found, skipped = [], 0
    for file in _walk(path, {entry.resolve() for entry in exclude}, set(exclude_names)):
        if suffixes and file.suffix not in suffixes:
            continue
        try:
            size, reason = _look(file)
        except OSError:
            skipped += 1
            continue
        if reason is not None:
            skipped += 1
        elif size:
            found.append(File(file, file.relative_to(path).as_posix(), size))
    if not found:
        be = "is" if skipped == 1 else "are"
        what = f"{counted(skipped, 'file')} that {be} not UTF-8 text" if skipped else "no files"
        raise DataError(f"{path} holds no text: {what}")
    return found, skipped


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


def _look(path: Path) -> tuple[int, str | None]:
    """Return how many bytes a file has, and why they are not UTF-8 text, or None if they are."""
    with path.open("rb") as file:
        return _not_text(iter(lambda: file.read(BLOCK), b""))


def _not_text(blocks: Iterable[bytes]) -> tuple[int, str | None]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin = 0
    for block in blocks:
        if (where := block.find(0)) >= 0:
            return begin, (
                f"byte {begin + where} is NUL (a binary file, or UTF-16: convert it with iconv -t utf-8)"
            )
        if (reason := _not_utf8(decoder, block, begin)) is not None:
            return begin, reason
        begin += len(block)
    return begin, _not_utf8(decoder, b"", begin, final=True)


def _not_utf8(
    decoder: codecs.IncrementalDecoder, block: bytes, begin: int, *, final: bool = False
) -> str | None:
    begin -= len(decoder.getstate()[0])  # of a character that the last block cut
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        where, byte = begin + error.start, error.object[error.start]
        return f"byte {where} (0x{byte:02x}) is not UTF-8 (convert it with iconv -t utf-8)"
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
                f"the training text has {counted(len(text), 'byte')}, one window needs {seq_len + 1}: "
                "give more text"
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
