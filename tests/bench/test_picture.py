"""The pictures of the bench: what is drawn where, for light pages and for dark ones."""

from dataclasses import replace

import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from linattn.bench import Measurement, gpu_picture, picture, systems_picture
from linattn.bench.cases import Figure
from linattn.bench.gpu_cases import GpuCase
from linattn.bench.gpu_results import Entry, GpuResults, GpuRow, Timing
from linattn.bench.gpu_runner import OURS
from linattn.bench.results import Results
from linattn.bench.systems import LLAMA, Row
from linattn.bench.systems import OURS as OUR_MODEL

SMALLEST = 9  # points, of any text


@pytest.fixture
def drawn(monkeypatch):
    """Every picture that is saved, by the name of its file."""
    found = {}
    save = picture.save

    def keep(canvas, path):
        found[path.name] = canvas
        save(canvas, path)

    monkeypatch.setattr(picture, "save", keep)
    return found


def row(kind, n, floor, ms, chunk=None):
    peers = (
        Entry("fla chunk", None if chunk is None else Timing(chunk)),
        Entry("softmax", Timing(n * 1e-3), same=False),
    )
    return GpuRow(GpuCase(kind, 4, 32, n, 128), floor, Entry(OURS, Timing(ms)), peers)


def with_memory(one):
    return replace(one, ours=replace(one.ours, timing=replace(one.ours.timing, extra=10**6 * one.case.n)))


RESULTS = GpuResults(
    {"GPU": "A Device, compute capability 9.0"},
    4000.0,
    True,
    (),
    (),
    (
        row("forward", 2048, 0.2, 0.25),
        row("forward", 1024, 0.1, 0.2, 0.4),
        row("forward-backward", 1024, 0.3, 0.5),
    ),
)


def lines(axis):
    """Label, or the kind of line where it has none, and the points of every line that has some."""
    found = [
        (line.get_label(), line.get_linestyle(), line.get_xydata().tolist()) for line in axis.get_lines()
    ]
    return [(label if label[0] != "_" else style, points) for label, style, points in found if points]


def test_times_and_shares_are_those_of_the_rows(drawn, tmp_path):
    gpu_picture.draw(RESULTS, tmp_path / "a.png")
    assert set(drawn) == {"a.png", "a-dark.png"}
    for canvas in drawn.values():
        forward, both, share = canvas.axes
        found = dict(lines(forward))
        assert found[OURS] == [[1024, 0.2], [2048, 0.25]]  # by length
        assert found["fla chunk"] == [[1024, 0.4]]
        assert found["floor: bytes moved once"] == [[1024, 0.1], [2048, 0.2]]
        assert dict(lines(both))[OURS] == [[1024, 0.5]]
        shares = sorted((style, [round(y) for _, y in points]) for style, points in lines(share))
        assert shares == [("-", [25]), ("-", [50, 80]), (":", [60])]  # fla's, ours; ours with a backward pass
        assert share.get_ylim() == (0, 100)
        assert "A Device" in canvas.get_suptitle() and "9.0" not in canvas.get_suptitle()


def with_cupy(results):
    """The same with CuPy's calls of the same shape, and one of another."""
    cases = (
        (GpuCase("forward", 4, 32, 2048, 128, backend="cupy"), 0.22),
        (GpuCase("forward", 4, 32, 1024, 128, backend="cupy"), 0.12),
        (GpuCase("forward", 8, 16, 4096, 64, backend="cupy"), 9.0),
    )
    rows = tuple(GpuRow(case, 0.1 * case.n / 1024, Entry("linattn cupy", Timing(ms))) for case, ms in cases)
    return replace(results, rows=rows)


def test_cupy_is_drawn_at_the_lengths_that_it_has(drawn, tmp_path):
    gpu_picture.draw(with_cupy(RESULTS), tmp_path / "a.png")
    forward, both, share = drawn["a.png"].axes
    assert dict(lines(forward))["linattn cupy"] == [[1024, 0.12], [2048, 0.22]]
    assert "linattn cupy" not in dict(lines(both))
    shares = [[(n, round(y)) for n, y in points] for _, points in lines(share)]
    assert [(1024, 83), (2048, 91)] in shares
    (legend,) = drawn["a.png"].legends
    names = [OURS, "fla chunk", "softmax", "linattn cupy", gpu_picture.FLOOR]
    assert [text.get_text() for text in legend.get_texts()] == names


def test_a_lone_mark_says_that_it_is_one(drawn, tmp_path):
    gpu_picture.draw(RESULTS, tmp_path / "a.png")
    forward, both, _ = drawn["a.png"].axes
    assert [text.get_text() for text in forward.texts] == ["fla chunk, one length timed"]
    assert {text.get_text() for text in both.texts} == {
        f"{name}, one length timed" for name in (OURS, "softmax")
    }


def test_one_panel_names_its_lines_at_their_ends(drawn, tmp_path):
    gpu_picture.draw_forward(with_cupy(RESULTS), tmp_path / "a.png")
    assert set(drawn) == {"a.png", "a-dark.png"}
    for canvas in drawn.values():
        (axis,) = canvas.axes
        assert dict(lines(axis)) == {
            OURS: [[1024, 0.2], [2048, 0.25]],
            "linattn cupy": [[1024, 0.12], [2048, 0.22]],
            "fla chunk": [[1024, 0.4]],
            gpu_picture.FLOOR: [[1024, 0.1], [2048, 0.2]],
        }
        assert axis.get_yscale() == axis.get_xscale() == "log"
        assert axis.get_legend() is None and not canvas.legends
        assert {text.get_text() for text in axis.texts} == set(gpu_picture.LABELS.values())
        colors = {line.get_label(): line.get_color() for line in axis.get_lines()}
        names = {words: name for name, words in gpu_picture.LABELS.items()}
        assert all(text.get_color() == colors[names[text.get_text()]] for text in axis.texts)
        canvas.canvas.draw()
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
        whole = canvas.bbox
        assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)
    gpu_picture.draw_forward(GpuResults({}, 1.0, True, ()), tmp_path / "nothing.png")


def test_memory_is_drawn_where_it_was_recorded(drawn, tmp_path):
    def recorded(kind, n, *extras):
        one = row(kind, n, 0.1, 0.2, 0.4)
        ours, *peers = (
            replace(entry, timing=replace(entry.timing, extra=extra))
            for entry, extra in zip((one.ours, *one.peers), extras, strict=True)
        )
        return replace(one, ours=ours, peers=tuple(peers))

    rows = (
        recorded("forward", 2048, 3 * 10**6, 9 * 10**6, None),
        recorded("forward", 1024, 2 * 10**6, 5 * 10**6, 4 * 10**6),
        recorded("forward-backward", 1024, 10**9, 10**9, 10**9),
    )
    gpu_picture.draw(replace(RESULTS, curves=rows), tmp_path / "a.png")
    assert set(drawn) == {"a.png", "a-dark.png"}
    for canvas in drawn.values():
        *_, share, memory = canvas.axes
        assert "share" in share.get_title(loc="left") and "MB" in memory.get_title(loc="left")
        assert memory.get_yscale() == memory.get_xscale() == "log"
        colors = {line.get_color(): line.get_label() for line in canvas.axes[0].get_lines()}
        points = {colors[line.get_color()]: line.get_xydata().tolist() for line in memory.get_lines()}
        assert points == {
            OURS: [[1024, 2], [2048, 3]],
            "fla chunk": [[1024, 5], [2048, 9]],
            "softmax": [[1024, 4]],
            colors[memory.get_lines()[-1].get_color()]: [
                [n, 4 * 32 * n * 128 * 2 / 1e6] for n in (1024, 2048)
            ],  # the result alone
        }


def test_a_share_above_the_floor_is_in_the_picture(drawn, tmp_path):
    fast = GpuResults({}, 1.0, True, (), (), (row("forward", 64, 0.2, 0.16),))
    gpu_picture.draw(fast, tmp_path / "a.png")
    assert drawn["a.png"].axes[2].get_ylim()[1] >= 125


def test_nothing_measured_is_an_empty_picture(tmp_path):
    gpu_picture.draw(GpuResults({}, 1.0, True, ()), tmp_path / "a.png")
    assert (tmp_path / "a-dark.png").is_file()


def test_a_processor_s_time_and_memory(drawn, tmp_path):
    figures = {
        Figure("torch", "decay", 512): Measurement((0.004, 0.003), 5 * 10**6, 2),
        Figure("torch", "decay", 256): Measurement((0.002,), None, 2),
        Figure("torch", "decay", 512, backward=True): Measurement((9.0,), 10**9, 2),
        Figure("softmax", "softmax", 512): Measurement((0.5,), 10**6, 2),
    }
    picture.draw(Results((), figures, 2, True, {"cores": "2", "processor": "A Chip"}), tmp_path / "a.png")
    time, memory = drawn["a.png"].axes
    assert dict(lines(time)) == {"linattn, torch": [[256, 2.0], [512, 3.0]], "softmax, torch": [[512, 500.0]]}
    assert dict(lines(memory)) == {"linattn, torch": [[512, 5.0]], "softmax, torch": [[512, 1.0]]}


def test_models_rates_and_memory(drawn, tmp_path):
    rows = [
        Row("training", OUR_MODEL, 1, 32768, 0.25, 30 * 10**9),
        Row("training", OUR_MODEL, 4, 8192, 0.2, 20 * 10**9),
        Row("training", OUR_MODEL, 1, 131072, 0.8, 70 * 10**9, note="half again: memory is short"),
        Row("training", LLAMA, 4, 8192, 0.4),
        Row("training", LLAMA, 1, 32768, failed="out of memory"),
        Row("training", "TransNormerLLM-385M, norms and gates not fused", 4, 8192, 0.3, 10**9),
        Row("decoding", OUR_MODEL, 1, 8192, 0.001, 10**9),
    ]
    systems_picture.draw(rows, {"GPU": "A Device, compute capability 9.0"}, tmp_path / "a.png")
    assert set(drawn) == {"a.png", "a-dark.png"}
    for canvas in drawn.values():
        rate, memory = canvas.axes
        assert dict(lines(rate)) == {
            OUR_MODEL: [[8192, 163840], [32768, 131072], [131072, 163840]],
            "half again": [[131072, 163840]],
            LLAMA: [[8192, 81920]],
        }
        assert dict(lines(memory)) == {
            OUR_MODEL: [[8192, 20], [32768, 30], [131072, 70]],
            "half again": [[131072, 70]],
        }
        assert rate.get_ylim()[0] == memory.get_ylim()[0] == 0
        assert rate.get_legend() is not None
        title = canvas.get_suptitle()
        assert "32,768 tokens" in title and title.endswith("A Device")
    systems_picture.draw([], {}, tmp_path / "nothing.png")


def luminance(color):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(color)]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """The ratio of WCAG 2.1."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_letters_and_lines_stand_out_from_the_page(drawn, tmp_path):
    results = with_cupy(replace(RESULTS, curves=tuple(map(with_memory, RESULTS.curves))))
    gpu_picture.draw(results, tmp_path / "a.png")
    gpu_picture.draw_forward(results, tmp_path / "b.png")
    assert [len(canvas.axes) for canvas in drawn.values()] == [4, 4, 1, 1]
    for canvas in drawn.values():
        page = canvas.get_facecolor()
        texts = [text for text in canvas.findobj(Text) if text.get_text()]
        assert all(text.get_fontsize() >= SMALLEST for text in texts)
        assert all(contrast(text.get_color(), page) >= 4.5 for text in texts)  # WCAG, of letters
        for axis in canvas.axes:
            assert axis.get_facecolor() == page
            assert all(contrast(line.get_color(), page) >= 3 for line in axis.get_lines())  # of graphics
