"""Every page of docs/learn as an .ipynb to download, made while the site is built."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
from docutils import nodes
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from sphinx.application import Sphinx

from .excerpts import inlined
from .links import LINK, prose

FOLDER = "learn"
NEEDS = """To run this page: Jupyter with linattn, or Colab (File, Upload notebook) and beside it a wheel of
linattn, which `pip wheel --no-deps .` makes in a checkout."""
WHERE = ", for Jupyter, or for Colab (File, Upload notebook)"
INSTALL = """from importlib.util import find_spec
from pathlib import Path

if find_spec("linattn") is None:
    wheels = sorted(str(wheel) for wheel in Path().glob("linattn-*.whl"))
    assert wheels, "upload a wheel of linattn: `pip wheel --no-deps .` makes one in a checkout"
    %pip install --quiet {wheels[-1]} matplotlib ml_dtypes"""


def alone(text: str) -> str:
    """Return a page's text for a notebook on its own: of links, only those to walkthroughs stay."""

    def link(match: re.Match[str]) -> str:
        target = Path(match[2])
        if target.suffix == ".md" and target.parent == Path():
            return f"[{match[1]}]({target.with_suffix('.ipynb')})"
        return match[1]

    return "".join(LINK.sub(link, piece) if is_prose else piece for is_prose, piece in prose(text))


def notebook(page: Path) -> NotebookNode:
    """Return a page as a notebook, which begins by making sure that linattn is there."""
    made = jupytext.reads(alone(inlined(page.read_text(), page)), fmt="md:myst")
    made.cells[1:1] = [new_markdown_cell(NEEDS), new_code_cell(INSTALL)]
    return made


def is_notebook(docname: str) -> bool:
    return docname.startswith(f"{FOLDER}/") and not docname.endswith("/index")


def offer(app: Sphinx, doctree: nodes.document) -> None:
    """Put a link to the notebook below the title."""
    docname = app.env.docname
    if is_notebook(docname):
        leaf = f"{Path(docname).name}.ipynb"
        said = f'<a href="{leaf}" download>Download as a notebook</a>{WHERE}'
        link = nodes.raw("", f'<p class="download">{said}</p>', format="html")
        title = next(iter(doctree.findall(nodes.title)))
        title.parent.insert(title.parent.index(title) + 1, link)


def write(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for docname in filter(is_notebook, app.env.found_docs):
            jupytext.write(notebook(Path(app.env.doc2path(docname))), Path(app.outdir, f"{docname}.ipynb"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", offer)
    app.connect("build-finished", write, priority=100)  # before the check of links
    return {"parallel_read_safe": True, "parallel_write_safe": True}
