"""Settings of the documentation site: `make docs` builds it, without network, and takes no warning."""

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the extensions of this site

import linattn  # noqa: E402

project = "linattn"
author = "the linattn authors"
release = version = linattn.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "_ext.mathjax",
    "_ext.pages",
    "_ext.api",
    "_ext.support",
    "_ext.notebooks",
    "_ext.check",
]
root_doc = "index"
exclude_patterns = ["_build", "_ext", "README.md"]  # README.md is GitHub's index of this folder

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
smartquotes = False  # prose here is full of options and literals: --gpu, "elu+1"
myst_heading_anchors = 4
myst_url_schemes = (
    "http",
    "https",
    "mailto",
    "source",
)  # source: a file of the repository, see _ext/pages.py

# pages that verify kernels would leave their database of examples beside the sources
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "linattn-examples"))
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_execution_show_tb = True

html_theme = "furo"
html_title = f"linattn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
pygments_style = "tango"
pygments_dark_style = "github-dark"

suppress_warnings = ["ref.python"]  # an annotation names a class that two modules have: one of them is linked
python_maximum_signature_line_length = 90
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
