"""Checks the built site: each of its problems is a warning, and the build takes none."""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from .built import problems

LOG = logging.getLogger(__name__)


def check(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for problem in problems(Path(app.outdir)):
            LOG.warning(problem)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", check, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
