"""Sphinx configuration: ``sphinx-build -W docs docs/_build``."""

import slra

project = "slra"
author = "The slra developers"
copyright = f"2026, {author}"
version = release = slra.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_parser",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
# Links to sections, as GitHub names them.
myst_heading_anchors = 3
autosummary_generate = True
autosummary_imported_members = False
numpydoc_show_class_members = False
exclude_patterns = ["_build"]
# Names in single backticks in docstrings are references where they can be.
default_role = "autolink"

html_theme = "pydata_sphinx_theme"
html_title = "slra"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
templates_path = ["_templates"]
html_sidebars = {"**": ["pages.html"], "index": []}
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "navbar_center": []}
