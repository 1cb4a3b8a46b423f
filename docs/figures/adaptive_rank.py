"""Ranks that a tolerance gives six heads, beside the least that would do; and errors against tolerances."""

from dataclasses import replace

import numpy as np

import slra
from benchmarks.fidelity import synthetic
from docs.figures.style import BLACK, BLUE, GREEN, ORANGE, SKY, figure, relative_error
from slra.data import load_sample

RTOL = 0.1
TOLERANCES = (0.05, 0.1, 0.2)


def errors_of_pairs(basis: slra.AttentionBasis, q, k, v, exact) -> np.ndarray:
    """Return true errors by head: the first r columns of a basis for q and k (rows), the first p for v (columns)."""
    width = k.shape[-1]
    table = np.empty((len(q), width, width))
    for rank in range(1, width + 1):
        ranks = tuple((min(rank_qk, rank), rank_v) for rank_qk, rank_v in basis.ranks)
        cut = replace(basis, wq=basis.wq[..., :rank], wk=basis.wk[..., :rank], ranks=ranks)
        # In the coordinates of the values a lower rank leaves the last ones out, and the columns are orthonormal.
        out = (cut.attend(q, k, v) - basis.mu) @ basis.wv
        wanted = (exact - basis.mu) @ basis.wv
        for rank_v in range(1, width + 1):
            kept = np.where(np.arange(width) < rank_v, out, 0)
            table[:, rank - 1, rank_v - 1] = np.linalg.norm(kept - wanted, axis=(-2, -1))
    return table / np.linalg.norm(exact, axis=(-2, -1))[:, None, None]


def draw():
    """Draw the ranks of each head, and what the error comes to where not all queries were seen."""
    sample = load_sample()
    q, k, v = (x.astype(float) for x in sample[:3])
    exact = slra.attention(q, k, v)
    result = figure(6.8)
    above, below = result.subplots(2, 1)
    numbers = _ranks(above, sample, q, k, v, exact)
    numbers["largest_error_over_rtol"] = _errors(below, q, k, v, exact)
    return result, numbers


def _ranks(axis, sample, q, k, v, exact):
    basis = slra.fit_attention(q, k, v, rtol=RTOL)
    rank_qk, rank_v = np.transpose(basis.ranks)
    # A tolerance that nothing meets but the full rank: all columns, which are the same for every tolerance.
    table = errors_of_pairs(slra.fit_attention(q, k, v, rtol=1e-12), q, k, v, exact)
    each = np.arange(1, k.shape[-1] + 1)
    sums = np.add.outer(each, each)
    least = [int(sums[errors <= RTOL].min()) for errors in table]
    common = int(each[np.all(np.diagonal(table, axis1=1, axis2=2) <= RTOL, axis=0)][0])

    heads = np.arange(len(q))
    axis.bar(heads, rank_qk, color=BLUE, width=0.6, label="rank of queries and keys")
    axis.bar(heads, rank_v, bottom=rank_qk, color=SKY, width=0.6, label="rank of values")
    axis.plot(heads, least, "D", color=BLACK, label="least of all pairs")
    axis.axhline(2 * common, color="#777777", ls="--", lw=1.1)
    axis.text(-0.4, 2 * common + 1, f"one rank for all: 2 × {common}", fontsize=9, color="#444444")
    labels = [f"L{layer}\nh{head}" for layer, head in zip(sample.layer, sample.head, strict=True)]
    axis.set(title=f"Ranks for rtol = {RTOL}", ylabel="rank (of 32 + 32)", ylim=(0, 98))
    axis.set_xticks(heads, labels)
    axis.set_xlabel("layer and head of MiniLM-L6")
    axis.legend(loc="upper left", ncols=2, columnspacing=1)
    ranks = [list(pair) for pair in basis.ranks]
    return {"ranks": ranks, "least_sums": least, "common_rank": common}


def _errors(axis, q, k, v, exact):
    """Mark errors against tolerances for three relations of what a fit saw and what the error is of."""
    long = synthetic("power-law", heads=3, n=2 * q.shape[-2], d=k.shape[-1])
    cases = (
        ("every query seen", (q, k, v), 1, exact, BLUE, "s"),
        ("512 of 1024 sampled (power law)", long, 1, slra.attention(*long), GREEN, "^"),
        ("used for other queries too", (q, k, v), 2, exact, ORANGE, "o"),
    )
    axis.plot(TOLERANCES, TOLERANCES, color=BLACK, lw=1.1, label="error = rtol")
    worst = {}
    for shift, (name, data, every, right, color, marker) in zip(
        (0.95, 1, 1.05), cases, strict=True
    ):
        for rtol in TOLERANCES:
            basis = slra.fit_attention(data[0][:, ::every], *data[1:], rtol=rtol)
            errors = relative_error(basis.attend(*data), right, axis=(-2, -1))
            worst[name] = max(worst.get(name, 0.0), float(np.max(errors)) / rtol)
            x = np.full(len(errors), rtol * shift)
            label = name if rtol == RTOL else None
            axis.plot(x, errors, marker, color=color, fillstyle="none", label=label)
    axis.set(
        title="True error of each head",
        xlabel="rtol asked for",
        ylabel="relative error",
        ylim=(0.025, 0.5),
        xscale="log",
        yscale="log",
    )
    ticks = [f"{x:g}" for x in TOLERANCES]
    axis.set_xticks(TOLERANCES, ticks)
    axis.set_yticks(TOLERANCES, ticks)
    axis.minorticks_off()
    axis.legend()
    return worst
