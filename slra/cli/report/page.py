"""The report as one HTML page that loads nothing: light and dark, on a phone or a desk."""

import io
import re
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from slra.cli.demo import METHODS
from slra.cli.plots import METHOD_STYLES
from slra.cli.report.advice import advise
from slra.cli.report.measure import TOLERANCES, LayerReport
from slra.cli.report.output import heads_rows, methods_rows

__all__ = ["page"]

# Replaced by the colour of the text around, so that one picture serves light and dark.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
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
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.4rem; text-align: right; border-bottom: 1px solid #8886; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; }
"""


def page(reports: list[LayerReport], source: str) -> str:
    """Return the page; it is well-formed XML too."""
    body = "".join(_section(report) for report in reports)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>slra report: {escape(source)}</title><style>{_CSS}</style></head>"
        f"<body><h1>How far this attention can be compressed</h1><p>{escape(source)}</p>{body}</body></html>\n"
    )


def _section(report: LayerReport) -> str:
    layer = report.layer
    shapes = ", ".join(f"{name.upper()} {getattr(layer, name).shape}" for name in "qkv")
    advice = " ".join(advise(report))
    limits = [f"{tolerance:.0%}" for tolerance in TOLERANCES]
    by_method = _table(
        ["method", "within", "median rank", "largest rank", "K, V / exact"], methods_rows(report)
    )
    by_head = _table(
        ["head", "eff. Q", "eff. K", "eff. V", *(f"rank {x}" for x in limits)], heads_rows(report)
    )
    return (
        f"<section><h2>{escape(layer.name)}</h2><p>{escape(shapes)}, {escape(layer.dtype)}</p>"
        f"<p><strong>{escape(advice)}</strong></p>{_picture(report)}"
        f"<h3>Rank within a tolerance of the output</h3>{by_method}"
        "<p>Errors are relative, in the Frobenius norm, per head. Bytes: each head at the rank it needs.</p>"
        f"<details><summary>Each head</summary>{by_head}<p>Effective rank: exp of the entropy of the "
        f"singular values. Ranks needed by {escape(report.best)}.</p></details></section>"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _picture(report: LayerReport) -> str:
    """Error against rank over the spectra, as inline SVG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 5.4), layout="constrained")
        errors, spectra = figure.subplots(2, 1)
        for method, (color, marker) in zip(METHODS, METHOD_STYLES, strict=True):
            found = report.errors[method]
            errors.fill_between(report.ranks, found.min(1), found.max(1), color=color, alpha=0.15)
            middle = np.median(found, axis=1)
            errors.plot(report.ranks, middle, color=color, marker=marker, ms=3, label=method)
        errors.set(
            title="Error of the output: median, best to worst head",
            xlabel="rank",
            ylabel="relative error",
        )
        errors.set_ylim(0, None)
        errors.legend()
        for (name, sigma), (color, _) in zip(report.spectra.items(), METHOD_STYLES, strict=True):
            largest = sigma[:, :1]
            share = sigma / np.where(largest == 0, 1, largest)
            index = range(1, sigma.shape[1] + 1)
            spectra.fill_between(index, share.min(0), share.max(0), color=color, alpha=0.15)
            spectra.plot(index, np.median(share, axis=0), color=color, label=name.upper())
        spectra.set(
            title="Spectra: median, range over heads",
            xlabel="index i",
            ylabel="singular value σᵢ / σ₁",
        )
        spectra.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Names that nothing refers to would be the same in every layer's picture.
    return re.sub(r'<g id="[^"]*"', "<g", svg).replace(_INK, "currentColor")
