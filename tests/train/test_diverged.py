"""Training that diverges: said at once, and nothing that came of it is saved."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from linattn.cli import app
from linattn.errors import ValueRangeError
from linattn.models.transnormer import TransNormerConfig
from linattn.train import checkpoint, corpus, published
from tests.train.test_checkpoint import CONFIG, SETTINGS, run, trainer
from tests.train.test_published import CPU, LINE, SIZES

PLAN = published.Plan(steps=6, batch=2, seq_len=16, lr=1e-2, warmup=2, save_every=2)
LARGEST = torch.finfo(torch.float32).max
UNUSED = 255  # a byte that no text has
# what an update did to a model's parameters, and the sentence
DAMAGE = [
    (lambda name, x: x.fill_(torch.nan), r"weights are no longer finite after step \d"),
    (
        lambda name, x: x.sign_().mul_(LARGEST) if "lm_head" in name else None,  # logits overflow
        r"the (held-out )?loss (of|after|at) step \d is (nan|inf)",
    ),
    (
        lambda name, x: x[UNUSED].fill_(torch.nan) if "embed_tokens" in name else None,
        r"weights are no longer finite after step \d",
    ),
]
DAMAGES = pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=["nan", "huge", "unused"])


@pytest.fixture
def home(tmp_path):
    (tmp_path / "text.txt").write_text(LINE * 60)
    return tmp_path


def sizes(folder, lrpe):
    TransNormerConfig(vocab_size=256, **SIZES | {"linear_use_lrpe_list": lrpe}).save_pretrained(folder)
    return folder


def damaged_at(step, damage, monkeypatch):
    """The update of this step, of any run, does damage to the weights."""
    plain, taken = torch.optim.AdamW.step, []

    def stepped(self, *arguments, **options):
        found = plain(self, *arguments, **options)
        taken.append(self)
        if len(taken) == step:
            with torch.no_grad():
                for name, parameter in self.named:
                    damage(name, parameter)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


def transformers_trainer(home, plan, monkeypatch):
    """Train by it into `out`; its optimizer knows the names that `damaged_at` needs."""
    plain = published.Trainer.create_optimizer

    def named(self, *arguments, **options):
        made = plain(self, *arguments, **options)
        self.optimizer.named = list(self.model.named_parameters())
        return made

    monkeypatch.setattr(published.Trainer, "create_optimizer", named)
    ids = corpus.read_corpus(home / "text.txt")
    published.train(str(sizes(home / "sizes", [1, 0])), ids, plan, home / "out", device=CPU, as_json=True)


def all_finite(folder):
    return all(x.isfinite().all() for x in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("lrpe", [[0, 0], [1, 0]])
def test_a_learning_rate_that_is_too_large(home, lrpe):
    """Trainer itself would go on with a loss of 0, and save what is no number over what is one."""
    command = ["train", "--preset", str(sizes(home / "sizes", lrpe)), "--text", str(home / "text.txt")]
    command += ["--steps", "8", "--batch", "2", "--seq-len", "16", "--lr", "1e30", "--save-every", "1"]
    found = CliRunner().invoke(app, [*command, "--device", "cpu", "--json", "--out", str(home / "out")])
    assert found.exit_code == 2 and found.stderr.splitlines()[-1].endswith(
        ": training diverged; lower the learning rate"
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert "NaN" not in found.stdout and all(line.get("train_bits_per_token", 8) > 0 for line in lines)
    saved = checkpoint.of_trainer(home / "out", whole=False)
    assert saved and all(map(all_finite, saved)) and not (home / "out" / "model.safetensors").exists()


@DAMAGES
@pytest.mark.parametrize("step", [4, 6])
def test_transformers_trainer_does_not_save_it(home, monkeypatch, damage, said, step):
    """Of the last update neither."""
    damaged_at(step, damage, monkeypatch)
    with pytest.raises(ValueRangeError, match=said + ": training diverged; lower the learning rate$"):
        transformers_trainer(home, PLAN, monkeypatch)
    saved = checkpoint.of_trainer(home / "out", whole=False)
    assert checkpoint.step_of(saved[-1]) == step - 2 and all(map(all_finite, saved))
    assert not (home / "out" / "model.safetensors").exists()


def test_transformers_trainer_ends_at_the_first_loss(home, monkeypatch):
    """Not at the next checkpoint, where the held-out text is measured."""
    damage, _ = DAMAGE[1]
    damaged_at(3, damage, monkeypatch)
    with pytest.raises(ValueRangeError, match=r"^the loss at step 4 is (nan|inf): training diverged"):
        transformers_trainer(home, dataclasses.replace(PLAN, save_every=PLAN.steps), monkeypatch)
    assert checkpoint.of_trainer(home / "out", whole=False) == []


@DAMAGES
@pytest.mark.parametrize("step", [5, SETTINGS.steps])
@pytest.mark.parametrize("evaluations", [1, SETTINGS.steps])
def test_the_small_loop_does_not_save_it(tmp_path, monkeypatch, damage, said, step, evaluations):
    """Where the held-out text is measured, or not; of the last update neither."""
    it = trainer(tmp_path)
    it.optimizer.named = list(it.model.named_parameters())
    damaged_at(step, damage, monkeypatch)
    with pytest.raises(ValueRangeError, match=said + ": training diverged; lower the learning rate$"):
        run(it, save_every=1, evaluations=evaluations)
    saved = checkpoint.checkpoints(tmp_path)
    assert checkpoint.step_of(saved[-1]) == step - 1 and all(map(all_finite, saved))


def test_a_run_without_a_folder_says_so_too(monkeypatch):
    it = trainer(None, config=dataclasses.replace(CONFIG, linear_use_lrpe_list=(0, 0)))
    it.optimizer.named = list(it.model.named_parameters())
    damaged_at(SETTINGS.steps, DAMAGE[0][0], monkeypatch)
    with pytest.raises(ValueRangeError, match="the held-out loss after step 8 is nan: training diverged"):
        run(it)
