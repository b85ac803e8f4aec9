"""`{support} name`: a table of `combinations`, made while the site is built."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from . import combinations

TABLES = {"backends": combinations.table, "widths": combinations.widths, "pairs": combinations.pairs}


class Support(SphinxDirective):
    """The table of that name: "backends", "widths" or "pairs"."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return list(self.parse_text_to_nodes(TABLES[self.arguments[0]]()))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("support", Support)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
