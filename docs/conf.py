"""Sphinx configuration: ``sphinx-build -W docs docs/_build``."""

import sys
from importlib.util import find_spec
from pathlib import Path

from sphinx.ext.autodoc.mock import _MockObject

import slra

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "slra"
author = "The slra developers"
copyright = f"2026, {author}"
version = release = slra.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "mathml",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
# Links to sections, as GitHub names them.
myst_heading_anchors = 3
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
autosummary_generate = True
# The pages of adapters need no framework; where one is, its base classes are shown.
frameworks = ("jax", "sklearn", "torch", "transformers")
autodoc_mock_imports = [name for name in frameworks if find_spec(name) is None]
# Sphinx's stand-ins know no unions, of which annotations are full.
_MockObject.__or__ = _MockObject.__ror__ = lambda self, other: self
autosummary_imported_members = False
numpydoc_show_class_members = False
exclude_patterns = ["_build", "_ext"]
# Names in single backticks in docstrings are references where they can be.
default_role = "autolink"

html_theme = "pydata_sphinx_theme"
html_title = "slra"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
templates_path = ["_templates"]
html_sidebars = {"**": ["pages.html"]}
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "navbar_center": []}
