"""Formulas without network: MathJax comes from an installed package, and only the files that pages load."""

from importlib.metadata import files
from pathlib import Path
from shutil import copyfile

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

PACKAGE = "sphinx-mathjax-offline"
SCRIPT = "mathjax/tex-chtml.js"


def wanted() -> dict[str, Path]:
    """Return the files of MathJax that a page may load, by their path under `_static`."""
    found = {
        str(name).partition("/static/")[2]: Path(str(name.locate()))
        for name in files(PACKAGE) or []
        if name.name == Path(SCRIPT).name or name.suffix == ".woff"
    }
    if SCRIPT not in found or len(found) < 2:
        raise ExtensionError(f"{PACKAGE} has no {SCRIPT} with fonts")
    return found


def copy(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for name, path in wanted().items():
            target = Path(app.outdir, "_static", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, target)


def setup(app: Sphinx) -> dict[str, bool]:
    app.config.mathjax_path = SCRIPT
    app.config.mathjax3_config = {"chtml": {"displayAlign": "left", "displayIndent": "2em"}}
    app.connect("build-finished", copy, priority=100)  # before the check of links
    return {"parallel_read_safe": True, "parallel_write_safe": True}
