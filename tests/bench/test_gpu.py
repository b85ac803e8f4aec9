"""The bench of a GPU with a clock that is made up: cases, peers, judgements, what it prints and writes."""

import json
import math
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

import linattn
from linattn.bench import gpu_machine, gpu_peers, gpu_report, report
from linattn.bench.gpu_cases import ALL, HOST, MEMORY, GpuCase, chosen, curves
from linattn.bench.gpu_measure import check_device, failures
from linattn.bench.gpu_results import BYTES, MICROSECONDS, MOST_ERROR, Cost, Entry, GpuResults, GpuRow, Timing
from linattn.bench.gpu_runner import OURS, Bench
from linattn.bench.gpu_work import exact, make, part, relative_error, work
from linattn.errors import LinattnError, OptionError
from tests.bench.clock import SMALL, Clock


def fla_of(attention):
    """Modules with the signatures of fla's functions that are called, computed by an attention of ours."""

    def chunk_simple_gla(q, k, v, *, g_gamma, scale):
        return attention(q, k, v, log_decay=g_gamma, scale=scale, backend="torch"), None

    def chunk_linear_attn(q, k, v, *, scale, normalize):
        return attention(q, k, v, scale=scale, normalize=normalize, backend="torch"), None

    def fused_recurrent_simple_gla(q, k, v, *, g_gamma, scale, initial_state, output_final_state):
        assert output_final_state
        start = linattn.State(initial_state, None, torch.zeros(len(q), dtype=torch.int64), d=q.shape[-1])
        keywords = {"log_decay": g_gamma, "scale": scale, "initial_state": start, "return_state": True}
        o, state = attention(q, k, v, **keywords, backend="torch")
        return o, state.kv

    simple, linear = types.ModuleType("fla.ops.simple_gla"), types.ModuleType("fla.ops.linear_attn")
    simple.chunk_simple_gla = simple.fused_chunk_simple_gla = chunk_simple_gla
    simple.fused_recurrent_simple_gla = fused_recurrent_simple_gla
    linear.chunk_linear_attn = chunk_linear_attn
    packages = {name: types.ModuleType(name) for name in ("fla", "fla.ops")}
    return {**packages, "fla.ops.simple_gla": simple, "fla.ops.linear_attn": linear}


@pytest.fixture
def fla(monkeypatch):
    for name, module in fla_of(linattn.attention).items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(gpu_peers, "_compiled", lambda function: function)


def bench(ms=1.0, **keywords):
    return Bench(Clock(ms), device="cpu", backend="torch", **keywords)


def test_the_table_is_the_required_one():
    required = {case.name: case.required for case in ALL}
    assert len(required) == len(ALL) == 22 + 11
    assert required["forward 4 32 8192 128"] == 0.35
    assert required["forward-backward 1 8 131072 128"] == 2.6
    assert required["decode 128 64 128"] == 0.275
    assert required["forward 1 32 8192 128 cupy"] == 0.12
    assert required["forward 4 32 2048 64 float64 cupy"] == 0.52


def test_a_share_of_the_floor_is_required_on_any_card():
    case = GpuCase("decode", 128, 64, 1, 128, backend="cupy", share=0.94)
    for ms, met in ((1.06, True), (1.07, False)):
        assert GpuRow(case, 1.0, Entry("ours", Timing(ms))).met is met


def test_a_tiny_decode_step_is_judged_in_a_graph():
    case = GpuCase("decode", 1, 32, 1, 128, 0.005, "cupy", replayed=True)
    for replayed, met in ((0.004, True), (0.006, False), (None, False)):
        assert GpuRow(case, 0.001, Entry("ours", Timing(0.009, replayed=replayed))).met is met


def test_everybody_is_measured_as_often(fla, uncompiled):
    assert {case.medians for case in SMALL} == {3}
    assert GpuCase("forward", 4, 32, 8192, 128).medians == 1
    run = bench()
    found = run.row(SMALL[0], 1000.0)
    assert sum(entry.timing is not None for entry in (found.ours, *found.peers)) > 2
    assert set(run.meter.asked) == {3}


def test_floors_are_bytes_that_none_can_avoid():
    forward, both = (GpuCase(kind, 4, 32, 8192, 128) for kind in ("forward", "forward-backward"))
    assert forward.bytes == 4 * 4 * 32 * 8192 * 128 * 2
    assert both.bytes * 4 == forward.bytes * 11
    assert GpuCase("decode", 16, 32, 1, 128).bytes == 2 * 16 * 32 * 128 * 128 * 4
    assert bench().row(SMALL[0], 1000.0).floor == pytest.approx(SMALL[0].bytes / 1e9)


def test_cases_are_chosen_by_kind_or_shape_and_shrink():
    cases, extras = chosen()
    assert (tuple(cases), extras) == (ALL, [HOST, MEMORY])
    cases, extras = chosen(["decode", "forward-1-8-131072-128", "forward 8 16 4096 64"])
    assert [case.name for case in cases[:2]] == ["forward 1 8 131072 128", "forward 8 16 4096 64"]
    assert [case.kind for case in cases[2:]] == ["decode"] * 6
    assert extras == []
    assert chosen(["host"]) == ([], ["host"])
    assert {case.backend for case in chosen(["cupy"])[0]} == {"cupy"}
    small, _ = chosen(quick=True)
    assert all(case.required is None for case in small)
    assert max(case.n for case in small) == 131072 // 16
    assert max(case.b for case in small if case.kind == "decode") == 32
    with pytest.raises(OptionError, match=r"no case named 'decod' on a GPU; known: forward, .*memory"):
        chosen(["decod"])


def test_the_picture_takes_what_fits():
    assert [case.n for case in curves(10**12)[:7]] == [2**power for power in range(9, 16)]
    few = curves(16 * 10**9)
    assert 0 < len(few) < 14
    assert all(case.array * 33 <= 16 * 10**9 for case in few)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_ours_is_checked_against_float64(case):
    given = make(case, device="cpu")
    right = exact(case, given)
    outputs = work(case, given, "torch")()
    error = relative_error(part(case, outputs), right)
    assert 0 < error < MOST_ERROR
    wrong = tuple(x + 0.1 * x.float().norm() / math.sqrt(x.numel()) for x in outputs)
    assert relative_error(part(case, wrong), right) > MOST_ERROR
    broken = tuple(x * math.nan for x in outputs)
    assert not Timing(1.0, relative_error(part(case, broken), right)).right


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_peer_computes_the_same_function(case, fla, uncompiled):
    row = bench().row(case, 1000.0)
    assert [peer.name for peer in row.peers] == [peer.name for peer in gpu_peers.peers(case)]
    assert row.ours.timing.right
    for peer in row.peers:
        assert peer.timing is not None, peer.why
        assert (peer.timing.error is not None) == peer.same
        assert peer.timing.right, peer
    assert row.best.same
    assert (row.ours.timing.replayed == 0.5) == (case.kind == "decode")
    assert (row.other is None) == (case.kind == "decode")


def test_a_peer_that_fails_is_a_sentence(uncompiled, monkeypatch):
    for name in ("fla", "fla.ops", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, None)
    row = bench().row(SMALL[0], 1000.0)
    chunk = row.peers[0]
    assert (chunk.name, chunk.timing) == ("fla chunk", None)
    assert chunk.why.startswith("ModuleNotFoundError: ")
    assert row.ours.timing.right
    assert row.best is None
    assert row.other.timing is not None


def test_peers_are_left_out_or_stop_when_their_time_is_spent(fla):
    assert bench(peer_seconds=0).row(SMALL[0], 1000.0).peers == ()
    late = bench(spent=151.0).row(SMALL[0], 1000.0)
    assert {peer.why for peer in late.peers} == {"not begun: the peers' 150 s were spent (151 s)"}


def test_softmax_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(gpu_peers, "TRIED", 32)
    row = bench(ms=60.0).row(GpuCase("forward", 1, 2, 64, 16), 1000.0)
    assert row.other.why == "about 240 ms a call, not waited for"
    assert bench(ms=20.0).row(GpuCase("forward", 1, 2, 64, 16), 1000.0).other.timing.ms == 20.0


def test_what_cannot_run_fails_the_case_and_not_the_run():
    no_gpu = Bench(Clock(), device="cpu", backend="nonsense", peer_seconds=0)
    found = no_gpu.run(SMALL[:2], [HOST])
    assert [row.met for row in found.rows] == [False, False]
    assert "no backend named 'nonsense'" in found.rows[0].ours.why
    assert all("nonsense" in cost.why for cost in found.costs)
    assert gpu_report.verdict(found).startswith("0 of 4 requirements are met; not met: forward 2 4 70 16, ")


def test_a_run_from_end_to_end(fla, uncompiled, monkeypatch):
    monkeypatch.setattr("linattn.bench.gpu_runner.MEMORY_CASE", SMALL[3])
    told = []
    found = bench().run(
        SMALL, [HOST, MEMORY], [SMALL[0], GpuCase("forward", 2, 4, 140, 16)], progress=told.append
    )
    assert len(told) == len(SMALL) + len(found.costs) + 1  # the second of the lines is new
    assert found.curves[0] is found.rows[0]
    assert [row.met for row in found.rows] == [True, False, None, None, None, None, True]
    assert [cost.met for cost in found.costs if cost.who == OURS] == [True, True, None, None, False]
    assert found.facts["copy bandwidth"] == "1000 GB/s read and written"
    assert all(gpu_report.line(thing) for thing in told)
    written = json.loads(json.dumps(found.as_json()))
    assert set(written) == {"facts", "copy_gigabytes_per_second", "full", "rows", "costs", "curves"}
    assert written["rows"][0]["floor_ms"] > 0
    assert written["rows"][0]["best_peer"] == "fla chunk"


def made_up(full=True):
    case = GpuCase("forward", 4, 32, 8192, 128, 0.35)
    ours, chunk = (
        Entry(OURS, Timing(0.3, 2e-3, 1.5, extra=290_000_000)),
        Entry("fla chunk", Timing(0.75, 3e-3, 20.0)),
    )
    softmax = Entry("softmax", None, "about 300 ms a call, not waited for", same=False)
    wrong = Entry(OURS, Timing(0.01, 0.5))
    rows = (
        GpuRow(case, 0.251, ours, (chunk, softmax)),
        GpuRow(GpuCase("forward", 1, 8, 131072, 128, 0.62), 0.251, wrong),
    )
    costs = (
        Cost("attention", OURS, MICROSECONDS, 50.0, 40.0),
        Cost("cosformer-backward", OURS, BYTES, 7e8, 2**30),
    )
    return GpuResults({"GPU": "A Device, compute capability 9.0"}, 4274.0, full, rows, costs, rows)


def test_cells_and_judgements():
    found = made_up()
    first, second = found.rows
    assert gpu_report.cells(first) == (
        "forward, decay per head, 4 32 8192 128", "0.251", "0.300", "84 %", "290 MB", "0.750 (fla chunk)",
        "2.50", "–", "0.35", "yes",
    )  # fmt: skip
    assert (second.met, gpu_report.cells(second)[-1]) == (False, "wrong")
    assert [gpu_report.cost_cells(cost)[2:] for cost in found.costs] == [
        ("50.0 µs on the host", "at most 40.0 µs on the host", "NO"),
        ("700 MB of memory", "at most 1.07 GB of memory", "yes"),
    ]
    assert gpu_report.verdict(found) == (
        "2 of 4 requirements are met; not met: forward 1 8 131072 128, attention, µs on the host."
    )
    assert gpu_report.reasons(found) == [
        "forward, decay per head, 4 32 8192 128, softmax: about 300 ms a call, not waited for"
    ]
    again = replace(
        found, rows=found.rows + tuple(replace(row, case=replace(row.case, n=99)) for row in found.rows)
    )
    assert gpu_report.reasons(again) == ["softmax in 2 cases: about 300 ms a call, not waited for"]
    assert [gpu_report.digits(x) for x in (0.00512, 0.0954, 0.35, 1.4, 13.08, 235.6)] == [
        "0.0051", "0.0954", "0.350", "1.40", "13.08", "236",
    ]  # fmt: skip


def test_the_gpu_s_section_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page, found = tmp_path / "page.md", made_up()
    cpu = f"{report.BEGIN}\nfigures of a processor\n{report.END}"
    page.write_text(f"# Title\n\n{cpu}\n\nBetween.\n\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\n\nAfter.\n")
    for _ in range(2):
        gpu_report.replace_section(page, found, tmp_path / "picture.png")
        text = page.read_text()
        assert text.startswith(f"# Title\n\n{cpu}\n\nBetween.\n\n{gpu_report.BEGIN}\n\n![")
        assert text.endswith(f"{gpu_report.END}\n\nAfter.\n")
        assert gpu_report.markdown(found) in text
        assert "\nold\n" not in text
        assert "](picture.png)\n" in text
    bare = tmp_path / "bare.md"
    bare.write_text(f"# Processor only\n\n{cpu}\n")
    with pytest.raises(OptionError, match=r"bare\.md has no place for the figures: .*gpu bench"):
        gpu_report.replace_section(bare, found)


def test_the_page_of_the_repository_has_a_place_for_both(pytestconfig):
    page = pytestconfig.rootpath / "docs" / "benchmarks.md"
    report.check_page(page)
    report.check_page(page, gpu_report.MARKS)


def test_the_picture_is_drawn(tmp_path):
    from linattn.bench.gpu_picture import draw

    draw(made_up(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(GpuResults({}, 1.0, True, ()), tmp_path / "nothing.png")


def test_without_a_gpu_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LinattnError, match=r"^`linattn bench --gpu` needs a CUDA GPU: "):
        check_device()


def test_what_torch_and_triton_raise_is_expected():
    assert issubclass(torch.OutOfMemoryError, failures())
    assert issubclass(ModuleNotFoundError, failures())
    assert not issubclass(KeyboardInterrupt, failures())


def test_facts_where_there_is_no_driver(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    assert gpu_machine.driver() == "unknown"
    assert gpu_machine.version("no such package") == "not installed"
