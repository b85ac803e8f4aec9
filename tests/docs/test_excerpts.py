"""What pages show of the sources is there: each excerpt is found by words that one line alone has."""

import re
from pathlib import Path

import pytest

from docs._ext import excerpts

ROOT = Path(__file__).parent.parent.parent
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "{literalinclude}" in page.read_text()]
LONGEST = 32  # lines: more is a listing, not an excerpt
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


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("begin\nbegin\nend\n", "2 lines of some.cu have 'begin', not one"),
        ("end\n", "0 lines of some.cu have 'begin', not one"),
        ("end\nbegin\n", "some.cu has no 'end' after 'begin'"),
    ],
)
def test_words_that_do_not_lead_there(tmp_path, source, problem):
    (tmp_path / "some.cu").write_text(source)
    with pytest.raises(ValueError, match=re.escape(problem)):
        of(tmp_path, "at: end")
