"""Few rows times weights: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch

from linattn.backends.triton import launcher, rows, rows_shape
from tests.triton.launches import compiled, recorded, spilled
from tests.triton.programs import interpret

WAIT = "griddepcontrol.wait"
# width, inner width of the channel mixer: the published sizes
SIZES = ((1024, 2816), (2048, 5632), (2560, 6912), (4096, 11008), (5120, 13824), (12288, 32768))


@pytest.mark.parametrize(
    "checks", [("formula", "parts", "not_finite", "layouts"), ("mutants",)], ids="-".join
)
def test_interpreted(checks: tuple[str, ...]) -> None:
    interpret("interpreted_rows.py", *checks)


def launched(b: int, n: int, k: int, two: bool, gated: bool, chained: bool, dtype: Any) -> Any:
    """What one call starts last."""

    def empty(*shape: int) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    with recorded() as seen, launcher.chain(chained):
        rows.products(
            empty(b, k), (empty(n, k),) * (2 if two else 1), eps=None if two else 1e-6,
            gate=empty(b, k) if gated else None, residual=None if two else empty(b, n),
        )  # fmt: skip
    found = list(seen)[-1]
    if found.flags["CHAINED"]:
        found = dataclasses.replace(found, options=(*found.options, ("launch_pdl", True)))
    return found


@pytest.mark.parametrize("width, inner", SIZES)
@pytest.mark.parametrize("b", [1, 4, 16, 64, 128])
def test_compiles_without_spills(width: int, inner: int, b: int) -> None:
    for n, k, two, gated in (
        (4 * width, width, False, False),
        (width, width, False, True),
        (inner, width, True, False),
        (width, inner, False, False),
    ):
        found = launched(b, n, k, two, gated, True, torch.bfloat16)
        binary = compiled(found, 90)
        assert spilled(binary) == 0 and binary.metadata.shared <= rows_shape.ROOM, found
        if found.flags.get("BLOCKS"):
            before, after = binary.asm["ptx"].split(WAIT)
            asked = found.flags["BLOCKS"] * (2 if two else 1)
            assert before.count("ld.global.v4") >= asked and "wgmma" not in before and "mma" in after
        if found.flags.get("BLOCK"):  # warps one above the other have 16 rows each, and none has none
            above = re.findall(r"versionMajor = 3.*warpsPerCTA = \[(\d+)", binary.asm["ttgir"])
            assert all(16 * int(warps) <= found.flags["BATCH"] for warps in above), found
        if found.kernel.__name__ == "few":
            before, after = binary.asm["ptx"].split(WAIT)
            # all weights are asked for before the wait, and nothing is done with them there
            asked = found.flags["PIECES"] * (2 if two else 1)
            assert before.count("ld.global.v4") >= asked and "shl.b32" not in before.split("ld.global")[-1]
            assert "ld.global.v4" in after and "ld.global" in after
            assert "launch_dependents" in before.split("ld.global")[0]


@pytest.mark.parametrize("room", [48 << 10, 99 << 10, 163 << 10])
def test_programs_hold_what_smaller_gpus_have(room: int) -> None:
    """Stages, and what is asked for at once, by the device's own limit."""
    for b, (width, inner) in itertools.product((5, 64, 128), SIZES):
        height = max(16, b)
        for n, k, two, gated in ((width, width, False, True), (inner, width, True, False)):
            found = rows_shape.shape(b, n, k, two, gated, room)
            read = height * (2 if gated and not found.blocks else 1) + found.rows * (2 if two else 1)
            smallest = not found.blocks and found.stages == 1
            assert smallest or 2 * found.block * read * (found.blocks or found.stages) <= room, (b, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiles_for_older_gpus(dtype: Any) -> None:
    for b, two in ((1, False), (4, True), (64, False)):
        binary = compiled(launched(b, 100, 272, two, False, False, dtype), 80)
        assert WAIT not in binary.asm["ptx"] and spilled(binary) == 0


def test_what_fits() -> None:
    def empty(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.empty(shape, dtype=dtype)

    w = empty(8, 32)
    assert rows.fits(empty(1, 32), w) and rows.fits(empty(rows.MANY, 32), w, empty(4, 16))
    assert not rows.fits(empty(rows.MANY + 1, 32), w) and not rows.fits(empty(0, 32), w)
    assert not rows.fits(empty(1, 32, dtype=torch.float32), empty(8, 32, dtype=torch.float32))
    odd = empty(8 * 32 + 1)[1:].view(8, 32)
    packed = w.as_subclass(Packed)  # what quantized weights are
    others = w.half(), w[0], w.to_sparse(), torch._neg_view(w)
    for wrong in (empty(8, 40)[:, :32], empty(8, 24), empty(32, 8).T, odd, packed, *others):
        assert not rows.fits(empty(1, 32), wrong)


class Packed(torch.Tensor):
    """A tensor whose memory holds something else."""
