"""What a worker does with configurations: compile without running, compare with what is right."""

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from linattn.backends.triton import trial  # noqa: E402
from linattn.backends.triton.search import Sample  # noqa: E402

SAMPLE = Sample(2, 3, 40, 16, 16, "bfloat16")


def results() -> dict[str, "torch.Tensor"]:
    random = torch.Generator().manual_seed(0)
    return {"o": torch.randn(2, 40, 3, 16, generator=random).bfloat16(), "dtheta": torch.ones(3, 16)}


def test_rounding_is_no_fault():
    right = results()
    found = {"o": right["o"] * (1 + 2**-8), "dtheta": right["dtheta"] * 1.1}
    assert trial.fault(found, right, SAMPLE) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_number_that_is_none_is_a_fault(value):
    found = results()
    found["o"][1, 39, 2, 15] = value
    assert trial.fault(found, results(), SAMPLE) == "o is not finite"


def test_one_dead_row_is_a_fault_however_many_are_right():
    found = results()
    found["o"][1, 39, 2] = 0
    assert trial.fault(found, results(), SAMPLE).startswith("o is off by ")


def test_sums_that_are_missing_are_a_fault():
    assert trial.fault({**results(), "dtheta": torch.zeros(3, 16)}, results(), SAMPLE)


def test_a_kernel_is_compiled_from_what_a_call_would_have_launched(monkeypatch):
    kernel = trial.product
    compiled = []
    monkeypatch.setattr(kernel, "warmup", lambda *args, **options: compiled.append((args, options)))
    x = torch.zeros(3)

    def call():
        kernel[(2,)](x, 5, C=32, num_warps=4)
        kernel[(2,)](x, 5, C=32, num_warps=4)
        kernel[(2,)](x, 5, C=64, num_warps=4)
        return {}

    jobs = trial.launches([call])
    assert len(jobs) == 2
    for job in jobs:
        job()
    (args, options), other = compiled
    assert (args[0].dtype, args[1:], options["C"], other[1]["C"]) == (torch.float32, (5,), 32, 64)
    assert kernel.run.__name__ == "run"


def test_what_is_not_written_is_seen():
    with trial.poisoned():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_worker_is_told_what_a_target_is():
    import json
    from dataclasses import asdict

    from linattn.backends.triton.search import targets

    for target in targets(["lrpe 64", "cosformer 64", "backward 128"], "float16"):
        assert trial.target_of(json.loads(json.dumps(asdict(target)))) == target
