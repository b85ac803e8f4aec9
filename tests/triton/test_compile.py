"""Every kind of launch compiles for GPUs that need not be here; hot kernels keep to their registers."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

from linattn.backends.triton import plan
from tests.triton.launches import Launch, compiled, kept, launches, spilled

SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have; Triton finds out at its start."""

LONG = {"b": 1, "h": 8, "n": 1 << 17}  # few heads: sequences are cut into segments

# every flag and dtype meets most others somewhere, at sizes that compile fast
USUAL: dict[str, dict[str, Any]] = {
    "bf16, per head": {"decay": "head", "d": 16, "e": 16, "state": True},
    "fp16, per token, in segments": {"dtype": "float16", "decay": "token", "d": 20, "e": 33, **LONG},
    "fp32, lrpe, masked, in segments": {
        "dtype": "float32", "decay": "head", "reweight": "lrpe", "feature_map": "silu", "d": 16, "e": 5,
        "key_mask": True, "state": True, **LONG,
    },
    "bf16, cosine, normalized, padded": {
        "reweight": "cosine", "feature_map": "relu", "normalize": True, "d": 32, "e": 32, "lengths": True,
        "state": True,
    },
    "fp32, cosine, normalized, both ways, crossing": {
        "dtype": "float32", "reweight": "cosine", "feature_map": "relu", "normalize": True, "d": 8, "e": 16,
        "causal": False, "m": 100, "key_mask": True,
    },
    "bf16, lrpe, normalized, per token, packed": {
        "decay": "token", "reweight": "lrpe", "feature_map": "elu+1", "normalize": True, "d": 17, "e": 3,
        "b": 1, "n": 1 << 14, "cu_seqlens": True, "state": True,
    },
    "fp16, both ways, per head, normalized": {
        "dtype": "float16", "decay": "head", "normalize": True, "feature_map": "elu+1", "causal": False,
        "d": 16, "e": 16,
    },
    "tf32": {"dtype": "float32", "precision": "tf32", "decay": "head", "d": 32, "e": 32},
}  # fmt: skip

# as people have them: bf16, whole heads, the blocks that are shipped
FULL: dict[str, dict[str, Any]] = {
    f"{dtype} {d} {name}": {"b": 4, "h": 32, "n": 8192, "d": d, "e": d, "dtype": dtype, **options}
    for dtype in ("bfloat16", "float16", "float32")
    for d in (64, 128, 256)
    for name, options in {
        "lightning": {"decay": "head"},
        "gla": {"decay": "token"},
        "lrpe": {"decay": "head", "reweight": "lrpe", "feature_map": "silu", "state": True},
        "cosformer": {"reweight": "cosine", "feature_map": "relu", "normalize": True},
        "cosformer, both ways": {
            "reweight": "cosine",
            "feature_map": "relu",
            "normalize": True,
            "causal": False,
        },
        "elu": {"feature_map": "elu+1", "normalize": True, "state": True},
        "both ways": {"decay": "head", "causal": False},
        "both ways, normalized": {
            "decay": "head",
            "causal": False,
            "feature_map": "elu+1",
            "normalize": True,
        },
    }.items()
}


OLD = ("bf16, per head", "fp32, lrpe, masked, in segments")
LATER = [pytest.param(80, name, marks=pytest.mark.slow) for name in USUAL if name not in OLD]


@pytest.mark.parametrize(
    ("capability", "name"), [(90, name) for name in USUAL] + [(80, name) for name in OLD] + LATER
)
def test_compiles(capability: int, name: str) -> None:
    for one in launches(**USUAL[name]):
        assert compiled(one, capability).metadata.shared <= SHARED[capability], one


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", FULL)
def test_compiles_at_full_size(capability: int, name: str) -> None:
    for one in launches(**FULL[name]):
        assert compiled(one, capability).metadata.shared <= SHARED[capability], one


def test_outputs_in_float32_leave_room() -> None:
    for one in launches(**FULL["bfloat16 128 both ways, normalized"]):
        assert compiled(one, 90).metadata.shared <= SHARED[90], one


def test_a_configuration_fits_what_it_is_used_for() -> None:
    upright, wide = plan.Blocks(128, 64, 8, 3, across=False), plan.Blocks(64, 128, 8, 3)
    assert plan.fitting(upright, False, False) == upright
    assert plan.fitting(wide, True, False) == wide
    assert plan.fitting(upright, True, False) == plan.Blocks(64, 64, 4, 3)
    assert plan.fitting(upright, False, True).stages == plan.fitting(wide, True, True).stages == 2
    assert plan.fitting(plan.Blocks(64, 16, 4, 3, across=False), False, True) == plan.Blocks(64, 16, 4, 3)


@pytest.mark.parametrize(
    ("length", "count"),
    [(256, 1), (383, 1), (384, 3), (500, 4), (1000, 8), (2048, 8), (4095, 16), (1 << 17, 16)],
)
def test_few_heads_are_cut_as_far_as_states_cost_less(length: int, count: int) -> None:
    few, many, hopper = 8 * 8, 128 * 8, 132  # warps of 8 and of 128 heads, multiprocessors
    found, size = plan.segments(few, length, hopper, 3)
    assert found == count
    assert (found - 1) * size < length <= found * size
    assert found == 1 or size % plan.GRAIN == 0
    assert plan.segments(many, length, hopper, 3) == (1, length)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "sizes",
    [{"b": 4, "h": 32, "n": 8192}, {"b": 1, "h": 32, "n": 8192}, LONG],
    ids=["whole", "added up", "in segments"],
)
def test_the_hot_kernels_spill_nothing(d: int, sizes: dict[str, int]) -> None:
    found = launches(d=d, e=d, decay="head", gradients=False, **sizes)
    assert found
    for one in found:
        binary = compiled(one, 90)
        assert spilled(binary) == 0, one
        if one.kernel.__name__ == "product":
            assert "wgmma" in binary.asm["ptx"], one


def test_lrpe_spills_little() -> None:
    """Its state is half of all registers; the code that reads and writes states would take the others."""
    for one in launches(decay="head", reweight="lrpe", gradients=False, b=4, h=32, n=8192, d=128, e=128):
        assert spilled(compiled(one, 90)) <= 64, one


def branches(text: str) -> list[tuple[str, str]]:
    """Each `scf.if` inside a kernel's loop: its indentation, and what stands in it, either way."""
    loop = text[text.index("scf.for") :]
    return re.findall(r"^( *)%?[^\n]*scf\.if [^\n]*\n(.*?)^\1\}", loop, re.M | re.S)


@pytest.mark.parametrize(
    ("kind", "d", "there"), [("lrpe", 128, True), ("lightning", 128, False), ("lightning", 256, False)]
)
def test_no_branch_multiplies_what_loads_overwrite(kind: str, d: int, there: bool) -> None:
    """Loads for later blocks are started before a branch has run: its operands must be copies."""
    found = 0
    for one in launches(**FULL[f"bfloat16 {d} {kind}"]):
        if one.kernel.__name__ == "product":
            for _, body in branches(compiled(one, 90).asm["ttgir"]):
                products = [line for line in body.splitlines() if "dot " in line]
                found += len(products)
                assert not [line for line in products if "mutable" in line], (one, products)
    assert (found > 0) == there


def test_usual_calls_share_their_kernels() -> None:
    """Lengths and numbers of sequences are arguments: serving compiles nothing anew."""

    def variants(b: int, n: int) -> set[Launch]:
        found = launches(b, 32, n, 128, 128, decay="head", gradients=False)
        return {Launch(one.kernel, (), one.constants, (), one.options) for one in found}

    assert len(set().union(*(variants(b, n) for b in (4, 8, 16) for n in (512, 1000, 1024, 3001)))) == 1


def test_a_kernel_is_kept_for_arguments_of_one_type() -> None:
    """What a kernel's key leaves out cannot change what it is compiled for: a state that is there, or not."""
    compiled_for: dict[Any, tuple[Any, ...]] = {}
    for options in USUAL.values():
        for state in (False, options.get("causal", True)):
            for one, keys in kept(**options | {"state": state}).items():
                # sizes are not compiled in, and the width of one does not decide about another kernel
                types = tuple(kind for _, kind in one.signature if kind.startswith("*"))
                for key in keys:
                    assert compiled_for.setdefault(key, types) == types, (one, key)
