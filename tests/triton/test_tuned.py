"""Launch configurations in a file: what is read, what is refused, how it is written."""

import errno
import json
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

from linattn.backends.triton import tuned
from linattn.backends.triton.plan import Blocks
from linattn.backends.triton.tuned import Family
from linattn.errors import LinattnError

GPU = tuned.key("NVIDIA H100", (9, 0), "3.6.0")
WIDE = Family("bfloat16", 128, 128, False, False)
ENTRY = {"c": 64, "block_e": 64, "warps": 4, "stages": 3}
FASTEST = Blocks(64, 64, 4, 3)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home folder, and the file in it chosen as in a new process; every device is an H100."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(tuned, "key_of", lambda device="cuda": GPU)
    tuned.use_default()
    yield tmp_path
    monkeypatch.undo()
    tuned.use_default()


def found(device: str = "cuda:0") -> Blocks | None:
    return tuned.lookup(device, "bfloat16", 100, 128, False, False)


def test_what_is_saved_is_found_for_padded_sizes_on_this_gpu_alone(home, monkeypatch):
    path = tuned.default_path()
    assert path == home / ".cache" / "linattn" / "tuned.json"
    assert found() is None
    tuned.save(path, GPU, {WIDE: ENTRY})
    assert found() is None  # a process reads once
    tuned.use_default()
    assert found() == FASTEST
    assert found("cpu") is None
    assert tuned.lookup("cuda:0", "bfloat16", 64, 128, False, False) is None
    assert tuned.lookup("cuda:0", "bfloat16", 128, 128, True, False) is None
    assert tuned.lookup("cuda:0", "float32", 128, 128, False, False) is None
    for other in (("NVIDIA H200", (9, 0), "3.6.0"), ("NVIDIA H100", (9, 0), "3.7.1")):
        monkeypatch.setattr(tuned, "key_of", lambda device="cuda", other=other: tuned.key(*other))
        tuned.use_default()
        assert found() is None


def test_an_entry_of_another_format_is_ignored_whatever_it_says(home, monkeypatch):
    path = home / "mine.json"
    tuned.save(path, GPU, {WIDE: ENTRY})
    content = json.loads(path.read_text())
    content["tuned"][GPU.replace(f"format {tuned.FORMAT}", "format 0")] = {"anything": 3}
    path.write_text(json.dumps(content))
    assert tuned.load(path) == {GPU: {str(WIDE): FASTEST}}
    monkeypatch.setattr(tuned, "FORMAT", tuned.FORMAT + 1)
    assert tuned.load(path) == {}


def test_a_program_chooses_a_file_or_none(home):
    tuned.save(home / "mine.json", GPU, {WIDE: ENTRY})
    tuned.use(home / "mine.json")
    assert found() == FASTEST
    tuned.use(None)
    assert found() is None
    with pytest.raises(LinattnError, match=r"^there is no file .*other\.json$"):
        tuned.use(home / "other.json")
    tuned.use_table({str(WIDE): Blocks(32, 32, 8, 2)})
    assert found("cpu") == Blocks(32, 32, 8, 2)


BROKEN = [
    ("", "it is no JSON"),
    ("{", "it is no JSON"),
    ("[" * 100_000, "it is no JSON"),
    ("[]", "it has no configurations by GPU"),
    ('{"tuned": []}', "it has no configurations by GPU"),
    ('{"tuned": {"a": 1}}', "it has no configurations by GPU"),
    ({str(WIDE): 3}, "'bfloat16 128 128 plain value' is no configuration"),
    ({str(WIDE): {}}, "has c = None, expected one of 16, 32, 64, 128"),
    ({str(WIDE): ENTRY | {"c": 48}}, "has c = 48"),
    ({str(WIDE): ENTRY | {"c": "64"}}, "has c = '64'"),
    ({str(WIDE): ENTRY | {"c": 64.0}}, "has c = 64.0"),
    ({str(WIDE): ENTRY | {"warps": 5}}, "has warps = 5, expected one of 4, 8"),
    ({str(WIDE): ENTRY | {"stages": True}}, "has stages = True"),
    ({str(WIDE): ENTRY | {"stages": 1}}, "has stages = 1, expected one of 2, 3, 4"),
    ({"bfloat16 64 32 plain value": ENTRY}, "has block_e = 64, expected at most 32"),
]


@pytest.mark.parametrize(("content", "sentence"), BROKEN, ids=[sentence for _, sentence in BROKEN])
def test_a_file_that_cannot_be_used_is_one_warning_and_as_good_as_none(home, content, sentence):
    path = tuned.default_path()
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps({"tuned": {GPU: content}}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert found() is None
        assert found() is None
    (warning,) = said
    text = str(warning.message)
    assert str(path) in text
    assert sentence in text
    assert text.endswith("; the shipped launch configurations are used")
    with pytest.raises(LinattnError):
        tuned.use(path)


def test_a_file_that_cannot_be_read_is_a_warning_too(home):
    tuned.default_path().mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=r"^cannot read .*tuned\.json: Is a directory; the shipped"):
        assert found() is None


def test_bytes_that_are_no_text_are_a_warning_too(home):
    tuned.default_path().parent.mkdir(parents=True)
    tuned.default_path().write_bytes(b"\xff\xfe{")
    with pytest.warns(RuntimeWarning, match="it is no JSON"):
        assert found() is None


def test_without_a_home_folder_nothing_is_tuned(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuned.default_path() is None
    assert found() is None


def test_saving_keeps_what_others_found_and_takes_out_what_is_no_better(home):
    path, other = home / "mine.json", Family("bfloat16", 64, 64, True, True)
    tuned.save(path, GPU, {WIDE: None})
    assert not path.exists()
    tuned.save(path, GPU, {WIDE: ENTRY})
    tuned.save(path, GPU, {other: ENTRY | {"ms": [0.2]}})
    tuned.save(path, "another", {WIDE: ENTRY})
    assert set(json.loads(path.read_text())["tuned"]) == {GPU, "another"}
    assert set(tuned.load(path)[GPU]) == {str(WIDE), str(other)}
    tuned.save(path, GPU, {WIDE: None, other: None})
    assert set(json.loads(path.read_text())["tuned"]) == {"another"}


def test_saving_does_not_replace_a_file_of_somebody_else(home):
    path = home / "mine.json"
    path.write_text('{"name": "something"}')
    with pytest.raises(LinattnError, match="is not a file of `linattn tune`"):
        tuned.save(path, GPU, {WIDE: ENTRY})
    assert path.read_text() == '{"name": "something"}'


def test_a_full_disk_leaves_the_old_file(home, monkeypatch):
    path = home / "mine.json"
    tuned.save(path, GPU, {WIDE: ENTRY})
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LinattnError, match=r"cannot write .*No space left on device"):
        tuned.save(path, GPU, {WIDE: ENTRY | {"c": 32}})
    assert path.read_bytes() == before
    assert list(home.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_sentence(home):
    (home / "file").write_text("")
    with pytest.raises(LinattnError, match=r"^cannot write .*: (Not a directory|File exists)$"):
        tuned.save(home / "file" / "mine.json", GPU, {WIDE: ENTRY})


def _save_many(path: str, first: int) -> None:
    for i in range(first, first + 20):
        tuned.save(path, f"gpu {i}", {WIDE: ENTRY})


def test_processes_at_once_lose_and_corrupt_nothing(home):
    context = multiprocessing.get_context("spawn")
    path = home / "mine.json"
    with context.Pool(2) as pool:
        pool.starmap(_save_many, [(str(path), 0), (str(path), 20)])
    assert len(json.loads(path.read_text())["tuned"]) == 40
    assert list(home.iterdir()) == [path]


def test_the_plan_takes_what_was_tuned_and_otherwise_what_is_shipped(home):
    from linattn.backends.triton import plan

    shipped = plan.blocks("bfloat16", 128, 128, False, False)
    tuned.save(tuned.default_path(), GPU, {WIDE: ENTRY | {"c": 32, "block_e": 16}})
    tuned.use_default()
    assert plan.blocks("bfloat16", 128, 128, False, False, "cuda:0") == Blocks(32, 16, 4, 3) != shipped
    assert plan.blocks("bfloat16", 128, 128, False, False) == shipped
    ours = plan.shipped("bfloat16", 128, 128, False, True)
    assert plan.blocks("bfloat16", 128, 128, False, True, "cuda:0") == ours
    tuned.use(None)
    assert plan.blocks("bfloat16", 128, 128, False, False, "cuda:0") == shipped


def test_an_entry_says_how_a_state_is_held(home):
    path = home / "mine.json"
    tuned.save(path, GPU, {WIDE: {**ENTRY, "across": False}})
    assert tuned.load(path)[GPU][str(WIDE)].across is False
    with pytest.raises(LinattnError, match="has across = 0, expected true or false"):
        tuned.save(path, GPU, {WIDE: {**ENTRY, "across": 0}})
    assert tuned.load(path)[GPU][str(WIDE)].across is False
