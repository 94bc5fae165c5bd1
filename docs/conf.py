# SPDX-License-Identifier: Apache-2.0
"""The site: `make docs` builds it without network, warnings as errors, into out/docs.

Sphinx with furo and MyST, because its search is a file beside the pages (no server, no network), autodoc reads the
docstrings of the installed package, and the Markdown that stands in the repository is included as it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import kdkernels

project = "kdkernels"
copyright = "the authors of kdkernels, Apache-2.0"
release = version = kdkernels.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser", "docstrings", "measured"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False

smartquotes = False  # x' is a transpose

html_theme = "furo"
html_title = f"kdkernels {release}"
html_copy_source = html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
