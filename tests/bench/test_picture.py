"""The pictures of the bench: what is drawn where, for light pages and for dark ones."""

import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from linattn.bench import Measurement, gpu_picture, picture
from linattn.bench.cases import Figure
from linattn.bench.gpu_cases import GpuCase
from linattn.bench.gpu_results import Entry, GpuResults, GpuRow, Timing
from linattn.bench.gpu_runner import OURS
from linattn.bench.results import Results

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


def luminance(color):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(color)]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """The ratio of WCAG 2.1."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_letters_and_lines_stand_out_from_the_page(drawn, tmp_path):
    gpu_picture.draw(RESULTS, tmp_path / "a.png")
    for canvas in drawn.values():
        page = canvas.get_facecolor()
        texts = [text for text in canvas.findobj(Text) if text.get_text()]
        assert all(text.get_fontsize() >= SMALLEST for text in texts)
        assert all(contrast(text.get_color(), page) >= 4.5 for text in texts)  # WCAG, of letters
        for axis in canvas.axes:
            assert axis.get_facecolor() == page
            assert all(contrast(line.get_color(), page) >= 3 for line in axis.get_lines())  # of graphics
