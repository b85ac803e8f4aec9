"""Every code block in the documentation runs, and every relative link leads somewhere.

The pages of docs/learn are notebooks: their `{code-cell}` blocks run like the others.
"""

import doctest
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text
from typer.testing import CliRunner

import linattn.cli
from docs._ext.links import BLOCK, prose

ROOT = Path(__file__).parent.parent.parent
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
SMALLEST = 9  # points, of any text in a picture
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def run_python(page: Path, code: str, line: int, names: dict[str, object]) -> dict[str, object]:
    """Run one block: `>>>` lines compare their output, other code just runs. Return its names."""
    if code.lstrip().startswith(">>>"):
        example = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False)
        assert result.failed == 0, f"{page.name}: see the difference above"
        return example.globs  # doctest works on a copy
    if file := re.match(
        r"# (\w+\.py)\n", code
    ):  # a block that names a file is that file too, for the commands
        Path(file[1]).write_text(code)
    exec(compile("\n" * line + code, str(page), "exec"), names)  # padded, so tracebacks point into the page
    return names


def run_command(page: Path, line: str) -> None:
    """Run one `linattn ...` line of a shell block in this process; the other lines are for people."""
    if not line.startswith("linattn "):
        return
    result = CliRunner().invoke(linattn.cli.app, shlex.split(line, comments=True)[1:])
    assert result.exit_code == 0, f"{page.name}: {line}\n{result.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    text, names = page.read_text(), {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(2))
        if block[1] == "sh":
            for command in block[2].splitlines():
                run_command(page, command)
        elif block[1] != "python gpu" or has_gpu():
            names = run_python(page, block[2], line, names)


def small_print(figures: list[Figure]) -> list[str]:
    """What stands in figures in letters that are too small."""
    texts = [text for figure in figures for text in figure.findobj(Text)]
    return [text.get_text() for text in texts if text.get_text() and text.get_fontsize() < SMALLEST]


@pytest.fixture(autouse=True)
def _pictures_can_be_read():
    yield
    found = small_print([pyplot.figure(number) for number in pyplot.get_fignums()])
    pyplot.close("all")
    pyplot.rcdefaults()
    assert not found, f"letters below {SMALLEST} points: {found}"


def test_small_print_is_found():
    figure = Figure()
    figure.text(0, 0, "large", fontsize=SMALLEST)
    figure.text(0, 0, "small", fontsize=SMALLEST - 1)
    assert small_print([figure]) == ["small"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = "".join(piece for is_prose, piece in prose(page.read_text()) if is_prose)
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    named = [
        page
        for page in DOCS
        if page.parent.name in {"docs", "learn"} and page.name not in {"README.md", "index.md"}
    ]
    for page in named:
        name = page.relative_to(ROOT / "docs")
        assert f"({name})" in index, f"docs/README.md does not name {name}"
