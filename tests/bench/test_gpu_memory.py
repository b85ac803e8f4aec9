"""What a call on a GPU holds beyond its inputs: counted by a device that is made up, told, kept as JSON."""

import json
import sys
import types

import pytest

from linattn.bench import gpu_peers, gpu_report
from linattn.bench.gpu_cases import GpuCase
from linattn.bench.gpu_measure import Cuda
from linattn.bench.gpu_results import Cost, Entry, GpuResults, GpuRow, Timing
from linattn.bench.gpu_runner import OURS, Bench
from tests.bench.clock import Clock

INPUTS, TUNING = 4000, 900  # bytes


class Device:
    """torch.cuda, as far as a clock asks it: what is held, the most of it, and a time that calls move on."""

    def __init__(self):
        self.held, self.most, self.now, self.calls = INPUTS, INPUTS, 0.0, 0

    def call(self, scratch, result):
        """A call with a buffer of its own, and once one more for tuning; nobody keeps what it returns."""
        self.calls += 1
        self.most = max(self.most, self.held + scratch + result + (TUNING if self.calls == 1 else 0))
        self.now += 3.0 if self.calls > 1 else 500.0
        return ()

    def memory_allocated(self):
        return self.held

    def max_memory_allocated(self):
        return self.most

    def reset_peak_memory_stats(self):
        self.most = self.held

    def synchronize(self):
        pass

    def Event(self, *, enable_timing):
        device = self

        class Event:
            def record(self):
                self.at = device.now

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


@pytest.fixture
def clock(monkeypatch):
    found = Cuda()
    found.torch = types.SimpleNamespace(cuda=Device())
    return found


def test_a_warm_call_s_bytes_are_those_above_what_was_held(clock):
    device = clock.torch.cuda
    assert clock.once(lambda: device.call(70, 200)) == (3.0, 270)
    assert device.calls == 2
    assert clock.once(lambda: device.call(0, 0))[1] == 0  # not what calls before it held


def test_a_time_that_is_known_costs_no_call(clock, monkeypatch):
    device, asked = clock.torch.cuda, []
    testing = types.ModuleType("triton.testing")
    testing.do_bench = lambda work, *, warmup, rep, return_mode: asked.append(rep) or 4.0
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    work = lambda: device.call(1, 1)  # noqa: E731
    assert clock.milliseconds(work, about=10.0) == 4.0
    assert device.calls == 0
    assert clock.milliseconds(work) == 4.0
    assert device.calls == 2
    assert asked == [12 * 10.0, clock.rep]


def test_ours_and_every_peer_are_told_apart(monkeypatch):
    monkeypatch.setattr(gpu_peers, "_compiled", lambda function: function)

    class Growing(Clock):
        """Every computation holds a million bytes more than the one before it."""

        def once(self, work):
            self.extra += 10**6
            return super().once(work)

    run = Bench(Growing(), device="cpu", backend="torch")
    row = run.row(GpuCase("cosformer-not-causal", 2, 2, 70, 16), 1000.0)
    timed = [entry for entry in (row.ours, *row.peers) if entry.timing]
    assert len(timed) > 2
    assert [entry.timing.extra for entry in timed] == [8 * 10**6 + i * 10**6 for i in range(len(timed))]


def results(extra):
    ours, softmax = Entry(OURS, Timing(0.3, 2e-3, 1.5, 0.2, extra)), Entry("softmax", None, "no", same=False)
    case = GpuCase("forward", 4, 32, 8192, 128, 0.35, "cupy", "float32", share=0.5)
    row = GpuRow(case, 0.25, ours, (Entry("fla chunk", Timing(0.75)), softmax))
    return GpuResults({"GPU": "A"}, 4e3, True, (row,), (Cost("a", OURS, "b", 1.0, 2.0),), (row, row))


def written(found):
    return json.loads(json.dumps(found.as_json()))


def test_json_is_read_as_it_was_written():
    for extra in (5, None):
        assert GpuResults.from_json(written(results(extra))) == results(extra)


def test_older_json_has_no_memory(tmp_path):
    from linattn.bench.gpu_picture import draw

    fields = written(results(5))
    for row in fields["rows"] + fields["curves"]:
        for entry in (row["ours"], *row["peers"]):
            if entry["timing"]:
                del entry["timing"]["extra"]
    older = GpuResults.from_json(fields)
    assert older == results(None)
    draw(older, tmp_path / "a.png")
    assert gpu_report.entries(older.rows)[0][gpu_report.PEER_COLUMNS.index("extra memory")] == "–"


def test_tables_say_it():
    (row,) = results(268_435_456).rows
    assert dict(zip(gpu_report.COLUMNS, gpu_report.cells(row), strict=True))["extra memory"] == "268 MB"
    shown = [dict(zip(gpu_report.PEER_COLUMNS, cells, strict=True)) for cells in gpu_report.entries([row])]
    assert [one["extra memory"] for one in shown] == ["268 MB", "–", "–"]
    assert [one["error"] for one in shown] == ["2.0e-03", "–", "–"]
