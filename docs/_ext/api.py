"""The API pages: `{api} module` with names below it lists them, from signatures and docstrings."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from .entries import entry


class Api(SphinxDirective):
    """`{api} module`: the names below it, one a line, each with a remark behind a colon or without."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module = self.arguments[0]
        lines = [line.partition(":") for line in self.content if line.strip()]
        text = (
            f"```{{py:currentmodule}} {module}\n```\n\n"  # so that annotations find their own module's names
        )
        text += "\n".join(entry(module, name.strip(), remark.strip()) for name, _, remark in lines)
        return list(self.parse_text_to_nodes(text))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
