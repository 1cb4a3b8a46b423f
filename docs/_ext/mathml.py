"""Formulas as MathML, which browsers draw by themselves: no script, no network."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def _write(translator, node: nodes.Element, *, display: str) -> None:
    formula = convert(
        node.astext().replace(r"\arg\min", r"\operatorname{arg\,min}"), display=display
    )
    if "\\" in formula:  # what is not known is left as it is
        raise ValueError(f"a command is not known to latex2mathml: {node.astext()!r}")
    translator.body.append(formula)
    raise nodes.SkipNode


def inline(translator, node: nodes.math) -> None:
    _write(translator, node, display="inline")


def block(translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="formula"))
    try:
        _write(translator, node, display="block")
    finally:
        translator.body.append("</div>\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
