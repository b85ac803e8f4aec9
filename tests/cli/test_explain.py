"""`linattn explain` decides as the library does, without arrays."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import linattn
from linattn import cli
from linattn.cli.explain import describe


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["explain", *arguments])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": "head", "state": True},
        {"decay": "token", "feature_map": "silu", "normalize": True},
        {"causal": False, "keys": 7, "reweight": "cosine"},
    ],
)
def test_the_description_is_the_problem_of_the_call(options):
    shape = (2, 5, 3, 4)
    got = describe(shape, kind="numpy", dtype="float64", value_dim=6, **options)
    q, k = np.zeros(shape), np.zeros((2, got.m, 3, 4))
    v = np.zeros((2, got.m, 3, 6))
    decays = {None: None, "head": np.zeros(3), "token": np.zeros((2, 5, 3))}
    state = linattn.State(np.zeros((2, 3, 4, 6)), None, np.zeros(2, np.int64)) if got.initial_state else None
    decision = linattn.explain(
        q,
        k,
        v,
        log_decay=decays[got.decay],
        reweight=linattn.Cosine() if got.reweight else None,
        feature_map=got.feature_map,
        normalize=got.normalize,
        causal=got.causal,
        initial_state=state,
        return_state=got.return_state,
    )
    assert decision.problem == got


def test_it_says_who_runs_and_why_the_others_do_not():
    text = invoke("--array", "numpy").stdout
    assert re.search(r"^ *numpy +runs$", text, re.M)
    assert re.search(r"^ *reference +could run, but ", text, re.M)
    assert re.search(r"^ *torch +takes torch arrays, got numpy$", text, re.M)


def test_as_json_with_named_backends_in_their_order():
    answer = json.loads(
        invoke("--array", "numpy", "--backend", "torch", "--backend", "reference", "--json").stdout
    )
    assert answer["chosen"] == "reference"
    assert list(answer["backends"].items()) == [
        ("torch", "takes torch arrays, got numpy"),
        ("reference", None),
    ]


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_nobody_runs_on_a_device_that_is_not_here(device, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    answer = json.loads(invoke("--device", device, "--json").stdout)
    assert answer["chosen"] is None
    assert answer["backends"]["torch"] == "would run, but no CUDA device is here"
    assert re.search(r"^ *torch +would run, but", invoke("--device", device).stdout, re.M)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--shape", "4,8"), "--shape must be four sizes B,N,H,D, such as 4,8192,32,128; got '4,8'"),
        (("--keys", "7"), "a causal call has as many keys as queries, got 1024 queries and 7 keys"),
        (
            ("--not-causal", "--decay", "token"),
            "per-token decay and states are causal: leave out --not-causal",
        ),
        (
            ("--state", "--reweight", "cosine"),
            "cosine reweighting with a state needs a fixed length: give --max-len",
        ),
        (("--array", "numpy", "--device", "cuda"), "NumPy arrays live on the cpu, not on 'cuda'"),
        (("--backend", "nope"), "no backend named 'nope'"),
    ],
)
def test_what_the_call_would_refuse_is_refused(arguments, sentence):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {sentence}")


@pytest.fixture
def shipped():
    """Nothing that was tuned for a GPU, which need not be here."""
    from linattn.backends.triton import tuned

    tuned.use(None)
    yield
    tuned.use_default()


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((4, 8192, 32, 128), {"decay": "head"}, {"passes": "one launch", "least bytes": "1073.7 MB"}),
        (
            (1, 131072, 8, 128),
            {"decay": "head"},
            {
                "passes": "16 segments of 8192 tokens: their states, carried through, then outputs",
                "programs": "128 on 132 multiprocessors",
            },
        ),
        ((1, 8192, 32, 128), {}, {"passes": "4 segments of 2048 tokens: their states, then outputs"}),
        (
            (1, 8192, 32, 128),
            {"state": True},
            {"passes": "4 segments of 2048 tokens: their states, ca"},
        ),
        ((1, 8192, 32, 128), {"decay": "token"}, {"passes": "4 segments of 2048 tokens: their states, c"}),
        ((8, 4096, 16, 64), {}, {"blocks": "128 tokens, 64 values, upright"}),
        ((8, 4096, 16, 64), {"normalize": True}, {"blocks": "64 tokens, 64 values, across"}),
        ((1, 100, 2, 16), {"causal": False}, {"passes": "segments of keys into one state"}),
        ((1, 100, 2, 16), {"causal": False, "decay": "head"}, {"passes": "one launch in each direction"}),
    ],
)
def test_it_says_what_a_forward_pass_would_be(shipped, shape, options, expected):
    from linattn.backends.triton.plan import described

    found = described(describe(shape, kind="torch", device="cuda", dtype="bfloat16", **options), 132)
    for name, beginning in expected.items():
        assert found[name].startswith(beginning), found


@pytest.fixture
def no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


GPU = ("--shape", "4,8192,32,128", "--dtype", "bf16", "--device", "cuda", "--decay", "head")


def test_without_a_gpu_the_plan_is_that_of_a_card_that_is_named(shipped, no_gpu):
    from linattn.backends.triton.plan import described

    text = invoke(*GPU).stdout
    assert "no CUDA device is here; on one NVIDIA H200, triton would run a forward pass" in text
    answer = json.loads(invoke(*GPU, "--json").stdout)
    problem = describe((4, 8192, 32, 128), kind="torch", device="cuda", dtype="bfloat16", decay="head")
    floor = answer["plan"].pop("floor")
    assert (answer["assumed"], answer["plan"]) == ("NVIDIA H200", described(problem, 132))
    moved = float(answer["plan"]["least bytes"].split()[0]) / 1e3  # GB
    rate = int(re.search(r"at (\d+) GB/s", floor)[1])
    assert floor.startswith(f"{moved / rate * 1e3:.3g} ms ")


def test_the_floor_is_by_a_copy_that_the_benchmarks_page_has():
    from pathlib import Path

    from linattn.cli import explain

    page = (Path(__file__).parent.parent.parent / "docs" / "benchmarks.md").read_text()
    measured = re.search(r"- GPU: ([\w ]+),.*?- copy bandwidth: (\d+) GB/s", page, re.S)
    (rate,) = (rate for card, rate in explain.COPIES.items() if measured[1].startswith(card))
    assert rate == int(measured[2])
    assert explain.ASSUMED[1] in explain.COPIES


@pytest.mark.parametrize(
    "options",
    [
        ("--device", "cpu"),
        ("--device", "cuda", "--dtype", "f64"),  # Triton's kernels have no float64
        ("--device", "cuda", "--array", "cupy"),
        ("--device", "cuda", "--backend", "torch", "--backend", "triton"),  # torch comes first
        ("--device", "cuda", "--backend", "torch"),
    ],
)
def test_nothing_is_planned_where_triton_would_not_run(shipped, no_gpu, options):
    answer = json.loads(invoke(*options, "--json").stdout)
    assert (answer["plan"], answer["assumed"]) == (None, None)


def test_on_a_gpu_the_plan_is_that_gpu_s(shipped, monkeypatch):
    import torch

    from linattn.backends.triton import backend
    from linattn.cli import explain

    class Card:
        name, multi_processor_count = "A Card", 10

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    problem = describe((1, 100, 2, 16), kind="torch", device="cuda", dtype="float32")
    decision = linattn.vjp.Explanation(problem, backend.name, {backend.name: None}, {})
    steps, card = explain.plan(problem, decision)
    assert card is None
    assert steps["programs"].endswith(" on 10 multiprocessors")
    assert steps["floor"].startswith("not known for this card")
