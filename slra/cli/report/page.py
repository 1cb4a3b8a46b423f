"""The report as one HTML page."""

from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from slra.cli.demo import METHODS
from slra.cli.page import STYLE, document, svg, table
from slra.cli.plots import METHOD_STYLES
from slra.cli.report.advice import advise
from slra.cli.report.measure import LayerReport
from slra.cli.report.output import (
    BITS_CAPTION,
    BITS_HEADERS,
    HEAD_HEADERS,
    METHOD_HEADERS,
    OVERVIEW_CAPTION,
    OVERVIEW_HEADERS,
    attends,
    bits_rows,
    heads_rows,
    methods_rows,
    overview_rows,
)

__all__ = ["page"]


def page(reports: list[LayerReport], source: str) -> str:
    """Return the page; it is well-formed XML too."""
    sections = "".join(_section(report) for report in reports)
    return document(
        f"slra report: {source}",
        "How far this attention can be compressed",
        f"<p>{escape(source)}</p>{_overview(reports)}{sections}",
    )


def _overview(reports: list[LayerReport]) -> str:
    if len(reports) == 1:
        return ""
    cells = table(OVERVIEW_HEADERS, overview_rows(reports))
    return f'<h2>All layers</h2>{cells}<p class="note">{escape(OVERVIEW_CAPTION)}</p>'


def _section(report: LayerReport) -> str:
    layer = report.layer
    shapes = ", ".join(f"{name.upper()} {getattr(layer, name).shape}" for name in "qkv")
    advice = " ".join(advise(report))
    return (
        f"<section><h2>{escape(layer.name)}</h2><p>{escape(shapes)}, {escape(layer.dtype)}, {attends(layer)}</p>"
        f"<p><strong>{escape(advice)}</strong></p>{_picture(report)}"
        f"<h3>Rank within a tolerance of the output</h3>"
        f"{table(METHOD_HEADERS, methods_rows(report))}"
        '<p class="note">Errors are relative, in the Frobenius norm, per head. '
        f"K, V: bytes over exact, each head at the rank it needs.</p>{_bits(report)}"
        f"<details><summary>Each head</summary>{table(HEAD_HEADERS, heads_rows(report))}"
        '<p class="note">Effective rank: exp of the entropy of the '
        f"singular values. Ranks needed by {escape(report.best)}.</p></details></section>"
    )


def _bits(report: LayerReport) -> str:
    rows = bits_rows(report)
    if not rows:
        return ""
    return f'<h3>Bits instead of ranks</h3>{table(BITS_HEADERS, rows)}<p class="note">{escape(BITS_CAPTION)}</p>'


def _picture(report: LayerReport) -> str:
    """Error against rank over the spectra, as inline SVG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 5.0), layout="constrained")
        errors, spectra = figure.subplots(2, 1)
        for method, (color, marker) in zip(METHODS, METHOD_STYLES, strict=True):
            found = report.errors[method]
            errors.fill_between(report.ranks, found.min(1), found.max(1), color=color, alpha=0.15)
            middle = np.median(found, axis=1)
            errors.plot(report.ranks, middle, color=color, marker=marker, ms=3, label=method)
        errors.set(
            title="Error of the output"
            + (", held out" if report.is_held_out else "")
            + ": median, range",
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
    return svg(figure, "Error of the attention output against rank, and spectra of Q, K and V")
