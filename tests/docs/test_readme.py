"""What the README says in numbers is what its sources say."""

import re
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from linattn.bench.picture import dark
from linattn.cli import COMMANDS

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROCESSOR, GPU = (ROOT / "docs" / "benchmarks.md").read_text().split("\n## On a GPU\n")
ROWS = [line for line in README.split("\n## Beside others\n")[1].splitlines() if line.startswith("|")]


def fact(name: str) -> str:
    found = re.search(rf"^- {name}: (.+)$", GPU, re.M)
    assert found
    return found[1]


def measured(page: str, *cells: str) -> str:
    """The last cell of the first row that begins with these."""
    found = re.search("^" + re.escape("| " + " | ".join(cells) + " | ") + r"([^|]+) \|", page, re.M)
    assert found, cells
    return found[1]


def test_the_picture_is_named_with_its_machine_date_and_command():
    caption = README.split("</picture>\n")[1].split("## ")[0]
    for said in (fact("GPU").partition(",")[0], fact("date").split()[0], fact("commit"), fact("command")):
        assert said in caption, said
    assert ("other processes were busy" in caption) == ("too busy" in fact("busy"))


def test_dark_pages_get_the_dark_picture():
    light, shown = Path("docs/benchmarks-gpu.png"), MarkdownIt().render(README)
    picture = re.search(r'<picture>(<source [^>]+>)\s*<img src="([^"]+)"[^>]*>\s*</picture>', shown)
    assert picture, "browsers look for a source beside an image that has no other parent"
    assert 'media="(prefers-color-scheme: dark)"' in picture[1] and picture[2] == str(light)
    assert f'srcset="{dark(light)}"' in picture[1] and (ROOT / dark(light)).is_file()


@pytest.mark.parametrize(
    ("row", "whose"),
    [
        ("forward, decay per head, bfloat16, 4 32 8192 128", ("linattn triton", "fla chunk")),
        ("the same, 1 8 131072 128", ("linattn triton", "fla chunk")),
    ],
)
def test_times_are_those_of_the_benchmarks(row, whose):
    (cells,) = (line.split(" | ") for line in ROWS if line.startswith(f"| {row}"))
    shape = re.search(r"(\d+ ){3}\d+", row)[0]
    for cell, who in zip(cells[1:], whose, strict=False):
        ms = measured(GPU, f"forward, decay per head, {shape}", who)
        assert cell.startswith(f"{ms} ms"), f"{who} took {ms} ms, the README says {cell}"
    if "(CuPy)" in cells[1]:
        ms = measured(GPU, f"forward, decay per head, {shape}, cupy", "linattn cupy")
        assert f", {ms} ms (CuPy)" in cells[1], ms


def test_memory_is_that_of_the_benchmarks():
    (cells,) = (line.split(" | ") for line in ROWS if "extra memory for 2048 tokens" in line)
    ours, theirs = re.search(
        r"\| cosformer \| extra memory \| ([^(]+) \([^|]+\| ([^(]+) \(", PROCESSOR
    ).groups()
    assert cells[1] == ours and cells[3].startswith(theirs)


def test_every_row_says_where_it_is_shown():
    assert len(ROWS) > 2
    columns = ROWS[0].count("|")
    for row in ROWS[2:]:
        assert row.count("|") == columns, row
        assert re.fullmatch(r"\[[^]]+\]\(docs/[^)]+\)", row.split("|")[-2].strip()), row


@pytest.mark.parametrize(("badge", "says"), [("license", PYPROJECT["license"]), ("python", None)])
def test_badges_are_what_the_package_says(badge, says):
    says = says or f"{PYPROJECT['requires-python'].removeprefix('>=')} or later"
    assert f"![{badge}: {says}](docs/_static/{badge}.svg)" in README
    assert f">{says}</text>" in (ROOT / "docs" / "_static" / f"{badge}.svg").read_text()


def test_every_extra_that_users_install_is_in_the_table():
    named = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert named == set(PYPROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_commands_that_it_names_exist():
    named = set(re.findall(r"^linattn (\w+)|`linattn (\w+)", README, re.M))
    assert {one or other for one, other in named} <= set(COMMANDS)
