"""Two processes, one a GPU, as torchrun starts them: DDP, FSDP2 and `linattn train`, against one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from linattn.models.transnormer import TransNormerConfig
from tests.gpu.calls import needs_two

pytestmark = [pytest.mark.gpu, needs_two]
ROOT = Path(__file__).parents[2]
EPS = {"float32": torch.finfo(torch.float16).eps, "bfloat16": torch.finfo(torch.bfloat16).eps}


def started(count: int, *arguments: str) -> str:
    """The output of a module's processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [*torchrun, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_models_learn_and_generate_what_one_process_does(tmp_path: Path) -> None:
    started(2, "tests.gpu.launched", str(tmp_path))
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 4
    for parts in first.values():
        for way, eps in EPS.items():
            one = parts[way]["one"]
            assert one[-1] < one[0]
            for other in ("DDP", "FSDP2"):
                assert parts[way][other] == pytest.approx(one, rel=eps, abs=0), (way, other)
        assert parts["same logits"] and parts.get("generated", True)


def test_linattn_train(tmp_path: Path) -> None:
    TransNormerConfig(
        vocab_size=256, decoder_embed_dim=64, hidden_dim=64, decoder_layers=2, decoder_attention_heads=2,
        glu_dim=96, linear_use_lrpe_list=[1, 1],
    ).save_pretrained(tmp_path / "sizes")  # fmt: skip
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 300)
    words = {"preset": tmp_path / "sizes", "text": tmp_path / "text.txt"}
    words |= {"steps": 8, "batch": 4, "seq-len": 64, "save-every": 4}
    options = [part for name, value in words.items() for part in (f"--{name}", str(value))]

    def run(count: int, *more: str) -> list[dict[str, Any]]:
        out = str(tmp_path / f"out-{count}")
        said = started(count, "linattn", "train", *options, "--out", out, "--json", *more)
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    one, two = run(1), run(2)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, other in zip(two, one, strict=True):
        for name in mine.keys() & {"train_bits_per_token", "held_out_bits_per_byte"}:
            assert mine[name] == pytest.approx(other[name], rel=EPS["bfloat16"], abs=0)
    shutil.rmtree(tmp_path / "out-2" / "checkpoint-8")
    (tmp_path / "out-2" / "model.safetensors").unlink()
    assert run(2, "--resume")[-1] == two[-1]
