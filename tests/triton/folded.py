"""Segments that add up what lies before them: calls without states, which other properties always have.

Run as a program with TRITON_INTERPRET=1: results and gradients beside torch's in float64, and wrong kernels.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

import linattn
from linattn import LRPE, Cosine
from linattn.backends.triton import TritonBackend
from linattn.backends.triton import product as product_module
from tests.triton.drawing import carried, segmented

N, H, D = 70, 2, 16
DECAY, THETA = -torch.tensor([0.01, 0.3]), torch.rand(H, D)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"log_decay": DECAY},
    "lrpe": {"log_decay": DECAY, "reweight": LRPE(THETA)},
    "cosformer": {"feature_map": "relu", "reweight": Cosine(90), "normalize": True},
    "decay, normalized": {"log_decay": DECAY, "feature_map": "elu+1", "normalize": True},
    "both ways": {"log_decay": DECAY, "causal": False},
}


def wide(options: dict[str, Any]) -> dict[str, Any]:
    """The same options in float64."""
    found = dict(options)
    if "log_decay" in found:
        found["log_decay"] = found["log_decay"].double()
    if isinstance(found.get("reweight"), LRPE):
        found["reweight"] = LRPE(THETA.double())
    return found


def error(options: dict[str, Any]) -> float:
    """The largest error of o and the gradients, over the largest number of each."""
    torch.manual_seed(0)
    x = [torch.randn(2, N, H, D) for _ in range(4)]

    def run(dtype: torch.dtype, backend: Any, options: dict[str, Any]) -> list[torch.Tensor]:
        leaves = [part.to(dtype).requires_grad_() for part in x[:3]]
        with torch.no_grad():
            alone = linattn.attention(*leaves, backend=backend, **options)
        o = linattn.attention(*leaves, backend=backend, **options)
        return [alone, o.detach(), *torch.autograd.grad(o, leaves, x[3].to(dtype))]

    found = run(torch.float32, TritonBackend(interpreted=True), options)
    right = run(torch.float64, "torch", wide(options))
    return max(
        float((mine - other).abs().max() / other.abs().max())
        for mine, other in zip(found, right, strict=True)
    )


def instead(place: int, value: Any) -> Any:
    """`gathered` with one argument that is always the same."""
    right = product_module.gathered

    def wrong(*given: Any) -> Any:
        given = (*given[:place], value, *given[place + 1 :])
        return right(*given)

    return mock.patch.object(product_module, "gathered", wrong)


WRONG = {"that decays are left out": (instead(12, 0), "decay"), "the order": (instead(13, False), "plain")}


def main() -> None:
    with segmented(16, 16), carried() as folded:
        for name, options in KINDS.items():
            folded.clear()
            off = error(options)
            assert off < 1e-4, (name, off)
            assert all(folded), (name, "is not added up by its readers")
            assert folded or name == "both ways"
        turned = torch.autograd.graph.saved_tensors_hooks(  # what is kept comes back in another layout
            lambda x: x.transpose(0, -1).contiguous(), lambda x: x.transpose(0, -1)
        )
        with turned:
            assert error(KINDS["cosformer"]) < 1e-4
        for what, (wrong, kind) in WRONG.items():
            with wrong:
                assert error(KINDS[kind]) > 1e-2, f"nobody notices {what}"


if __name__ == "__main__":
    main()
