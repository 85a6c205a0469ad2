"""Sphinx's configuration of the site; :mod:`docs.site` stages its sources and calls it."""

from __future__ import annotations

from pathlib import Path

from seqarch import __version__

project = "seqarch"
author = "The seqarch authors"
project_copyright = "the seqarch authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docs.site.mathml"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["files/**/README.md"]
suppress_warnings = ["myst.header"]  # a page may go from its title to headings of the third level
html_math_renderer = "mathml"

myst_heading_anchors = 4
myst_fence_as_directive = ["math"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "seqarch"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css", "chooser.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_show_search_summary = False  # which would be fetched, and a page opened from a folder can fetch nothing
html_last_updated_fmt = None
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
