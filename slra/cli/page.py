"""HTML pages that load nothing: light and dark, on a phone or a desk."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["STYLE", "document", "svg", "table"]

# Replaced by the colour of the text around, so that one picture serves light and dark.
_INK = "#010203"
# For what is drawn for a page: `svg` wants this ink.
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.1rem; margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 0.75rem; }
h3 { font-size: 1rem; }
svg { display: block; width: 100%; max-width: 28rem; height: auto; margin-bottom: 0.75rem; }
.wide { overflow-x: auto; }
.wide svg { min-width: 30rem; max-width: none; }
.note { font-size: 0.85rem; opacity: 0.8; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.4rem; text-align: right; border-bottom: 1px solid #8886; white-space: pre; }
th { vertical-align: bottom; line-height: 1.2; }
th:first-child, td:first-child { text-align: left; }
"""


def document(title: str, heading: str, body: str) -> str:
    """Return a page; it is well-formed XML if its body is. The body is markup, the rest is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><h1>{escape(heading)}</h1>{body}</body></html>\n"
    )


def table(header: Sequence[str], rows: list[list[str]]) -> str:
    """Return a table of text cells, which scrolls by itself where it is too wide."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        '<div class="wide" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def svg(figure: Figure, description: str) -> str:
    """Return a figure that was drawn under `STYLE` as inline SVG, its text as text."""
    file = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Names that nothing refers to would be the same in every picture of a page.
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace(_INK, "currentColor")
    label = f'<svg role="img" aria-label="{escape(description)}"'
    return text.replace("<svg", label, 1)
