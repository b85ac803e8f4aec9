"""Cases, ratios and judgements, from measurements that are made up."""

import json

import pytest

from linattn.bench import CASES, Figure, Limit, Measurement, Results, cases
from linattn.bench.cases import ITEM, curves, ndes
from linattn.bench.report import (
    BEGIN,
    END,
    comparison_cells,
    markdown,
    replace_section,
    seconds,
    size,
    verdict,
)
from linattn.errors import OptionError


def results(
    names=(), *, full=True, of=lambda figure: Measurement((figure.n * 1e-6,) * 2, figure.n * 1000, 2)
):
    chosen = cases(names)
    figures = [figure for case in chosen for figure in case.measured()]
    return Results(tuple(chosen), {f: of(f) for f in figures}, runs=2, full=full, facts={"cores": "2"})


def required(name):
    (case,) = cases([name])
    return [(c.quantity, c.ours.n, c.peer and c.peer.n, c.limit and c.limit.value) for c in case.comparisons]


@pytest.mark.parametrize("name", ["torch-decay", "torch-plain", "numpy-decay", "numpy-plain"])
def test_linear_means_time_and_memory_of_four_times_the_length(name):
    assert required(name) == [
        ("time per token", 65536, 16384, 1.5),
        ("extra memory per token", 65536, 16384, 1.1),
        ("extra memory", 65536, None, 0.25),
    ]


def test_what_is_required_of_the_peers():
    assert required("cosformer") == [("time", 2048, 2048, 50), ("extra memory", 2048, 2048, 0.01)]
    assert required("softmax") == [("time", 4096, 4096, 5), ("time", 32768, 32768, 25)]
    assert {(n, limit) for _, n, _, limit in required("numpy-torch")} == {(16384, 1.5), (65536, 1.5)}


def test_cases_are_chosen_by_name_and_shrink_together():
    assert [case.name for case in cases()] == list(CASES)
    assert len(set(CASES)) == len(CASES)
    (small,) = cases(["softmax"], divide=16)
    assert [figure.n for figure in small.measured()] == [256, 256, 2048, 2048]
    assert all(figure.n <= 2**16 // 4 for figure in curves(divide=4).figures)
    with pytest.raises(OptionError, match=r"no case named 'sotfmax'; known: .*softmax"):
        cases(["sotfmax"])


def test_an_array_of_every_state_is_n_h_d_e_floats():
    assert ndes(Figure("torch", "plain", 10)) == 10 * 8 * 64 * 64 * ITEM


def test_ratios_and_judgements():
    """Everything costs the same per token: linear is met, no speedup is."""
    rows = {(row.case, row.comparison.quantity, row.comparison.ours.n): row for row in results().rows()}
    linear = rows["torch-decay", "time per token", 65536]
    assert (linear.ratio, linear.met) == (pytest.approx(1), True)
    assert rows["torch-decay", "extra memory", 65536].ratio == 1000 / (8 * 64 * 64 * ITEM)
    faster = rows["softmax", "time", 4096]
    assert (faster.ratio, faster.met) == (1, False)
    assert rows["cosformer", "extra memory", 2048].met is False
    assert rows["softmax-backward", "time", 4096].met is None


def test_a_speedup_is_the_peer_s_time_over_ours():
    slow_peer = results(
        ["softmax"], of=lambda f: Measurement((10.0 if f.implementation == "softmax" else 0.5,), None, 2)
    )
    assert [(row.ratio, row.met) for row in slow_peer.rows()] == [(20, True), (20, False)]
    assert verdict(slow_peer) == "1 of 2 requirements are met; not met: softmax (time, N=32768)."


def test_the_fastest_run_counts():
    found = results(["softmax"], of=lambda f: Measurement((3.0, 1.0, 2.0), None, None))
    assert {row.ours for row in found.rows()} == {1.0}


def test_what_was_not_measured_is_not_judged():
    blind = results(["cosformer"], of=lambda f: Measurement((1.0,), None, 2))
    time, memory = blind.rows()
    assert (time.met, memory.met, memory.ratio) == (False, None, None)
    assert "not measured" in comparison_cells(memory)[2]
    short = results(full=False)
    assert not any(row.met is not None for row in short.rows())
    assert verdict(short).startswith("Nothing is judged")


def test_limits():
    assert Limit("at least", 50).met_by(50)
    assert not Limit("at least", 50).met_by(49.9)
    assert Limit("at most", 0.01).met_by(0.01)
    assert not Limit("at most", 0.01).met_by(0.011)
    assert [str(Limit("at least", 5)), str(Limit("at most", 1.5)), str(Limit("at most", 0.01))] == [
        "at least 5 times as fast", "at most 1.5", "under 1/100",
    ]  # fmt: skip


def test_json_has_every_figure_and_comparison():
    found = json.loads(json.dumps(results().as_json()))
    assert set(found) == {"facts", "runs", "full", "figures", "comparisons"}
    for figure in found["figures"]:
        assert set(figure) == {
            "implementation", "call", "n", "backward", "seconds", "extra_bytes", "threads", "best_seconds",
        }  # fmt: skip
    for row in found["comparisons"]:
        assert set(row) == {"case", "quantity", "ours", "peer", "ratio", "speedup", "required", "met"}
        assert row["ours"]["value"] > 0
        assert row["peer"]["value"] > 0
    assert {row["case"] for row in found["comparisons"]} == set(CASES)


def test_numbers_keep_three_digits_and_their_unit():
    assert [seconds(x) for x in (6.7, 0.0132, 2.5e-6, 3e-8)] == ["6.7 s", "13.2 ms", "2.5 µs", "30 ns"]
    assert [size(x) for x in (1_059_000_000, 5e6, 640, 0, None)] == [
        "1.06 GB", "5 MB", "640 B", "0 B", "not measured",
    ]  # fmt: skip


def test_the_section_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nold figures\n{END}\n\nAfter.\n")
    for _ in range(2):
        replace_section(page, results())
        text = page.read_text()
        assert text.startswith(f"# Title\n\nBefore.\n\n{BEGIN}\n")
        assert text.endswith(f"{END}\n\nAfter.\n")
        assert markdown(results()) in text
        assert (
            f"### Every figure\n\n<details>\n<summary>{len(results().measured)} figures</summary>\n\n| figure"
            in text
        )
        assert "old figures" not in text
    bare = tmp_path / "bare.md"
    bare.write_text("# Nothing\n")
    with pytest.raises(OptionError, match=r"bare\.md has no place for the figures"):
        replace_section(bare, results())
    replace_section(tmp_path / "new.md", results())
    assert (tmp_path / "new.md").read_text().startswith("# Benchmarks\n")
