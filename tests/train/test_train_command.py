"""`linattn train`: whose tokenizer it takes, and what it refuses before anything is made."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from linattn.cli import app
from linattn.errors import CheckpointError, DeviceError, OptionError
from linattn.models.transnormer import TransNormerConfig, TransNormerForCausalLM
from linattn.safetensors_io import write_whole
from linattn.train import corpus, data, presets, run_folder
from linattn.train.checkpoint import CONFIG, alone, checkpoints, load_facts, of_trainer
from linattn.train.device import choose_device
from tests.train.test_corpus import dataset
from tests.train.test_corpus import words as few_words
from tests.train.test_published import LINE, SIZES, words
from tests.train.test_trainer_checkpoint import no_larger

SHORT = ["--steps", "4", "--batch", "2", "--seq-len", "8", "--save-every", "2", "--device", "cpu"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current folder, with text and sizes in it."""
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(LINE * 20)
    TransNormerConfig(vocab_size=256, **SIZES).save_pretrained(tmp_path / "sizes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def train(*more):
    result = invoke("train", "--text", "text", "--out", "out", *SHORT, *more)
    assert result.exit_code == 0, result.output
    return result


def refused(sentence, *arguments, command="train"):
    result = invoke(command, *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sentence in result.stderr


def weights(folder, vocab_size):
    config = TransNormerConfig(vocab_size=vocab_size, **SIZES)
    TransNormerForCausalLM(config).save_pretrained(folder)


def test_a_model_s_own_tokenizer_is_taken(home):
    tokenizer = words(home / "model")
    weights(home / "model", len(tokenizer))
    assert train("--preset", "model").stdout.startswith("text is read with the tokenizer in model\n")
    facts = json.loads((home / "out" / run_folder.FACTS).read_text())
    assert facts["vocab_size"] == len(tokenizer) and facts["tokenizer"] is not None
    assert invoke("eval", "--checkpoint", "out", "--text", "text", "--device", "cpu").exit_code == 0
    whole = load_file("out/model.safetensors")
    for again in ((), ("--tokenizer", "model")):  # the run's own, and the same by name
        said = train("--preset", "model", "--resume", "--json", *again)
        assert said.stdout == ""
    assert all((x == load_file("out/model.safetensors")[name]).all() for name, x in whole.items())


def test_a_configuration_s_own_tokenizer_is_taken(home):
    """Its vocabulary is then the model's."""
    tokenizer = words(home / "sizes")
    said = train("--preset", "sizes", "--json")
    assert said.stderr.startswith("text is read with the tokenizer in sizes\n")
    assert all(json.loads(line) for line in said.stdout.splitlines())
    config = TransNormerConfig.from_pretrained("out")
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id


def test_bytes_are_for_models_over_bytes(home):
    weights(home / "model", 300)
    refused("vocabulary must be 256, it is 300", "--text", "text", "--out", "out", "--preset", "model")
    with pytest.raises(OptionError, match="vocabulary must be 256, it is 300"):
        presets.model_of("model", 256)
    assert not (home / "out").exists()
    weights(home / "bytes", 256)
    assert "tokenizer" not in train("--preset", "bytes").stdout


def test_special_tokens_are_the_tokenizer_s(home):
    """Not the released ones: a vocabulary may be smaller than those, and bytes have none."""
    tokenizer = few_words(home / "words")
    for size in ("385m", "sizes"):
        config = presets.config_of(size, 4, tokenizer)
        assert (config.eos_token_id, config.bos_token_id, config.vocab_size) == (0, None, 4)
    config = presets.config_of("385m", 256)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (None, None, None)
    TransNormerConfig(vocab_size=300, **SIZES | {"eos_token_id": [299, 1]}).save_pretrained("wide")
    assert presets.config_of("wide", 300).eos_token_id == [299, 1]
    assert presets.config_of("wide", 256).eos_token_id is None


@pytest.mark.parametrize("preset", ["tiny", "sizes"])
def test_a_run_does_not_train_into_its_text(home, preset):
    (home / "link").symlink_to("text")
    before = sorted((home / "text").iterdir())
    for text, out in (("text", "text"), ("text", "./text/"), ("link", "text"), ("text", home / "link")):
        refused("is the folder of --text", "--preset", preset, "--text", text, "--out", out, *SHORT)
    assert sorted((home / "text").iterdir()) == before


@pytest.mark.parametrize("option", ["--text", "--out", "--tokenizer"])
def test_a_path_that_is_empty_is_not_the_current_folder(home, option):
    (home / "a.txt").write_text(LINE * 20)
    given = {"--text": "text", "--out": "out", "--preset": "sizes", option: ""}
    refused(f"{option} is empty: give a path", *(part for pair in given.items() for part in pair), *SHORT)
    refused("--preset must be one of", "--text", "text", "--preset", "", *SHORT)
    assert not (home / "out").exists() and not of_trainer(home)


@pytest.mark.parametrize("preset", ["tiny", "sizes"])
def test_a_refusal_makes_no_folder(home, preset):
    (home / "short").write_text("short")
    begun = ["--preset", preset, "--out", "out", "--device", "cpu"]
    refused("give more text", "--text", "short", *begun, "--batch", "1", "--seq-len", "4")
    refused("give more text", "--text", "text", *begun, "--seq-len", "4000")
    refused("out holds no checkpoint to go on from", "--text", "text", *begun, "--seq-len", "8", "--resume")
    assert not (home / "out").exists()
    weights(home / "model", 256)
    before = sorted((home / "model").iterdir())
    refused("holds a model already", "--text", "text", *begun[:2], "--seq-len", "8", "--out", "model")
    assert sorted((home / "model").iterdir()) == before


def test_a_run_of_the_other_kind_is_named(home):
    train("--preset", "tiny")
    last = checkpoints(home / "out")[-1].name
    for more in ((), ("--resume",)):
        said = f"out holds a run of the preset tiny or small ({last}): go on with that --preset, or choose"
        refused(said, "--text", "text", "--out", "out", "--preset", "sizes", *SHORT, *more)
    assert not (home / "out" / CONFIG).exists()


def test_the_small_loop_learns_the_rows_of_a_dataset(home):
    """Not the JSON that lies beside them; `eval` measures the same."""
    dataset(home / "rows", [LINE, LINE * 2, "ä" * 300])
    result = invoke("train", "--preset", "tiny", "--text", "rows", "--out", "out", *SHORT)
    assert result.exit_code == 0 and "1 file" in result.output, result.output
    begun = checkpoints(home / "out")[-1]
    text = corpus.read_plain(home / "rows")
    assert (text.train.tobytes() + text.held_out.tobytes()).decode() == LINE * 3 + "ä" * 300
    assert text.fingerprint == load_facts(begun)["text"] == corpus.read_corpus(home / "rows").fingerprint
    refused("of another run", "--preset", "tiny", "--text", "text", "--out", "out", *SHORT, "--resume")


def test_a_demo_removes_a_demo_s_run_and_no_other(home, monkeypatch):
    monkeypatch.setattr("linattn.cli.demo._standard_library", lambda: data.read_text(home / "text"))
    demo = ["--seconds", "0.2", "--no-verify", "--out"]
    for _ in range(2):
        assert invoke("demo", *demo, "shown").exit_code == 0
    assert len(checkpoints(home / "shown")) <= 2
    train("--preset", "tiny")
    train("--preset", "sizes", "--out", "run")
    (home / "run" / "model.safetensors").unlink()  # as where it was cut short
    weights(home / "model", 256)
    for out, said in (("out", "no demo's"), ("run", "no demo's"), ("model", "a model already")):
        before = sorted((home / out).rglob("*"))
        refused(said, *demo, out, command="demo")
        assert sorted((home / out).rglob("*")) == before
    with alone(home / "shown"):
        refused("another run is training into", *demo, "shown", command="demo")


@pytest.mark.parametrize("preset", ["tiny", "sizes"])
@pytest.mark.parametrize("rate", ["0", "inf", "nan"])
def test_a_rate_is_a_number(home, preset, rate):
    refused("lr must be a number above 0", "--preset", preset, "--text", "text", "--lr", rate, *SHORT)


def test_there_is_one_cpu(home):
    with pytest.raises(DeviceError, match="got 'cpu:1'"):
        choose_device("cpu:1")
    refused("device must be", "--text", "text", "--preset", "sizes", *SHORT[:-1], "cpu:1")


def test_an_old_file_is_untouched_where_there_is_one(home):
    for old in ("", "; the old file is untouched"):
        with no_larger(1), pytest.raises(CheckpointError, match=f"File too large{old}$"):
            write_whole("file", b"two")
        assert not old or (home / "file").read_bytes() == b"1"
        write_whole("file", b"1")
