"""Formulas as MathML, which browsers draw by themselves: no script, no network."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def mathml(latex: str, display: str) -> str:
    """Convert, and refuse what the converter would leave as it is."""
    known = re.sub(r"\\\s", r"\\; ", latex).replace(r"\arg\min", r"\operatorname{arg\,min}")
    formula = convert(known, display=display)
    if "\\" in formula:
        raise ValueError(f"a command is not known to latex2mathml: {latex!r}")
    return formula


def inline(translator, node: nodes.math) -> None:
    """Write a formula in a sentence."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(translator, node: nodes.math_block) -> None:
    """Write a formula in a paragraph of its own."""
    translator.body.append(translator.starttag(node, "div", CLASS="formula"))
    translator.body.append(mathml(node.astext(), "block") + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
