"""Tokens of files, folders and datasets: whole, in order, in bounded memory, or refused in a sentence."""

from __future__ import annotations

import re
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from linattn.errors import CheckpointError, DataError, OptionError
from linattn.train import corpus, tokenizers
from linattn.train.data import BLOCK, Bytes, text_files


def words(folder):
    """A tokenizer of single words, as a folder holds it."""
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "one": 1, "two": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="?")
    tokenizer.save_pretrained(folder)
    return tokenizer


def dataset(folder, rows, *, column="text", **more):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    made = datasets.Dataset.from_dict({column: rows})
    if more:
        made = datasets.DatasetDict(
            {"train": made, **{k: datasets.Dataset.from_dict(v) for k, v in more.items()}}
        )
    made.save_to_disk(folder)
    return folder


def read(*paths, **how):
    ids, size = corpus.read_all(paths, **how)
    assert size == len(ids)
    return bytes(ids[:].astype(np.uint8))


def test_whole_texts_are_judged(tmp_path):
    """Of a folder and of a dataset, none cut, characters neither."""
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.txt").write_text("äöü" * 33 + name)
    assert read(tmp_path / "two").decode() == "äöü" * 33 + "a" + "äöü" * 33 + "b"
    parts = corpus.read_corpus(tmp_path / "two")
    for part in (parts.train, parts.held_out):
        bytes(part.astype(np.uint8)).decode()
    assert read(dataset(tmp_path / "data", ["one", "two"])) == b"onetwo"


def test_several_texts_are_one_in_their_order(tmp_path):
    (tmp_path / "file").write_text("one two")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("two")
    file, folder = tmp_path / "file", tmp_path / "folder"
    assert read(file, folder) == b"one twotwo" and read(folder, file) == b"twoone two"
    ids, size = corpus.read_all([folder, file], words(tmp_path / "words"))
    assert ids.tolist() == [2, 0, 1, 2, 0] and size == 10  # the end of text after each
    data = dataset(tmp_path / "data", ["one"])
    assert read(file, data, folder) == b"one twoonetwo"
    with pytest.raises(DataError, match="nowhere does not exist"):
        corpus.read_all([file, tmp_path / "nowhere"])


def test_an_excluded_folder_is_not_read(tmp_path):
    for name in ("run", "text"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert read(tmp_path, exclude=[tmp_path / "run"]) == b"text"


def test_slices_are_those_of_the_whole(tmp_path):
    """At the ends of files and blocks, forwards and back."""
    draw = np.random.default_rng(0)
    for index, size in enumerate((1, BLOCK - 1, 3, 2 * BLOCK + 5, 7)):
        (tmp_path / f"{index}").write_bytes(draw.integers(1, 128, size, np.uint8).tobytes())
    found = Bytes(text_files(tmp_path)[0])
    whole = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert len(found) == len(whole)
    starts = [0, BLOCK - 2, BLOCK, len(whole) - 3, 5, *draw.integers(0, len(whole), 50).tolist()]
    for start in starts:
        for size in (0, 1, 4097, BLOCK + 1):
            assert found[start : start + size].tobytes() == whole[start : start + size], (start, size)
    assert len(found[len(whole) :]) == 0 and found[3:1].tobytes() == b""
    assert found[:].tobytes() == whole


def test_memory_does_not_grow_with_files(tmp_path):
    size = 16 * BLOCK
    (tmp_path / "large").write_bytes(b"0123456\n" * (size // 8))
    tracemalloc.start()
    try:
        ids, _ = corpus.read_all([tmp_path / "large"])
        total = sum(int(ids[start : start + 4096][0]) for start in range(0, size, 4096))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == ord("0") * size // 4096
    assert peak < size / 2


def test_a_file_that_shrinks_is_refused(tmp_path):
    (tmp_path / "file").write_text("text " * 10)
    ids, _ = corpus.read_all([tmp_path / "file"])
    (tmp_path / "file").write_text("text")
    with pytest.raises(DataError, match="file became shorter while it was read"):
        ids[:9]
    (tmp_path / "file").unlink()
    with pytest.raises(DataError, match="file cannot be read: No such file"):
        ids[:9]


def test_datasets_that_hold_no_text_are_refused(tmp_path):
    def refused(sentence, folder):
        for read in (corpus.read_corpus, lambda path: corpus.read_all([path])):
            with pytest.raises(DataError, match=re.escape(sentence)) as caught:
                read(folder)
            assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    refused("a row without text in its split 'train': row 1", dataset(tmp_path / "none", ["one", None]))
    refused('a column "text" of int in its split', dataset(tmp_path / "int", [1, 2]))
    refused('a column "text" of list in its split', dataset(tmp_path / "list", [["a"], ["b"]]))
    refused("a split without rows", dataset(tmp_path / "empty", []))
    refused('no column "text", only body', dataset(tmp_path / "body", ["one"], column="body"))
    other = dataset(tmp_path / "other", ["one"], validation={"body": ["two"]})
    refused("no column \"text\", only body, in its split 'validation'", other)
    refused("a split without rows", dataset(tmp_path / "half", ["one"], validation={"text": []}))
    damaged = dataset(tmp_path / "damaged", ["one"])
    for content in ("{}", "[]", "null", "{", '{"_data_files": null}'):
        (damaged / "state.json").write_text(content)
        refused("cannot be read as a dataset: ", damaged)


def test_a_split_is_not_judged_twice(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [f"row {i} " for i in range(32)]
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": rows})}).save_to_disk(tmp_path / "data")
    assert read(tmp_path / "data").decode() == "".join(rows)
    found = corpus.read_corpus(tmp_path / "data")
    assert bytes(found.held_out.astype(np.uint8)).decode() == "".join(rows[-2:])


def test_a_checkpoint_s_tokens_are_a_whole_tokenizer_s_or_bytes(tmp_path):
    assert tokenizers.own_tokenizer(tmp_path, 256) is None
    with pytest.raises(OptionError, match="vocabulary must be 256, it is 4"):
        tokenizers.own_tokenizer(tmp_path, 4)
    words(tmp_path)
    assert tokenizers.own_tokenizer(tmp_path, 4).eos_token_id == 0
    (tmp_path / "tokenizer_config.json").unlink()
    for size in (4, 256):
        with pytest.raises(CheckpointError, match=r"has a tokenizer\.json but no tokenizer_config\.json"):
            tokenizers.own_tokenizer(tmp_path, size)
