"""Pages as `links` rewrites them, and a listing of every file of the repository, for links into sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx

from .links import INCLUDE, ROOT, whole

FOLDERS = ("backends", "docs", "linattn", "reference", "tests")
LEAVES = ("LICENSE", "Makefile", "pyproject.toml", "CITATION.cff")
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".md"}
UNLIKE = {".cu": "x.cpp", ".cuh": "x.cpp", ".cff": "x.yaml"}  # what Pygments does not know by its suffix


def read(app: Sphinx, docname: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(docname)).resolve()
    for name in INCLUDE.findall(content[0]):
        app.env.note_dependency(str((page.parent / name).resolve()))
    content[0] = whole(page)


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Turn `source:` into an address on the site."""
    for node in doctree.findall(nodes.reference):
        uri = node.get("refuri", "")
        if uri.startswith("source:"):
            path, mark, anchor = uri.removeprefix("source:").partition("#")
            node["refuri"] = app.builder.get_relative_uri(docname, f"source/{path}") + mark + anchor
            node["internal"] = True


def files() -> list[Path]:
    """Return what gets a listing: sources and texts, each once; `linattn` has links to two of the folders."""
    below = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and not {"_build", "__pycache__"} & set(path.parts)
    ]
    return sorted({path.resolve() for path in [*below, *(ROOT / leaf for leaf in LEAVES)]})


def listings(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """One page for each file, and one for each folder."""
    found = files()
    folders: dict[Path, set[str]] = {}
    for path in found:
        name = path.relative_to(ROOT)
        yield _page(str(name), _listing(path))
        for child, parent in zip([name, *name.parents], name.parents, strict=False):
            folders.setdefault(parent, set()).add(child.name)
    for folder, leaves in folders.items():
        if folder.name:
            links = [f'<li><a href="{folder.name}/{leaf}.html">{leaf}</a></li>' for leaf in sorted(leaves)]
            yield _page(str(folder), f"<ul>{''.join(links)}</ul>")


def _page(name: str, body: str) -> tuple[str, dict[str, Any], str]:
    return f"source/{name}", {"title": name, "body": f"<h1>{name}</h1>{body}"}, "page.html"


def _listing(path: Path) -> str:
    try:
        lexer = get_lexer_for_filename(UNLIKE.get(path.suffix, path.name))
    except ClassNotFound:
        lexer = get_lexer_for_filename("x.txt")
    return str(highlight(path.read_text(), lexer, HtmlFormatter(lineanchors="line", wrapcode=True)))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    app.connect("doctree-resolved", resolve)
    app.connect("html-collect-pages", listings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
