"""The conformance suite on interpreted kernels; run as a program, with TRITON_INTERPRET=1.

    python tests/triton/interpreted.py (whole | cut | upright) SHARE PROPERTY...

whole: as the library would launch them here. cut: small blocks and short segments, which small sizes fill.
upright: the same, with states upright, as only narrow types on a GPU have them.
SHARE: 1 tries every combination of options, 2 every second one, and so on; each mode others.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from linattn import testing
from linattn.backends.triton import TritonBackend
from tests.triton.drawing import check, drawn, rows, segmented

LENGTHS = {
    "whole": (1, 17, 33, 50, 70), "cut": (0, 5, 16, 33, 40, 70), "upright": (0, 5, 16, 33, 40, 70),
}  # fmt: skip


class Interpreted(testing.BackendSubject):
    """The backend on CPU tensors, in the dtypes that the interpreter computes rightly."""

    def __init__(self, mode: str = "whole") -> None:
        super().__init__(TritonBackend(interpreted=True), "torch", "cpu")
        self.mode, self.reach = mode, max(LENGTHS[mode])

    def axes(self) -> dict[str, tuple[Any, ...]]:
        return {"dtype": ("float32", "float16")}

    def adapt(self, case: testing.Case) -> testing.Case:
        """Without a scale in float16: do * scale is rounded to it, which the bound allows a GPU only."""
        return case.replace(scale=1.0) if case.dtype == "float16" else case

    def expression(self) -> tuple[str, str]:
        return "; from tests.triton.interpreted import Interpreted", f"Interpreted({self.mode!r})"


def run(mode: str, share: int, names: list[str]) -> None:
    """Assert properties, each on one case for every row of options that is tried."""
    of = Interpreted(mode)
    short = segmented(32, 16, across=mode == "cut")
    with contextlib.nullcontext() if mode == "whole" else short:
        for name in names:
            began = time.perf_counter()
            chosen = rows(of, name)[list(LENGTHS).index(mode) % share :: share]
            cases = (drawn(name, row, LENGTHS[mode]) for row in chosen)
            assert check(of, name, cases), f"{name} is never offered"
            print(f"{name} {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3:] or list(testing.PROPERTIES))
