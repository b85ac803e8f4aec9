"""What two processes, one a GPU, learn: `torchrun --nproc_per_node 2 -m tests.gpu.launched FOLDER`."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.gpu.test_spread import MODELS, V, given
from tests.models.test_sharded import MIXED, rounded, sharded

STEPS, GREEDY = 4, {"max_new_tokens": 8, "do_sample": False}


def losses(model: nn.Module, ids: torch.Tensor, call: Callable[..., Any]) -> list[float]:
    """The mean loss of both processes' texts in every step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(STEPS):
        loss = call(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        distributed.all_reduce(mean, distributed.ReduceOp.AVG)
        found.append(mean.item())
    return found


def plainly(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids).loss


def lowered(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return plainly(model, ids)


def main(folder: Path) -> None:
    """Leave in `folder` what this process has seen of each kind of model."""
    distributed.init_process_group("nccl")
    rank = distributed.get_rank()
    torch.cuda.set_device(rank)
    said = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().cuda()
        ids = torch.randint(3, V, (4, 70), generator=torch.Generator().manual_seed(1)).cuda()
        mine, parts = ids[2 * rank : 2 * rank + 2], {}
        for way, call in (("float32", plainly), ("bfloat16", lowered)):
            shared = DistributedDataParallel(copy.deepcopy(model), device_ids=[rank])
            options = MIXED if way == "bfloat16" else {}
            sharing = sharded(copy.deepcopy(model), **options)
            parts[way] = {
                "one": losses(copy.deepcopy(model), ids, call),
                "DDP": losses(shared, mine, call),
                "FSDP2": losses(sharing, mine, plainly),
            }
        call = {"input_ids": ids, **given(model, ids)}
        sharing, plain = sharded(copy.deepcopy(model.eval()), **MIXED), rounded(model).eval()
        with torch.no_grad():
            parts["same logits"] = bool(torch.equal(sharing(**call).logits, plain(**call).logits))
        if model.can_generate():  # in float32: a step's kernels round bfloat16 otherwise than a block's
            sharing = sharded(copy.deepcopy(model))
            with torch.no_grad():
                got, want = (each.generate(ids, **GREEDY) for each in (sharing, model))
            parts["generated"] = bool(torch.equal(got, want))
        said[name] = parts
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
