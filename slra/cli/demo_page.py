"""The demo as one HTML page."""

from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from slra.cli import demo_pays
from slra.cli.demo import MAP_HEAD, MAP_RANK, METHODS, Comparison
from slra.cli.demo_output import CAPTION, HEADERS, rows, title, verdict
from slra.cli.page import STYLE, document, svg, table
from slra.cli.plots import draw_errors, draw_maps, draw_spectra
from slra.data import AttentionSample

__all__ = ["page"]


def page(sample: AttentionSample, comparison: Comparison, paid: list[demo_pays.Pay]) -> str:
    """Return the page; it is well-formed XML too."""
    cells = table(HEADERS, rows(comparison))
    return document(
        "slra demo",
        "What low-rank attention costs and saves",
        f"<p>{escape(title(comparison))}</p><p><strong>{escape(verdict(comparison))}</strong></p>"
        f"<h2>Error against rank</h2>{_errors(comparison)}{cells}"
        f'<p class="note">{escape(CAPTION)}</p>'
        f"<h2>{demo_pays.TITLE}</h2>{table(demo_pays.HEADERS, demo_pays.cells(paid))}"
        f'<p class="note">{escape(demo_pays.CAPTION)}</p>'
        f"<h2>Spectra of six heads, the easiest to compress first</h2>{_spectra(sample)}"
        f'<h2>An attention map</h2><div class="wide" tabindex="0">{_maps(sample, comparison)}</div>',
    )


def _errors(comparison: Comparison) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.8), layout="constrained")
        draw_errors(figure.subplots(), comparison)
    return svg(figure, "Error of the attention output against rank, by method")


def _spectra(sample: AttentionSample) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 6.2), layout="constrained")
        draw_spectra(figure.subplots(3, 1), sample, darkest=0.25)
    return svg(figure, "Singular values of Q, K and V of each head")


def _maps(sample: AttentionSample, comparison: Comparison) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 9.4), layout="constrained")
        axes = figure.subplots(2, 1)
        draw_maps(figure, axes, sample, comparison)
        for axis in axes:
            axis.set_ylabel("query token")
    return svg(
        figure,
        f"Attention weights of head {MAP_HEAD} of the sample, exact and by {METHODS[-1]} at rank {MAP_RANK}",
    )
