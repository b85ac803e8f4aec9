"""Reading text, holding some out, and cutting windows."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from linattn.errors import DataError
from linattn.train import Windows, read_text
from linattn.train.data import BLOCK, FILES_TO_SPLIT_BY_FILE, HELD_OUT, text_files


def test_a_file_gives_up_its_end(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(1, 101)) * 16)
    text = read_text(file)
    assert len(text.train) == 1500 and len(text.held_out) == 100
    assert np.concatenate([text.train, text.held_out]).tobytes() == file.read_bytes()


def fill(folder, count, marker="x"):
    for index in range(count):
        (folder / f"{index:04}.txt").write_text(f"{marker}{index} " * 20)


def test_a_folder_is_split_by_file_and_new_files_move_no_old_ones(tmp_path):
    fill(tmp_path, 200)
    before = read_text(tmp_path)
    assert before.files == 200 and 0.02 < len(before.held_out) / len(before.train) < 0.15
    assert b"x7 " in before.train.tobytes() + before.held_out.tobytes()
    (tmp_path / "0000a.txt").write_text("new")
    after = read_text(tmp_path)
    whole = before.held_out.tobytes()
    assert after.held_out.tobytes().replace(b"new", b"") == whole
    assert after.fingerprint != before.fingerprint
    assert not set(before.train.tobytes().split()) & set(whole.split())


NAMES = ["f{}.txt", "{:02}.txt", "{:03}.txt", "part-{:05}.txt", "chunk_{}.md", "page-{:02}.html", "deep/{}"]


@pytest.mark.parametrize("pattern", NAMES)
@pytest.mark.parametrize("count", [FILES_TO_SPLIT_BY_FILE, 80, 1000])
def test_names_that_count_up_are_held_out_as_often_as_others(tmp_path, pattern, count):
    (tmp_path / "deep").mkdir()
    for index in range(count):
        (tmp_path / pattern.format(index)).write_text(f"{index:04}")
    text = read_text(tmp_path)
    held_out = len(text.held_out) // 4
    spread = np.sqrt(count / HELD_OUT * (1 - 1 / HELD_OUT))
    assert held_out >= 1 and abs(held_out - count / HELD_OUT) <= 3 * spread
    assert 4 * count == len(text.train) + len(text.held_out)


def test_one_file_is_held_out_where_the_hash_chooses_none_or_all(tmp_path):
    def number(name):
        return int.from_bytes(hashlib.sha256(name.encode()).digest())

    names = [f"{index:05}" for index in range(3000)]
    for folder, chosen in (("none", False), ("all", True)):
        (tmp_path / folder).mkdir()
        alike = [name for name in names if (number(name) % HELD_OUT == 0) == chosen][:FILES_TO_SPLIT_BY_FILE]
        for name in alike:
            (tmp_path / folder / name).write_text(name)
        text = read_text(tmp_path / folder)
        assert text.held_out.tobytes().decode() == min(alike, key=number)
        assert len(text.train) == 5 * (len(alike) - 1)


def test_the_order_of_creation_does_not_matter(tmp_path):
    for name, order in (("a", range(70)), ("b", reversed(range(70)))):
        (tmp_path / name / "deep").mkdir(parents=True)
        for index in order:
            (tmp_path / name / ("deep" if index % 2 else "") / f"{index}.txt").write_text(f"text {index}")
    first, second = read_text(tmp_path / "a"), read_text(tmp_path / "b")
    assert first.fingerprint == second.fingerprint


def test_what_is_left_out_of_a_folder(tmp_path):
    (tmp_path / "good.py").write_text("good\n" * 20)
    (tmp_path / "other.txt").write_text("other\n" * 20)
    (tmp_path / "image.py").write_bytes(b"\x89PNG\x00\x01")
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / ".hidden.py").write_text("hidden")
    for name in ("out", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "more.py").write_text("more")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    text = read_text(
        tmp_path, exclude=[tmp_path / "out"], exclude_names=("site-packages",), suffixes=(".py",)
    )
    assert (text.files, text.skipped) == (1, 2)
    assert text.train.tobytes() + text.held_out.tobytes() == b"good\n" * 20


def test_refusals(tmp_path):
    def refused(path, sentence):
        with pytest.raises(DataError, match=sentence):
            read_text(path)

    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(tmp_path, "holds no text: no files")
    file = tmp_path / "file"
    file.touch()
    refused(file, "file is empty")
    file.write_bytes(b"ab\x00")
    refused(file, "file is not text: byte 2 is NUL")
    refused(tmp_path, "holds no text: 1 file that is not UTF-8 text")
    file.write_bytes("Grüße".encode("latin-1"))
    refused(file, r"file is not text: byte 2 \(0xfc\) is not UTF-8")
    file.write_bytes("Grüße".encode("utf-16"))
    refused(file, "UTF-16")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "neither a file nor a folder")


@pytest.mark.parametrize("before", [0, 1, BLOCK - 1, BLOCK])
@pytest.mark.parametrize(
    ("data", "where", "why"),
    [
        (b"\xff", 0, "(0xff) is not UTF-8"),
        ("é".encode() + b"\xc3", 2, "(0xc3) is not UTF-8"),
        ("€".encode()[:2] + b"a", 0, "(0xe2) is not UTF-8"),
        ("€".encode()[:2], 0, "(0xe2) is not UTF-8"),
        ("€€".encode() + b"\0", 6, "is NUL"),
    ],
)
def test_what_is_no_text_is_found_where_it_is(tmp_path, before, data, where, why):
    """In any block, and where a block cuts a character."""
    (tmp_path / "file").write_bytes(b"a" * before + data)
    with pytest.raises(DataError) as caught:
        read_text(tmp_path / "file")
    assert f"file is not text: byte {before + where} {why}" in str(caught.value)


def test_a_character_that_a_block_cuts_is_text(tmp_path):
    content = "a" * (BLOCK - 1) + "€" * BLOCK
    (tmp_path / "file").write_text(content)
    files, skipped = text_files(tmp_path / "file")
    assert (files[0].size, skipped) == (len(content.encode()), 0)
    assert files[0].read().decode() == content


def test_an_epoch_visits_every_window_once_whatever_step_it_starts_from():
    text = np.arange(101, dtype=np.uint8)
    windows = Windows(text, seq_len=10, batch=2, seed=3)
    epoch = np.concatenate([windows(step) for step in range(5)])
    assert epoch.dtype == np.int64 and epoch.shape == (10, 11)
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
    assert (epoch == epoch[:, :1] + np.arange(11)).all()
    again = Windows(text, seq_len=10, batch=2, seed=3)
    assert (again(7) == windows(7)).all() and (again(3) == windows(3)).all()
    assert (epoch != np.concatenate([windows(step) for step in range(5, 10)])).any()
    assert (epoch != np.concatenate([Windows(text, 10, 2, 4)(step) for step in range(5)])).any()


def test_too_little_text_for_a_window():
    with pytest.raises(DataError, match="has 10 bytes, one window needs 11"):
        Windows(np.zeros(10, np.uint8), seq_len=10, batch=1, seed=0)
