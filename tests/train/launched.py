"""What processes of one launcher say and learn: `torchrun -m tests.train.launched FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from typer.testing import CliRunner

from linattn.cli import app
from linattn.errors import LinattnError
from linattn.train import checkpoint, corpus, published
from tests.train import test_published
from tests.train.stopping import killed_after

CPU = torch.device("cpu")
PLAN = dataclasses.replace(test_published.PLAN, batch=4)  # 2 windows each, of which 11 held out leave a rest


def refused(folder: Path, plan: published.Plan, out: Path, **options: bool) -> str:
    """The sentence with which a run is refused."""
    try:
        train(folder, plan, out, **options)
    except LinattnError as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def train(folder: Path, plan: published.Plan, out: Path, **options: bool) -> None:
    text = corpus.read_corpus(folder / "text.txt")
    published.train(str(folder / "sizes"), text, plan, out, device=CPU, as_json=True, **options)


def main(folder: Path) -> None:
    """Leave in `folder` what each process was told, and two runs: `whole`, and `cut`, which went on."""
    state, said = PartialState(cpu=True), {}
    small = ["train", "--text", str(folder / "text.txt"), "--out", str(folder / "small"), "--device", "cpu"]
    said["small"] = CliRunner().invoke(app, small).output
    said["odd"] = refused(folder, published.Plan(steps=6, batch=3, seq_len=16), folder / "odd")
    said["nothing"] = refused(folder, PLAN, folder / "nothing", resume=True)
    if state.is_main_process:
        with checkpoint.alone(folder / "held"):
            said["held"] = refused(folder, PLAN, folder / "held")
    else:
        said["held"] = refused(folder, PLAN, folder / "held")
    train(folder, PLAN, folder / "whole")
    said["again"] = refused(folder, PLAN, folder / "whole")
    with killed_after(4):
        train(folder, PLAN, folder / "cut")
    said["stopped"] = True
    train(folder, PLAN, folder / "cut", resume=True)
    (folder / f"said-{state.process_index}.json").write_text(json.dumps(said))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
