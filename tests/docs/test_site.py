"""What the site is made with does what it says, without building it: links, the check of pages, pins."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs._ext import links
from docs._ext.built import problems
from docs._ext.entries import markdown

ROOT = Path(__file__).parent.parent.parent
PAGE = "<html><body>{}</body></html>"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            '<a href="other.html#here">x</a><a href="https://example.org/">y</a><a id="z" href="#z">z</a>',
            None,
        ),
        ('<a href="absent.html">x</a>', "which does not exist"),
        ('<a href="other.html#nowhere">x</a>', "has no such anchor"),
        ('<a href="#nowhere">x</a>', "has no such anchor"),
        ('<img src="absent.png">', "which does not exist"),
        ('<source srcset="absent.png">', "which does not exist"),
        ('<script src="https://example.org/x.js"></script>', "without network"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "without network"),
    ],
)
def test_the_check_of_built_pages(tmp_path, body, problem):
    (tmp_path / "page.html").write_text(PAGE.format(body))
    (tmp_path / "other.html").write_text(PAGE.format('<h1 id="here">x</h1>'))
    found = list(problems(tmp_path))
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]


def test_links_are_the_sites():
    homes = links.homes()
    page = ROOT / "docs" / "learn" / "decay.md"

    def rebased(text: str, origin: Path = page) -> str:
        return links.rebased(text, origin, page, homes)

    assert rebased("[a](lrpe.md#x)") == "[a](lrpe.md#x)"
    assert rebased("[a](../../README.md)") == "[a](../project/overview.md)", "a page includes it"
    assert rebased("[a](../README.md)") == "[a](../index.md)", "the index of GitHub is not the site's"
    assert rebased("[`a`](../../backends/cupy)") == "[`a`](source:backends/cupy)"
    assert rebased("[a](docs/notation.md)", ROOT / "README.md") == "[a](../notation.md)"
    assert rebased("![a](docs/_static/python.svg) [b](LICENSE)", ROOT / "README.md") == (
        "![a](../_static/python.svg) [b](source:LICENSE)"
    )
    both = "![a](../benchmarks.png){.only-light}![a](../benchmarks-dark.png){.only-dark}"
    assert rebased("![a](docs/benchmarks.png)", ROOT / "README.md") == both
    dark = '<picture><source media="(prefers-color-scheme: dark)" srcset="docs/benchmarks-dark.png">\n'
    assert rebased(f"{dark}![a](docs/benchmarks.png)</picture>\n", ROOT / "README.md") == f"{both}\n"
    assert rebased("[a](https://example.org) [b](#c)") == "[a](https://example.org) [b](#c)"
    code = "```python\nx[0](lrpe.md)\n```\n"
    assert rebased(code) == code, "code stays as it is"
    with pytest.raises(FileNotFoundError, match="absent"):
        rebased("[a](absent.md)")


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_a_page_of_the_site_is_each_of_the_repositorys(name):
    page = links.homes()[ROOT / name]
    title = (ROOT / name).read_text().splitlines()[0]
    assert links.whole(page).startswith(title)


def test_every_argument_of_a_docstring_has_a_line():
    text = """Sum, of a: what.

    q: first; see also: this. many_words, r ("s" | "t"): a pair: of words. As said: yes (a length is
    not read). It goes on: q.
    s: no comma. Raises nothing.
    Raises ShapeError.
    """
    text = inspect.cleandoc(text)
    assert markdown(text, {"q", "many_words", "r", "s"}) == (
        "Sum, of a: what.\n\n"
        "**q**: first; see also: this.\\\n"
        '**many_words**, **r** ("s" | "t"): a pair: of words. As said: yes (a length is\n'
        "not read). It goes on: q.\\\n"
        "**s**: no comma. Raises nothing.\\\n"
        "Raises ShapeError."
    )
    assert markdown("as (a, b): x. any: y.", None) == "as (a, b): x.\\\n**any**: y."
    assert markdown("Source: arXiv:2401.04658.").startswith("Source: [arXiv:2401.04658](https://arxiv.org/")


def test_what_builds_the_site_is_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["docs"]
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", pin) for pin in extras["docs"])


def test_tests_of_the_site_need_none_of_its_tools():
    named = r"^from docs\._ext(?:\.(\w+)| import (\w+)$)"
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    modules = sorted({a or b for text in tests for a, b in re.findall(named, text, re.M)})
    assert "entries" in modules and "api" not in modules
    absent = ["docutils", "jupytext", "myst_nb", "nbformat", "pygments", "sphinx"]
    script = f"import sys; sys.modules.update(dict.fromkeys({absent})); " + "; ".join(
        f"import docs._ext.{module}" for module in modules
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_citation_names_the_papers_that_the_notation_names():
    cited = set(re.findall(r"arxiv\.org/abs/(\S+)", (ROOT / "CITATION.cff").read_text()))
    named = set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", (ROOT / "docs" / "notation.md").read_text()))
    listed = set(
        re.findall(r"arxiv\.org/abs/([\d.]+\d)", (ROOT / "docs" / "project" / "cite.md").read_text())
    )
    assert cited == named == listed
