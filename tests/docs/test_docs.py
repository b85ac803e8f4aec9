"""Every code block in the documentation runs, and every relative link leads somewhere."""

import doctest
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import linattn.cli

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|python gpu|sh)\n(.*?)^```", re.S | re.M)
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
        elif block[1] == "python" or has_gpu():
            names = run_python(page, block[2], line, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, (
            f"docs/README.md does not name {page.name}"
        )
