"""Figures of a GPU read back from a page: every row is written again as it stands, and drawn."""

import re

import pytest

from linattn.bench import gpu_page, gpu_report, picture
from linattn.bench.gpu_cases import GpuCase
from linattn.bench.gpu_report import BEGIN, COLUMNS, END, NOTHING, PEER_COLUMNS
from linattn.bench.gpu_results import BYTES, MICROSECONDS, Cost, Entry, GpuResults, GpuRow, Timing
from linattn.bench.gpu_runner import OURS
from linattn.errors import OptionError

WAITED = Entry("softmax", None, "about 300 ms a call, not waited for", same=False)


def made_up():
    bandwidth = 4000.0
    rows = []
    for case, *entries in (
        (
            GpuCase("forward", 4, 32, 8192, 128, 0.35),
            Timing(0.3, 2e-3, 1.5, extra=290_000_000),
            Timing(0.75, 3e-3, 20.0),
        ),
        (GpuCase("forward", 4, 32, 8192, 128, 0.33, "cupy"), Timing(0.26, 2e-3, 0.5, extra=270_000_000)),
        (
            GpuCase("decode", 1, 32, 1, 128, 0.005, "cupy", replayed=True),
            Timing(0.006, 1e-3, 0.1, 0.0027, 8190),
        ),
        (GpuCase("forward", 4, 32, 2048, 64, 0.52, "cupy", "float64"), Timing(0.5, 0.5, 1.9)),
    ):
        ours, *others = entries
        peers = [Entry("fla chunk", timing) for timing in others] + [WAITED] * bool(others)
        name = f"linattn {case.backend}"
        rows.append(GpuRow(case, case.bytes / bandwidth / 1e6, Entry(name, ours), tuple(peers)))
    long = GpuCase("forward", 4, 32, 16384, 128)
    curves = (rows[0], GpuRow(long, long.bytes / bandwidth / 1e6, Entry(OURS, Timing(0.6, 2e-3, 0.0))))
    costs = (
        Cost("attention", OURS, MICROSECONDS, 50.0, 40.0),
        Cost("decode_step", OURS, MICROSECONDS, None),
        Cost("cosformer-backward", OURS, BYTES, 7e8, 2**30),
    )
    facts = {"GPU": "A Device, capability 9.0", "copy bandwidth": f"{bandwidth:.0f} GB/s read and written"}
    return GpuResults(facts, bandwidth, True, tuple(rows), costs, curves)


def page_of(results):
    return f"# Title\n\n{BEGIN}\n\n{gpu_report.markdown(results)}\n\n{END}\n\n- GPU: another one\n"


def test_what_was_written_is_read():
    results = made_up()
    found = gpu_page.read(page_of(results))
    assert gpu_report.markdown(found) == gpu_report.markdown(results).partition("\n\n### Not measured")[0]
    assert (found.facts, found.bandwidth) == (results.facts, results.bandwidth)
    assert [row.case for row in found.rows] == [row.case for row in results.rows]
    assert [row.met for row in found.rows] == [True, True, True, False]
    assert {row.case.name for row in found.curves} == {row.case.name for row in results.curves}
    assert gpu_page.read(page_of(found)) == found


def test_a_page_keeps_what_was_measured_folded_and_counts_the_rest():
    text = gpu_report.markdown(made_up())
    _, every = text.split("\n### Every measurement\n")
    table, missing = every.split("\n### Not measured\n")
    assert table.startswith("\n<details>\n<summary>6 measurements</summary>\n\n| case |")
    assert table.endswith(" |\n\n</details>\n")
    assert "softmax" not in table
    assert missing.startswith("\n1 of 7 measurements were not made, and have no row above.\n\n- forward,")


def test_a_page_without_the_section_is_refused():
    for page in ("nothing", BEGIN, END):
        with pytest.raises(OptionError, match="the page has no figures of a GPU"):
            gpu_page.read(page)


def test_the_page_of_the_repository_is_read_whole(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "benchmarks.md").read_text()
    found = gpu_page.read(page)
    written = {line for line in page.splitlines() if line.startswith("| ")}
    entries = gpu_report.entries(gpu_report.all_rows(found))
    for made in entries:
        assert f"| {' | '.join(made)} |" in written
        assert made[PEER_COLUMNS.index("ms")] != NOTHING
    assert f"<summary>{len(entries)} measurements</summary>" in page
    ratios = [COLUMNS.index(name) for name in ("% of floor", "times as fast")]  # of more digits than it has
    for row in found.rows:
        cells = gpu_report.cells(row)
        pattern = [r"[\d.]+( %)?|–" if at in ratios else re.escape(cell) for at, cell in enumerate(cells)]
        pattern = r"\| " + r" \| ".join(f"(?:{one})" for one in pattern) + r" \|"
        assert any(re.fullmatch(pattern, line) for line in written), cells
    assert gpu_report.verdict(found) in page


def test_pictures_are_drawn_from_a_page(tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(picture, "save", lambda canvas, path: saved.update({path.name: canvas}))
    page = tmp_path / "page.md"
    page.write_text(page_of(made_up()))
    gpu_page.main(str(page))
    assert set(saved) == {"page-gpu.png", "page-gpu-dark.png", "page-forward.png", "page-forward-dark.png"}
    (axis,) = saved["page-forward.png"].axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert points[OURS] == [[8192, 0.3], [16384, 0.6]]
    assert points["linattn cupy"] == [[8192, 0.26]]
