"""What pages show of the sources is there: each excerpt is found by words that one line alone has.

The page on the kernel makes tables of excerpts itself (`beside`), as its notebook does, and reads records.
"""

import re
from html import unescape
from importlib.resources import files
from pathlib import Path

import pytest

import linattn
from docs._ext import excerpts
from docs._ext.links import cells

ROOT = Path(__file__).parent.parent.parent
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "{literalinclude}" in page.read_text()]
LONGEST = 32  # lines: more is a listing, not an excerpt
KERNEL = ROOT / "docs" / "learn" / "kernel.md"
RECORDED = """# Benchmarks

## On a processor

- GPU: none
| case | floor ms | ours ms |

## On a GPU

Some words. - GPU: no fact

- GPU: one
- forward, 4 32: no fact
| what | who |
| --- | --- |
| host | linattn |
<details>

| case | who | ms |
| --- | --- | --- |
| a | linattn triton | 1 |
| a | fla chunk | 2 |
| b | linattn cupy | – |

</details>

| case, B H N D | who | ms |
| --- | --- | --- |
| a | linattn | 1 |

| case | floor ms | ours ms |
| --- | --- | --- |
| a | 0.5 | 1 |

## Whole models
- GPU: another
"""
TEXT = "```{literalinclude} some.cu\n:language: cpp\n:start-at: begin\n:end-%s\n```"


def of(folder: Path, end: str) -> tuple[str, str]:
    match = excerpts.FENCE.search(TEXT % end)
    assert match
    return excerpts.excerpt(match, folder / "page.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_excerpt_is_found_and_has_its_true_lines(page):
    text = page.read_text()
    found = list(excerpts.excerpts(page))
    assert len(found) == text.count("{literalinclude}"), "each fence has the options that are looked for"
    for (language, lines), match in zip(found, excerpts.FENCE.finditer(text), strict=True):
        assert 0 < lines.count("\n") <= LONGEST, lines
        assert language == ("python" if match[1].endswith(".py") else "cpp")
        assert ":lineno-match:" in match[2], "its line numbers are the file's"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_notebook_has_the_lines_themselves(page):
    alone = excerpts.inlined(page.read_text(), page)
    assert "literalinclude" not in alone
    assert all(f"```{language}\n{lines}```" in alone for language, lines in excerpts.excerpts(page))


def test_where_an_excerpt_ends(tmp_path):
    (tmp_path / "some.cu").write_text("end\n  begin {\n    x;\n  } // end\n  end\n")
    assert of(tmp_path, "at: end") == ("cpp", "begin {\n  x;\n} // end\n")
    assert of(tmp_path, "before: end") == ("cpp", "begin {\n  x;\n")
    assert of(tmp_path, "at: begin") == ("cpp", "begin {\n"), "one line"


ASTRAY = pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("begin\nbegin\nend\n", "2 lines of some.cu have 'begin', not one"),
        ("end\n", "0 lines of some.cu have 'begin', not one"),
        ("end\nbegin\n", "some.cu has no 'end' after 'begin'"),
    ],
)


@ASTRAY
def test_words_that_do_not_lead_there(tmp_path, source, problem):
    (tmp_path / "some.cu").write_text(source)
    with pytest.raises(ValueError, match=re.escape(problem)):
        of(tmp_path, "at: end")


def cell(text: str, words: str) -> str:
    """The one cell of a page with these words."""
    (found,) = (code for code in cells(text) if words in code)
    return found


def beside(sources: Path) -> dict[str, object]:
    """The names of the cell that makes tables of excerpts, with other sources."""
    names: dict[str, object] = {"re": re, "Path": Path, "sources": sources}
    exec(cell(KERNEL.read_text(), "def beside("), names)
    return names


def plain(html: str) -> str:
    """The text of HTML, a line for each line of code."""
    return unescape(re.sub(r"<[^>]*>", "", html.replace('<span class="line"', '\n<span class="line"')))


def test_a_table_has_the_lines_of_its_sources(tmp_path):
    (tmp_path / "a.cu").write_text("x\n  if (a < b) {\n    c();\n  }\n")
    (tmp_path / "b.py").write_text("y = 1\n")
    shown = beside(tmp_path)["beside"]({"A": "a.cu"}, ("if (a ... }\nb.py: y =", "`a` & b"))._repr_html_()
    assert "lines 2–4\nif (a < b) {\nc();\n}b.py, line 1\ny = 1" in plain(shown)
    assert '--indent: 2">' in shown and "<code>a</code> &amp; b" in shown
    assert [plain(head) for head in re.findall("<th .*?</th>", shown)] == ["A", "What it does"]


@ASTRAY
def test_a_table_without_its_lines_fails(tmp_path, source, problem):
    (tmp_path / "some.cu").write_text(source)
    with pytest.raises(ValueError, match=re.escape(problem)):
        beside(tmp_path)["beside"]({"A": "some.cu"}, ("begin ... end", ""))


def test_tables_of_the_page_are_found_in_what_is_installed():
    names = beside(files("linattn"))
    tables = [code for code in cells(KERNEL.read_text()) if code.startswith("beside(")]
    assert len(tables) > 2
    for table in tables:
        exec(table, dict(names))


def test_records_are_facts_and_our_rows():
    assert excerpts.records(RECORDED).splitlines() == [
        "## On a GPU",
        "- GPU: one",
        "",
        "| case | who | ms |",
        "| --- | --- | --- |",
        "| a | linattn triton | 1 |",
        "| b | linattn cupy | – |",
        "",
        "| case | floor ms | ours ms |",
        "| --- | --- | --- |",
        "| a | 0.5 | 1 |",
    ]
    with pytest.raises(ValueError, match=re.escape("tables that begin | case | floor ms |")):
        excerpts.records(RECORDED.replace("| case | floor ms |", "| case | floor |"))
    with pytest.raises(ValueError, match="no GPU section"):
        excerpts.records("# Benchmarks")


def test_a_notebook_has_the_records_of_its_page():
    pages = KERNEL.read_text(), excerpts.inlined(KERNEL.read_text(), KERNEL)
    here, alone = (cell(text, "recorded = ") for text in pages)
    assert here != alone and "benchmarks.md" not in alone
    of_page, of_notebook = ({"re": re, "Path": Path, "linattn": linattn} for _ in range(2))
    exec(here, of_page)
    exec(alone, of_notebook)
    for name in ("every", "errors"):
        assert of_page[name] and of_page[name] == of_notebook[name]
    floors, facts = "case | floor ms", r"^- ([\w -]+): (.*)$"
    assert of_page["table"](floors) == of_notebook["table"](floors)
    assert dict(re.findall(facts, of_page["recorded"], re.M)) == dict(
        re.findall(facts, of_notebook["recorded"], re.M)
    )
