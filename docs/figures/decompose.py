"""A matrix with gross errors: robust PCA takes it apart, a truncated SVD smears the errors."""

import numpy as np

import slra
from docs.figures.style import figure, relative_error

N_ROWS, N_COLUMNS, RANK = 60, 90, 3


def matrices():
    """Return a smooth matrix of rank 3, and 5 % of errors as large as its largest entries."""
    rng = np.random.default_rng(0)
    rows, columns = np.linspace(0, 1, N_ROWS), np.linspace(0, 1, N_COLUMNS)
    waves = np.arange(1, RANK + 1)
    low_rank = np.sin(np.pi * np.outer(rows, waves)) @ np.cos(np.pi * np.outer(waves, columns))
    wrong = rng.random(low_rank.shape) < 0.05
    return low_rank, np.where(wrong, rng.choice([-2.0, 2.0], low_rank.shape), 0)


def draw():
    """Draw the matrix, its two parts, and its best approximation of the same rank."""
    low_rank, sparse = matrices()
    x = low_rank + sparse
    found = slra.robust_pca(x, rng=0)
    U, S, Vh = slra.truncated_svd(x, RANK)
    cut = (U * S) @ Vh
    support = (found.sparse != 0) == (sparse != 0)
    numbers = {
        "robust_pca_error": float(relative_error(found.low_rank, low_rank)),
        "svd_error": float(relative_error(cut, low_rank)),
        "entries_misjudged": int(np.sum(~support)),
        "rank_found": int(np.linalg.matrix_rank(found.low_rank, tol=1e-5)),
    }
    panels = (
        ("x: what is given", x),
        (f"robust_pca: low rank ({numbers['rank_found']})", found.low_rank),
        ("robust_pca: sparse", found.sparse),
        (f"truncated SVD, rank {RANK}", cut),
    )
    result = figure(4.5)
    axes = result.subplots(2, 2, sharex=True, sharey=True)
    for axis, (title, matrix) in zip(axes.flat, panels, strict=True):
        image = axis.imshow(matrix, cmap="PuOr", vmin=-2.5, vmax=2.5, interpolation="nearest")
        axis.set(title=title, xticks=(0, 30, 60, 89), yticks=(0, 30, 59))
        axis.grid(visible=False)
    for axis in axes[1]:
        axis.set_xlabel("column")
    for axis in axes[:, 0]:
        axis.set_ylabel("row")
    bar = result.colorbar(image, ax=axes, shrink=0.7, location="bottom", aspect=40)
    bar.set_label("entry")
    return result, numbers
