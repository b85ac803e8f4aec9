"""Every page of docs/learn as an .ipynb to download, made while the site is built.

Its first cell installs what the page imports. Where `[project.urls]` of pyproject.toml names a repository on
GitHub, a page has a button that opens its notebook in Colab, as the site is published in that repository.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .excerpts import inlined
from .links import LINK, ROOT, cells, prose

if TYPE_CHECKING:
    from docutils import nodes
    from nbformat import NotebookNode
    from sphinx.application import Sphinx

FOLDER = "learn"
BRANCH = "gh-pages"  # of the repository: where the built site is published, and with it the notebooks
URLS = ("repository", "source", "source code", "github", "homepage")  # names of it in [project.urls]

IMPORT = re.compile(r"^[ \t]*(?:from ([\w.]+) import (.+)|import (.+))$", re.M)  # also of programs in strings
SOUGHT = re.compile(r"find_spec\(['\"](\w+)['\"]\)")
REACHED = re.compile(r"\blinattn(?:\.\w+)+")
# What needs an extra of pyproject.toml, wherever it is imported
EXTRAS = {
    "linattn.backends.triton": "triton",
    "linattn.integrations": "transformers",
    "linattn.models": "models",
    "linattn.models.cosformer": "transformers",
    "linattn.models.transnormer": "transformers",
    "linattn.nn": "torch",
    "linattn.testing": "testing",
    "linattn.train": "models",
}
PACKAGES = {"fla": "fla-core"}  # what is installed under another name than it is imported by
ALSO = {"fla": {"torch"}}  # what a package imports and does not require
BROUGHT = {"IPython", "numpy", "pygments"}  # by Jupyter or linattn

NEEDS = """To run this page: Jupyter, or Colab (File > Upload notebook) and beside it a wheel of linattn,
which `pip wheel --no-deps .` makes in a checkout. The next cell installs it, and what else this page imports,
where that is missing."""
FETCHED = """To run this page: Jupyter or Colab. The next cell installs linattn, and what else this page
imports, where that is missing."""
FIND = """from importlib.util import find_spec
from pathlib import Path

needs = {needs}
missing = [package for module, package in needs.items() if find_spec(module) is None]
"""
WHEEL = """if find_spec("linattn") is None:
    wheels = sorted(str(wheel) for wheel in Path().glob("linattn-*.whl"))
    assert wheels, "upload a wheel of linattn: `pip wheel --no-deps .` makes one in a checkout"
    missing.append(wheels[-1])
"""
REPOSITORY = """if find_spec("linattn") is None:
    missing.append("git+{url}")
"""
INSTALL = """if missing:
    packages = " ".join(f'"{package}"' for package in missing)
    %pip install --quiet {packages}"""


@cache
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def repository(urls: Mapping[str, str] | None = None) -> str | None:
    """Return the project's address on GitHub, `https://github.com/owner/name`, or None if it has none.

    urls: [project.urls], unless told otherwise the project's own.
    """
    named = {name.lower(): url for name, url in (project().get("urls", {}) if urls is None else urls).items()}
    for name in URLS:
        found = re.match(r"https://github\.com/[\w.-]+/[\w.-]+?(?=(?:\.git)?/?$)", named.get(name, ""))
        if found:
            return found[0]
    return None


def colab(docname: str, url: str | None) -> str | None:
    """Return the address that opens a page's notebook in Colab, of a repository's address."""
    if url is None:
        return None
    path = url.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{path}/blob/{BRANCH}/{docname}.ipynb"


def imported(text: str) -> set[str]:
    """Return every module that a page's code imports, also in programs that it runs; with what it reaches in
    linattn, `linattn.nn.SGLU`.
    """
    code = "\n".join(cells(text))
    found = {*SOUGHT.findall(code), *REACHED.findall(code)}
    for module, names, modules in IMPORT.findall(code):
        parts = (names or modules).partition("#")[0].strip("() ").split(",")
        words = [part.split()[0] for part in parts if part.strip()]
        found |= {module, *(f"{module}.{word}" for word in words)} if module else set(words)
    return found


def needed(text: str) -> dict[str, str]:
    """Return what a page needs beside linattn: requirements for pip, by the modules that they bring."""
    modules = imported(text)
    roots = {module.partition(".")[0] for module in modules}
    roots |= {other for root in roots for other in ALSO.get(root, ())}
    others = roots - {"linattn"} - BROUGHT - sys.stdlib_module_names
    found = {module: PACKAGES.get(module, module) for module in others}
    for module in modules:
        for prefix, extra in EXTRAS.items():
            if f"{module}.".startswith(f"{prefix}."):
                found |= dict(required(extra))
    return dict(sorted(found.items()))


def required(extra: str) -> Iterator[tuple[str, str]]:
    """Yield the modules and requirements of an extra, and of those that it builds upon."""
    for line in project()["optional-dependencies"][extra]:
        if inner := re.match(r"linattn\[(\w+)\]", line):
            yield from required(inner[1])
        else:
            yield re.split(r"[^\w-]", line, maxsplit=1)[0].replace("-", "_"), line


def install(text: str, url: str | None) -> tuple[str, str]:
    """Return the words and the code of the first cells of a page's notebook."""
    find = FIND.format(needs=json.dumps(needed(text), indent=4))
    where = WHEEL if url is None else REPOSITORY.format(url=url)
    return NEEDS if url is None else FETCHED, where.join((find, INSTALL))


def alone(text: str) -> str:
    """Return a page's text for a notebook on its own: of links, only those to walkthroughs stay."""

    def link(match: re.Match[str]) -> str:
        target = Path(match[2])
        if target.suffix == ".md" and target.parent == Path():
            return f"[{match[1]}]({target.with_suffix('.ipynb')})"
        return match[1]

    return "".join(LINK.sub(link, piece) if is_prose else piece for is_prose, piece in prose(text))


def notebook(page: Path) -> NotebookNode:
    """Return a page as a notebook, which begins by making sure that linattn and what it imports are there."""
    import jupytext
    from nbformat.v4 import new_code_cell, new_markdown_cell

    text = page.read_text(encoding="utf-8")
    made = jupytext.reads(alone(inlined(text, page)), fmt="md:myst")
    words, code = install(text, repository())
    made.cells[1:1] = [new_markdown_cell(words), new_code_cell(code)]
    return made


def is_notebook(docname: str) -> bool:
    return docname.startswith(f"{FOLDER}/") and not docname.endswith("/index")


def offered(docname: str, url: str | None) -> str:
    """Return the line below a page's title, as HTML: its notebook, and where Colab can open it."""
    said = f'<a href="{Path(docname).name}.ipynb" download>Download as a notebook</a>'
    if address := colab(docname, url):
        said += f', or <a href="{address}">Open in Colab</a>'
    else:
        said += ", for Jupyter, or for Colab (File &gt; Upload notebook)"
    return f'<p class="download">{said}</p>'


def offer(app: Sphinx, doctree: nodes.document) -> None:
    """Put a link to the notebook below the title."""
    from docutils import nodes

    docname = app.env.docname
    if is_notebook(docname):
        link = nodes.raw("", offered(docname, repository()), format="html")
        title = next(iter(doctree.findall(nodes.title)))
        title.parent.insert(title.parent.index(title) + 1, link)


def write(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        import jupytext

        for docname in filter(is_notebook, app.env.found_docs):
            jupytext.write(notebook(Path(app.env.doc2path(docname))), Path(app.outdir, f"{docname}.ipynb"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", offer)
    app.connect("build-finished", write, priority=100)  # before the check of links
    return {"parallel_read_safe": True, "parallel_write_safe": True}
