"""The settings of the documentation site: `make docs`. Pages that repeat other files are made by pages.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pages
from dodistill import __version__

project = "dodistill"
author = "The dodistill authors"
project_copyright = "the dodistill authors, Apache-2.0"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images", "made/extras.md"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # tests/test_notebooks.py runs them
suppress_warnings = ["myst.header"]  # a card may begin a section at a deeper level

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have shapes and units
autodoc_default_options = {"members": True}
napoleon_custom_sections = [("Class attributes", "params_style")]
default_role = "code"
smartquotes = False  # `--flag` in a sentence stays as it is

html_theme = "furo"
html_title = f"dodistill {version}"
html_static_path: list[str] = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False


def setup(app: Any) -> None:
    pages.write(Path(app.srcdir))
    app.connect("source-read", pages.on_source)
    app.connect("autodoc-process-docstring", pages.on_docstring)
