"""Training by several processes of a launcher: what one would learn, written and said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linattn.models.transnormer import TransNormerConfig
from linattn.train import corpus, published
from tests.train.launched import CPU, PLAN
from tests.train.test_published import LINE, SIZES

ROOT = Path(__file__).parents[2]
SECONDS = 240


def logged(out):
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.fixture
def folder(tmp_path):
    TransNormerConfig(vocab_size=256, **SIZES).save_pretrained(tmp_path / "sizes")
    (tmp_path / "text.txt").write_text("".join(f"{i}: {LINE}" for i in range(60)))
    return tmp_path


def test_two_processes_learn_what_one_does(folder, capsys):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", *launch, "-m", "tests.train.launched", str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as launcher:  # fmt: skip
        try:
            out, said = launcher.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # and with it the processes, which wait for each other
            out, said = launcher.communicate()
    assert launcher.returncode == 0, said
    one, other = (json.loads((folder / f"said-{i}.json").read_text()) for i in range(2))
    assert one == other and one["stopped"]
    assert "--preset tiny is trained by one process, not by 2: start it without torchrun" in one["small"]
    assert one["odd"].startswith("ValueRangeError: batch must be a multiple of 2, ") and "got 3" in one["odd"]
    assert one["nothing"].endswith("holds no checkpoint to go on from")
    assert "another run is training into" in one["held"] and "(checkpoint-6)" in one["again"]
    assert not any((folder / name).exists() for name in ("small", "odd", "nothing"))
    assert [path.name for path in (folder / "held").iterdir()] == [".lock"]
    # one process learns the same, from the same windows
    published.train(
        str(folder / "sizes"), corpus.read_corpus(folder / "text.txt"), PLAN, folder / "one", device=CPU,
        as_json=True,
    )  # fmt: skip
    alone, together = logged(capsys.readouterr().out), logged(out)
    assert len(alone) == 8 and len(together) == 8 + 5 + 4  # to the end, to a stop, and on: each printed once
    for mine, its in zip(alone, together[:8], strict=True):
        assert mine["step"] == its["step"] and mine.keys() == its.keys() and len(mine) == 3
        assert list(mine.values())[2] == pytest.approx(list(its.values())[2], rel=1e-6)  # float32
    whole, cut = (load_file(folder / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(x, cut[name]) for name, x in whole.items())
    for name in ("whole", "cut"):
        saved = published.checkpoint.of_trainer(folder / name)
        assert [path.name for path in saved] == ["checkpoint-3", "checkpoint-6"]


def test_one_process_takes_one_gpu(folder, monkeypatch):
    """Of many that it sees: transformers would give each a batch."""
    asked = []

    class Trainer(published.Trainer):
        def train(self, **options):
            asked.append((self.args.train_batch_size, self.args.n_gpu))

    arguments = published.TrainingArguments
    monkeypatch.setattr(published, "Trainer", Trainer)
    monkeypatch.setattr(published, "TrainingArguments", lambda **given: arguments(**given | {"bf16": False}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    text = corpus.read_corpus(folder / "text.txt")
    published.train(
        str(folder / "sizes"), text, PLAN, folder / "out", device=torch.device("cuda"), as_json=True
    )
    assert asked == [(PLAN.batch, 1)]
    with pytest.raises(published.OptionError, match="instead of --device cuda:1, --device cuda where"):
        published.train(
            str(folder / "sizes"), text, PLAN, folder / "other", device=torch.device("cuda:1"), as_json=True
        )
    assert not (folder / "other").exists()
