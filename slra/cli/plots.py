"""The pictures of ``python -m slra demo``."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine

from slra._files import write_file
from slra.cli.demo import MAP_HEAD, MAP_RANK, MAP_TOKENS, METHODS, Comparison
from slra.data import AttentionSample

__all__ = ["METHOD_STYLES", "draw", "draw_errors", "draw_maps", "draw_spectra", "save"]

# Okabe and Ito, told apart with any colour vision; the markers tell them apart in grey.
METHOD_STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(sample: AttentionSample, comparison: Comparison) -> Figure:
    """Spectra per head, error against rank, and one attention map exact beside low rank."""
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1)  # inches
        figure = Figure(figsize=(10, 8.6), layout=layout)
        rows = figure.add_gridspec(2, 1, height_ratios=(3.3, 5.3))
        top, bottom = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
        *spectra, error = top.subplots(1, 4, width_ratios=(1, 1, 1, 1.75))
        draw_spectra(spectra, sample)
        draw_errors(error, comparison)
        draw_maps(bottom, bottom.subplots(1, 2, sharey=True), sample, comparison)
        bottom.axes[0].set_ylabel("query token")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG under its final name only when it is whole."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=180)
    write_file(path, picture.getbuffer())


def draw_spectra(axes: Sequence[Axes], sample: AttentionSample, darkest: float = 0) -> None:
    """Singular values of each head, on an axis for each of Q, K and V; a darkest of 0.25 shows on black too."""
    colors = mpl.colormaps["viridis"](np.linspace(darkest, 0.88, len(sample.layer)))
    for axis, name, x in zip(axes, "QKV", sample[:3], strict=True):
        sigma = np.linalg.svd(x, compute_uv=False)
        for i, color in enumerate(colors):
            label = f"layer {sample.layer[i]}, head {sample.head[i]}"
            ratio = sigma[i] / sigma[i, 0]
            axis.semilogy(range(1, len(ratio) + 1), ratio, color=color, lw=1.6, label=label)
        axis.set(title=f"Spectrum of {name}", xlabel="index i", xticks=(1, 8, 16, 24, 32))
        axis.sharey(axes[0])
        axis.label_outer()
    axes[0].set(ylabel="singular value σᵢ / σ₁", ylim=(0.05, 1.1))
    axes[0].set_yticks((0.05, 0.1, 0.2, 0.5, 1), ("0.05", "0.1", "0.2", "0.5", "1"))
    axes[0].minorticks_off()
    axes[0].legend(fontsize=7.5)


def draw_errors(axis: Axes, comparison: Comparison) -> None:
    """Error against rank, by method."""
    for method, (color, marker) in zip(METHODS, METHOD_STYLES, strict=False):
        rows = [row for row in comparison.rows if row.method == method]
        ranks = [row.rank for row in rows]
        errors = np.stack([row.errors for row in rows])
        axis.fill_between(ranks, errors.min(1), errors.max(1), color=color, alpha=0.15, lw=0)
        axis.plot(
            ranks, np.median(errors, 1), color=color, marker=marker, lw=2, label=f"{method}, median"
        )
    axis.set(
        title="Error of the attention output",
        xlabel="rank r of Q, K and V",
        ylabel="relative Frobenius error",
        xticks=ranks,
        ylim=(0, None),
    )
    axis.legend(title="band: best to worst head")


def draw_maps(
    figure: FigureBase, axes: Sequence[Axes], sample: AttentionSample, comparison: Comparison
) -> None:
    """One attention map, exact and of low rank, on two axes of a figure."""
    d = sample.k.shape[-1]
    tokens = sample.tokens[:MAP_TOKENS]
    where = f"layer {sample.layer[MAP_HEAD]}, head {sample.head[MAP_HEAD]}"
    titles = (f"Exact attention, {where}", f"The same by {METHODS[-1]}, rank {MAP_RANK} of {d}")
    # From the weight that an even spread over all keys would give each of them.
    scale = LogNorm(1 / len(sample.tokens), comparison.exact_map.max(), clip=True)
    maps = (comparison.exact_map, comparison.low_rank_map)
    for axis, weights, title in zip(axes, maps, titles, strict=True):
        image = axis.imshow(weights, cmap="magma", norm=scale)
        axis.grid(visible=False)
        axis.set(title=title, xlabel="key token")
        axis.set_xticks(range(MAP_TOKENS), tokens, rotation=90, fontsize=8)
        axis.set_yticks(range(MAP_TOKENS), tokens, fontsize=8)
        axis.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    ticks = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    bar.set_label(f"attention weight (sum over all {len(sample.tokens)} keys: 1)")
