"""`linattn bench --models`: small models on the processor, rows that fail, what is said of rows."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import linattn
from linattn import tolerance
from linattn.bench import claims, systems, systems_rows
from linattn.bench.picture import dark
from linattn.bench.systems import LLAMA, OURS, PATCHED, Row, Task, verdicts
from linattn.bench.systems_rows import SHARES
from linattn.cli import app
from linattn.cli.bench_models import COLUMNS, MARKS, cells
from linattn.models.huggingface.newer import CHECKPOINTS
from linattn.models.transnormer import TransNormerForCausalLM, preset

GIB = 2**30
CPU = torch.device("cpu")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has …")
READ = {"weights": 800_000_000, "bytes": 800_000_000}
ROWS = [
    Row("training", OURS, 4, 8192, 0.2, 30 * GIB),
    Row("training", LLAMA, 4, 8192, 0.35, 40 * GIB),
    Row("training", OURS, 1, 32768, 0.2, 30 * GIB),
    Row("training", LLAMA, 1, 32768, 0.65, 40 * GIB),
    Row("training", OURS, 1, 131072, 0.82),
    Row("decoding", OURS, 1, 1024, 0.0002, **READ),
    Row("decoding", OURS, 1, 131072, 0.000202, **READ),
    Row("decoding", OURS, 64, 1024, 0.00024, **READ),
    Row("layer", PATCHED, 1, 65536, 0.0215),
]
WORSE = {
    0: {"seconds": 0.24, "peak": 41 * GIB},  # then 131072 is above 95 % of it
    2: {"seconds": 0.22},
    4: {"seconds": 0.85},
    6: {"seconds": 0.00021},
    7: {"seconds": 0.0003},
    8: {"seconds": 0.023},
}
BANDWIDTH = 4.2e12


def changed(index, **fields):
    return [replace(row, **fields) if at == index else row for at, row in enumerate(ROWS)]


def test_what_is_required_is_judged():
    found = verdicts(ROWS, BANDWIDTH)
    assert all(one.met for one in found) and len(found) == 10
    assert len(verdicts(ROWS)) == 6  # without a bandwidth nothing is said of moving bytes
    assert verdicts([], BANDWIDTH) == []
    missed = {0: 2, 2: 1, 4: 1, 6: 1, 7: 2, 8: 1}
    for index, change in WORSE.items():
        assert sum(not one.met for one in verdicts(changed(index, **change), BANDWIDTH)) == missed[index], (
            index
        )
    assert ROWS[0].rate == pytest.approx(163840) and ROWS[7].rate == pytest.approx(64 / 0.00024)
    assert ROWS[8].rate == pytest.approx(65536 / 0.0215)


def test_a_token_is_judged_by_the_weights_and_by_all_it_moves():
    rows = changed(7, seconds=0.0007, bytes=2_400_000_000)
    said = {one.required: one for one in verdicts(rows, BANDWIDTH) if one.required.startswith("batch 64")}
    literal, whole = said.values()
    assert (
        "reading the weights" in literal.required and literal.met is False and literal.found == "3.67 times"
    )
    assert "states in and out" in whole.required and whole.met is True and whole.found == "1.23 times"


def test_rows_that_failed_are_judged_as_such():
    words = "out of memory"
    ours = verdicts(changed(2, seconds=None, failed=words), BANDWIDTH)
    assert [one.found for one in ours if one.met is False] == [f"{OURS}: {words}"]
    peers = verdicts(changed(3, seconds=None, failed=words), BANDWIDTH)
    assert [one.found for one in peers if one.met is None] == [f"{LLAMA}: {words}"]
    assert len(ours) == len(peers) == 10 and all(one.met is not False for one in peers)
    short = SHARES[-1][1]
    noted = verdicts(changed(4, note=short))
    assert [one.found for one in noted if "checkpointed" in one.found] == [f"97.6 % ({OURS}: {short})"]


def test_one_failure_does_not_end_the_others():
    seen = []

    def task(who, found):
        def run():
            seen.append(("runs", who))
            if isinstance(found, BaseException):
                raise found
            return found

        return Task(Row("training", who, 2, 3), run)

    given = {"a": MEMORY, "b": RuntimeError("two\nlines"), "c": {"seconds": 2.0, "note": "good"}}
    rows = []
    tasks = (task(*one) for one in given.items())
    for row in systems.measure(tasks, CPU, lambda row: seen.append(("begins", row.who))):
        seen.append(("ends", row.who))
        rows.append(row)
    assert seen == [(what, who) for who in "abc" for what in ("begins", "runs", "ends")]
    assert [row.failed for row in rows] == ["out of memory", "RuntimeError: two", ""]
    assert [row.rate for row in rows] == [None, None, 3.0] and rows[2].note == "good"
    assert systems.as_json(rows)[0]["tokens_per_second"] is None
    assert dict(zip(COLUMNS, cells(rows[0]), strict=True))["remark"] == "out of memory"
    with pytest.raises(KeyboardInterrupt):
        list(systems.measure([task("d", KeyboardInterrupt())], CPU))


def small(**fields):
    """A model of the size that --quick measures."""
    ours, *_ = systems_rows.sized(quick=True)
    return TransNormerForCausalLM(preset("385m", **{**ours, **fields}))


def test_activations_are_formed_twice_only_where_memory_is_short(monkeypatch):
    made = []

    def make():
        made.append(small(decoder_layers=8, linear_use_lrpe_list=[1] + [0] * 7))
        return made[-1]

    assert systems_rows.training(make, 1, 8)["note"] == ""
    assert len(made) == 1 and not getattr(made[0], CHECKPOINTS)
    plain, room = TransNormerForCausalLM.forward, [7]

    def forward(self, *arguments, **options):
        if sum(not layer.gradient_checkpointing for layer in self.model.layers) > room[0]:
            raise MEMORY
        return plain(self, *arguments, **options)

    monkeypatch.setattr(TransNormerForCausalLM, "forward", forward)
    for fits, tried in ((7, 2), (6, 3), (0, 4)):  # of eight layers, keep their activations
        made.clear()
        room[0] = fits
        found = systems_rows.training(make, 1, 8)
        assert len(made) == tried
        assert found["note"] == SHARES[tried - 1][1] and found["seconds"] > 0
    room[0] = -1
    with pytest.raises(torch.OutOfMemoryError):
        systems_rows.training(make, 1, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_that_a_token_moves(tied):
    model = small(tie_word_embeddings=tied).eval()
    found = systems_rows.decoding(model, 3, 5)
    weights = sum(x.numel() for name, x in model.named_parameters() if "embed" not in name)
    # the embedding is read whole as the head, or a row for each of three tokens of it
    weights += 64 * (model.config.vocab_size if tied else 3)
    states = 3 * sum(layer.token_mixer.initial_state(1).kv.numel() for layer in model.model.layers)
    assert found["weights"] == 4 * weights and found["bytes"] == 4 * (weights + 2 * states)


def test_the_plain_sum_is_the_same_sum():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, 2, 4)) for _ in range(3))
    log_decay = np.array([-0.7, -0.01])
    weights = claims.decays(torch.from_numpy(log_decay), 9, torch.float64)
    heads_first = (torch.from_numpy(x.swapaxes(1, 2)) for x in (q, k, v))
    found = claims.quadratic(*heads_first, weights).numpy().swapaxes(1, 2)
    exact = linattn.lightning_attention(q, k, v, log_decay, backend="reference")
    allowed = tolerance.bound(q, k, v, rounding=tolerance.Rounding("float64"), log_decay=log_decay).o
    assert (abs(found - exact) <= allowed).all()


def test_claims_are_judged():
    rows = [
        Row(what, who, 1, n, seconds, peak)
        for what, n in (
            *itertools.product((claims.FORWARD, claims.BOTH), claims.LENGTHS),
            (claims.GRAPH, 2048),
        )
        for who, seconds, peak in ((claims.LIGHTNING, 0.01, GIB), (claims.QUADRATIC, 0.02, 4 * GIB))
    ]
    rows += [Row("training", OURS, 4, 8192, 1.0), Row("training", claims.PLAIN, 4, 8192, 1.2)]
    found = claims.verdicts(rows)
    assert len(found) == 12 and all(one.met for one in found), found
    slower = [
        replace(row, seconds=row.seconds * (1.01 if row.who == claims.LIGHTNING else 1)) for row in rows
    ]
    assert sum(not one.met for one in claims.verdicts(slower)) == 7
    larger = [replace(row, peak=row.peak and row.peak + (row.who == claims.LIGHTNING)) for row in rows]
    assert sum(not one.met for one in claims.verdicts(larger)) == 4
    assert claims.verdicts([replace(row, seconds=1.0) for row in rows])[-1].met is False
    short = [
        replace(row, seconds=None, failed="out of memory")
        if (row.who, row.n) == (claims.QUADRATIC, 16384)
        else row
        for row in rows
    ]
    assert sum(one.met is None for one in claims.verdicts(short)) == 4


def test_small_models_on_the_processor(tmp_path, monkeypatch):
    plain = LlamaForCausalLM.forward

    def forward(self, input_ids, **options):
        if input_ids.shape[1] == 128:
            raise MEMORY
        return plain(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    page, data, picture = (tmp_path / name for name in ("page.md", "data.json", "picture.png"))
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    found = CliRunner().invoke(
        app,
        ["bench", "--models", "--quick", "--json"]
        + [word for path in (page, data, picture) for word in ("--out", str(path))],
    )
    assert found.exit_code == 0, found.output
    fields = json.loads(found.stdout)
    rows = fields["rows"]
    assert fields == json.loads(data.read_text()) and fields["verdicts"] == []
    assert {row["what"].partition(",")[0] for row in rows} == {
        "training", "decoding", "generating", "layer", "attention", "norm", "norm and gate"
    } and len(rows) == 35  # fmt: skip
    assert [(row["who"], row["n"], row["failed"]) for row in rows if row["failed"]] == [
        (LLAMA, 128, "out of memory")
    ]
    measured = [row for row in rows if not row["failed"]]
    # generated tokens are a difference of two times, which a busy machine turns around
    assert all(row["seconds"] > 0 or row["what"] == "generating" for row in measured)
    assert {row["claim"] for row in rows} == {"", claims.SPEED, claims.NORM}
    said = found.stderr.splitlines()
    begins = [line for line in said if line.endswith(": begins")]
    assert len(begins) == len(rows) and said[0] == begins[0]
    assert f"training, {LLAMA}, 1 x 128: out of memory" in said
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "](picture.png)\n" in text
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (picture, dark(picture)))
    assert f"| {PATCHED} |" in text and "| out of memory |" in text


def test_some_kinds_alone():
    asked = ["bench", "--models", "--quick", "--json", "--case", "norm", "--case", "decoding"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    fields = json.loads(found.stdout)
    assert {row["what"] for row in fields["rows"]} == {
        "decoding", "norm, forward + backward", "norm and gate, forward + backward"
    }  # fmt: skip
    assert fields["facts"]["command"] == "linattn bench --models --quick --case norm --case decoding"


def test_what_cannot_be_written_is_refused(tmp_path):
    for name, words in (("x.txt", ".json, .md or .png"), ("none/x.json", "there is no folder")):
        refused = CliRunner().invoke(app, ["bench", "--models", "--quick", "--out", str(tmp_path / name)])
        assert refused.exit_code == 2 and words in refused.output.replace("\n", " ")
