"""The decode kernel: in Triton's interpreter, compiled for GPUs that need not be here, and its launches."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.triton.programs import interpret

CHECKS = ("conformance", "sizes", "not_finite", "padding", "constants", "many_steps")


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: str) -> None:
    interpret("interpreted_decode.py", check)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("angles", "normalize"), [(0, False), (1, True), (2, False), (2, True)])
def test_compiles_with_wide_loads(capability: int, dtype: str, angles: int, normalize: bool) -> None:
    compiled = built(capability, dtype, angles, normalize, 128, 128)
    assert "ld.global.v4" in compiled.asm["ptx"]
    assert "st.global.v4" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]


def test_a_chained_step_asks_for_its_state_and_then_waits() -> None:
    wait = "griddepcontrol.wait"
    for angles in (0, 2):
        ptx = built(90, "bf16", angles, False, 128, 128, chained=True).asm["ptx"]
        before, after = ptx.split(wait)
        assert (
            before.count("ld.global.v4") >= 1 + (angles > 0) and "griddepcontrol.launch_dependents" in before
        )
        assert "ld.global.v4" not in after and ".b16" in after.split("ld.global")[1], "q, k and v come after"
        assert "st.global" not in before
    assert wait not in built(90, "bf16", 2, False, 128, 128).asm["ptx"]


def built(
    capability: int, dtype: str, angles: int, normalize: bool, d: int, e: int, *, chained: bool = False
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from linattn.backends.triton import decode as module

    x = module.shape(8192, d, e, angles > 0, normalize)
    names = module.decode.arg_names
    constants = {
        "BLOCK_D": x.block_d, "BLOCK_E": x.block_e, "STEPS": x.steps, "FEATURE": "silu", "ANGLES": angles,
        "DECAY": True, "NORMALIZE": normalize, "SLOTS": not chained, "kv_e": 1,
        "CHAINED": chained,
    }  # fmt: skip
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), f"*{dtype}")
    pointers |= {"slots_ptr": "*i64", "length_ptr": "*i64"}
    floats = {"cos", "cos_low", "sin", "sin_low", "scale", "eps"}
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        kind = "*fp32" if name.endswith("_ptr") else "fp32" if name in floats else "i32"
        signature[name] = "constexpr" if name in constants else pointers.get(name, kind)
        if name in ("kv_ptr", "kv_s", "kv_h", "kv_f", "D", "E"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=module.decode, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": x.warps, "num_stages": 1} | ({"launch_pdl": True} if chained else {})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("heads", [1, 32, 257, 8192, 1 << 20])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_launches_cover_every_value_once(heads: int, turned: bool, normalize: bool) -> None:
    from linattn.backends.triton.decode import shape

    for d in (1, 3, 16, 64, 100, 128, 256):
        for e in (1, 5, 32, 64, 128, 200, 256):
            x = shape(heads, d, e, turned, normalize)
            assert x.block_d >= d
            assert (x.slices - 1) * x.steps * x.block_e < e <= x.slices * x.steps * x.block_e
            assert x.slices == 1 or not normalize
            # threads never outnumber the state's numbers: each is read and written by one of them
            features = x.block_d * (2 if turned else 1)
            assert x.warps == 1 or x.block_d * x.block_e >= 32 * x.warps, (features, x)
