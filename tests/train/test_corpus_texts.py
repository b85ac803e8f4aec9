"""What a tokenizer makes of several texts: each ends, in training as in measuring, and names its run."""

from __future__ import annotations

import numpy as np
import pytest

from linattn.train import corpus
from tests.train.test_corpus import dataset, words

EOS = 0


def texts_of(ids):
    """The texts between ends, as tuples; the last end is the end of all."""
    assert ids[-1] == EOS
    stops = np.flatnonzero(ids == EOS)
    return [
        tuple(ids[start:stop].tolist()) for start, stop in zip([0, *(stops[:-1] + 1)], stops, strict=True)
    ]


def written(folder, count):
    """Files of words that are all different, the shortest first; the first gives nothing to be held out."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:03}").write_text(" ".join(["one"] * (3 + 8 * index) + ["two"]))
    return folder


@pytest.mark.parametrize("count", [5, 70])  # each file gives its end to be held out, or some files do
def test_every_file_ends(tmp_path, count):
    tokenizer, folder = words(tmp_path / "words"), written(tmp_path / "text", count)
    found = corpus.read_corpus(folder, tokenizer)
    train, held_out = texts_of(found.train), texts_of(found.held_out)
    whole = texts_of(corpus.read_all([folder], tokenizer)[0])
    assert len(whole) == count and found.held_out_bytes > 0
    if count == 70:
        assert sorted(train + held_out) == sorted(whole)
        return
    assert len(train) == count and len(held_out) == count - 1
    kept = [len(part) for part in train]
    assert kept == sorted(set(kept)) and all(2 not in part for part in train[1:])


def test_bytes_have_no_ends(tmp_path):
    folder = written(tmp_path / "text", 5)
    found = corpus.read_corpus(folder)
    assert len(found.train) + len(found.held_out) == sum(path.stat().st_size for path in folder.iterdir())
    assert found.train.dtype == np.int32 and len(found.held_out) == found.held_out_bytes


def test_all_splits_are_measured(tmp_path):
    more = {name: {"text": [name]} for name in ("validation", "test", "extra")}
    data = dataset(tmp_path / "data", ["one", "two"], **more)
    ids, size = corpus.read_all([data])
    assert bytes(ids.astype(np.uint8)).decode() == "onetwovalidationtestextra" and size == len(ids)
    found = corpus.read_corpus(data)  # which learns one and is judged by one
    assert bytes(found.train.astype(np.uint8)) == b"onetwo"
    assert bytes(found.held_out.astype(np.uint8)) == b"validation"


def test_a_dataset_is_named_by_its_text(tmp_path):
    """Not by how it came to be: the function that wrote its rows may have read other files since."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    source = tmp_path / "source"

    def named(word, held):
        source.write_text(word)
        rows = datasets.Dataset.from_dict({"n": [0, 1]})
        rows = rows.map(lambda row: {"text": source.read_text()}, new_fingerprint="the same")
        folder = tmp_path / f"{word} {held}"
        both = {"train": rows, "validation": datasets.Dataset.from_dict({"text": [held]})}
        datasets.DatasetDict(both).save_to_disk(folder)
        return corpus.read_corpus(folder).fingerprint

    assert len({named("one", "a"), named("two", "a"), named("one", "b")}) == 3
    again = dataset(tmp_path / "again", ["one", "one"], validation={"text": ["a"]})
    assert corpus.read_corpus(again).fingerprint == named("one", "a")
    halves = dataset(tmp_path / "halves", ["on", "eone"], validation={"text": ["a"]})
    assert corpus.read_corpus(halves).fingerprint != named("one", "a")
