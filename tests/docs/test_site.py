"""What the site is made with does what it says, without building it: links, the check of pages, pins."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import linattn
from docs._ext import links, notebooks
from docs._ext.built import problems
from docs._ext.entries import alias, entry, is_module, markdown

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


def test_an_abbreviation_says_what_it_means():
    assert alias("linattn.state", "Reweight") == "Cosine | LRPE | None"
    assert alias("linattn.reference.heads", "Array") == "NDArray[np.float64]", (
        "though for type checkers alone"
    )
    assert alias("linattn.state", "State") is alias("linattn.testing", "AXES") is None
    assert entry("linattn.state", "Reweight", "How.") == (
        "::::{py:type} Reweight\n:canonical: Cosine | LRPE | None\n\nHow.\n::::\n"
    )


LESSONS = [page for page in sorted((ROOT / "docs" / "learn").glob("*.md")) if page.name != "index.md"]
PINNED = {
    re.match(r"[\w-]+", pin)[0].lower().replace("_", "-")
    for pin in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
}
CALLED = {"fla": "fla-core", "cuda": "cuda-bindings"}  # modules of pinned packages that have another name


def test_a_notebook_installs_what_its_page_imports():
    page = """import absent
```{code-cell} python
import os, torch
from importlib.util import find_spec
import numpy as np, linattn  # as people
from linattn import decay, testing
import matplotlib.pyplot as plt
print(find_spec("fla"))
linattn.train.read_text
program = \'\'\'
    import ml_dtypes
    from linattn.backends.triton import (
        TritonBackend,
    )
\'\'\'
```
""".replace("\\'", "'")
    assert notebooks.needed(page) == {
        "fla": "fla-core",
        "hypothesis": "hypothesis>=6.120",
        "matplotlib": "matplotlib>=3.9",
        "ml_dtypes": "ml_dtypes",
        "safetensors": "safetensors>=0.5",
        "torch": "torch>=2.9",
        "triton": "triton>=3.5; sys_platform == 'linux'",
    }
    words, code = notebooks.install(page, None)
    assert "File > Upload notebook" in words and "linattn-*.whl" in code and '"fla": "fla-core"' in code
    words, code = notebooks.install(page, "https://github.com/o/n")
    assert "Upload" not in words and '"git+https://github.com/o/n"' in code and ".whl" not in code
    assert len({notebooks.install(page.read_text(), None)[1] for page in LESSONS}) > 4, (
        "each page has its own"
    )


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_a_page_needs_no_more_than_its_notebook_installs(page):
    """What it imports of linattn, with every other package that is installed for tests hidden."""
    text = page.read_text()
    needs = notebooks.needed(text)
    assert {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in needs.values()} <= PINNED, (
        "a wrong name"
    )
    hidden = ({pin.replace("-", "_") for pin in PINNED} | {*CALLED}) - {*needs, "numpy", "typer", "rich"}
    modules = sorted(
        name for name in notebooks.imported(text) if name.startswith("linattn") and is_module(name)
    )
    script = f"import sys, importlib; sys.modules.update(dict.fromkeys({sorted(hidden)})); " + "; ".join(
        f"importlib.import_module({module!r})" for module in modules
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("urls", "address"),
    [
        ({}, None),
        ({"Documentation": "https://github.com/o/n"}, None),
        ({"Repository": "https://example.org/o/n"}, None),
        ({"Repository": "https://github.com/o"}, None),
        ({"Repository": "https://github.com/o/n"}, "https://github.com/o/n"),
        (
            {"Homepage": "https://example.org", "source": "https://github.com/o/n.m.git/"},
            "https://github.com/o/n.m",
        ),
    ],
)
def test_a_page_opens_in_colab_where_the_project_has_a_repository(urls, address):
    assert notebooks.repository(urls) == address
    line = notebooks.offered("learn/decay", address)
    assert '<a href="decay.ipynb" download>' in line
    there = "https://colab.research.google.com/github/{}/blob/gh-pages/learn/decay.ipynb"
    if address is None:
        assert "colab.research" not in line and "File &gt; Upload notebook" in line
    else:
        assert there.format(address.removeprefix("https://github.com/")) in line and "Upload" not in line


def test_the_project_has_the_button_or_says_how_without():
    urls = notebooks.project().get("urls", {})
    assert notebooks.repository() == notebooks.repository(urls)
    if notebooks.repository() is None:
        assert "File > Upload notebook" in (ROOT / "docs" / "learn" / "index.md").read_text()


def test_what_builds_the_site_is_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["docs"]
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", pin) for pin in extras["docs"])


def test_tests_of_the_site_need_none_of_its_tools():
    named = r"^from docs\._ext(?:\.(\w+)| import ([\w, ]+)$)"
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    modules = sorted(
        {a or b for text in tests for a, names in re.findall(named, text, re.M) for b in names.split(", ")}
    )
    assert {"entries", "notebooks"} <= {*modules} and "api" not in modules
    absent = ["docutils", "jupytext", "myst_nb", "nbformat", "pygments", "sphinx"]
    script = f"import sys; sys.modules.update(dict.fromkeys({absent})); " + "; ".join(
        f"import docs._ext.{module}" for module in modules
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_citation_names_the_version_and_its_date():
    citation, changes = ((ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md"))
    assert re.findall(r"^version: (\S+)$", citation, re.M) == [linattn.__version__]
    released = rf"^## {re.escape(linattn.__version__)}\b.*?(\d{{4}}-\d\d-\d\d)"
    assert re.findall(r"^date-released: (\S+)$", citation, re.M) == re.findall(released, changes, re.M)


def test_the_citation_names_the_papers_that_the_notation_names():
    cited = set(re.findall(r"arxiv\.org/abs/(\S+)", (ROOT / "CITATION.cff").read_text()))
    named = set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", (ROOT / "docs" / "notation.md").read_text()))
    listed = set(
        re.findall(r"arxiv\.org/abs/([\d.]+\d)", (ROOT / "docs" / "project" / "cite.md").read_text())
    )
    assert cited == named == listed
