"""Every property on a GPU: Triton's kernels as they are, in segments, and started again; CUDA's; torch.

`--all` tries every combination of options, not only every pair of them. Each combination is one case, whose
kernels Triton compiles and keeps on disk; its parts are there so that several processes compile at a time.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from linattn import registry, testing
from linattn.testing.subject import Natives, Result
from tests.triton.drawing import check, drawn, rows, segmented

pytestmark = pytest.mark.gpu

PARTS = 4
GRAIN = 64
MODES = ("triton", "triton in segments", "triton again", "cupy", "cupy on torch", "cupy again", "torch")


class OnGpu(testing.BackendSubject):
    """A backend on CUDA arrays. times: how often a call is made before its result is looked at.

    What is called again may take a shorter way.
    """

    def __init__(self, name: str, times: int = 1, kind: str = "torch") -> None:
        super().__init__(name, kind, "cuda")
        self.times = times

    def axes(self) -> dict[str, tuple[Any, ...]]:
        halves = {"dtype": ("float32", "float16", "bfloat16")}
        return halves if self.name == "triton" else super().axes()

    def run(
        self, x: testing.Inputs, given: Natives, *, return_state: bool = False, slots: Any = None
    ) -> Result:
        if slots is None:  # a pool would change every time
            for _ in range(self.times - 1):
                super().run(x, given, return_state=return_state)
        return super().run(x, given, return_state=return_state, slots=slots)

    def vjp(
        self, x: testing.Inputs, given: Natives, do: Any, dstate: tuple[Any, Any] | None
    ) -> dict[str, Any]:
        for _ in range(self.times - 1):
            super().vjp(x, given, do, dstate)
        return super().vjp(x, given, do, dstate)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", sorted(testing.PROPERTIES))
@pytest.mark.parametrize("mode", MODES)
# torch says so when it is asked to fill fresh buffers
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_property(pytestconfig: pytest.Config, mode: str, name: str, part: int) -> None:
    kind = "cupy" if mode == "cupy" else "torch"
    if mode.startswith("cupy") and (reason := registry.get("cupy").unavailable()):
        pytest.skip(reason)
    of = OnGpu(mode.split()[0], times=4 if mode.endswith("again") else 1, kind=kind)
    chosen = rows(of, name, full=pytestconfig.getoption("all_rows", False))[part::PARTS]
    examples = 1 if mode.endswith("segments") else 2
    with segmented(GRAIN) if mode.endswith("segments") else contextlib.nullcontext():
        tried = check(of, name, (drawn(name, row, (), i) for row in chosen for i in range(examples)))
    assert tried or not chosen
