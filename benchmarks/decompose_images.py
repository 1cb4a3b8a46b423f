"""Two pictures of robust PCA: a moving foreground, and the outlier channels of real keys.

    python -m benchmarks.decompose_images     about a minute; writes benchmarks/results/decompose_images.json and .png

The frames are composed, not filmed: a photograph that ships with scikit-learn under a light that changes, and a patch
of another one that moves across it. So the truth is known. Needs the ``bench`` extra and Pillow.
"""

from typing import Any

import numpy as np

import slra
from benchmarks.common import RESULTS, save
from benchmarks.minilm import load_qkv

N_FRAMES, PATCH = 60, 24
Array = np.ndarray[Any, Any]


def frames() -> tuple[Array, Array]:
    """Return frames (N_FRAMES, height, width) in [0, 1.2] and where the foreground is."""
    from sklearn.datasets import load_sample_image

    background, other = (
        load_sample_image(name)[::4, ::4].mean(axis=-1) / 255
        for name in ("china.jpg", "flower.jpg")
    )
    height, width = background.shape
    patch = other[40 : 40 + PATCH, 60 : 60 + PATCH]
    film, where = np.empty((N_FRAMES, height, width)), np.zeros((N_FRAMES, height, width), bool)
    for i in range(N_FRAMES):
        film[i] = background * (1 + 0.2 * np.sin(2 * np.pi * i / N_FRAMES))
        left = round(i * (width - PATCH) / (N_FRAMES - 1))
        top = round((height - PATCH) * (0.5 + 0.3 * np.sin(6 * np.pi * i / N_FRAMES)))
        film[i, top : top + PATCH, left : left + PATCH] = patch
        where[i, top : top + PATCH, left : left + PATCH] = True
    return film, where


def separate() -> tuple[dict[str, Any], list[Array]]:
    """Separate the film; report the error of the background and what is found of the foreground."""
    film, where = frames()
    result = slra.robust_pca(film.reshape(N_FRAMES, -1), rng=0)
    low_rank, sparse = (x.reshape(film.shape) for x in (result.low_rank, result.sparse))
    light = 1 + 0.2 * np.sin(2 * np.pi * np.arange(N_FRAMES) / N_FRAMES)
    truth = np.median(film / light[:, None, None], axis=0) * light[:, None, None]
    report = {
        "shape": list(film.reshape(N_FRAMES, -1).shape),
        "iterations": result.n_iter,
        "converged": result.converged,
        "rank": int(
            np.linalg.matrix_rank(result.low_rank, tol=1e-6 * np.linalg.norm(result.low_rank))
        ),
        "relative error of the background": float(
            np.linalg.norm(low_rank - truth) / np.linalg.norm(truth)
        ),
        "foreground pixels found": float(np.mean(np.abs(sparse[where]) > 0.02)),
        "background pixels taken for foreground": float(np.mean(np.abs(sparse[~where]) > 0.02)),
    }
    shown = N_FRAMES // 3
    return report, [film[shown], low_rank[shown], np.abs(sparse[shown])]


def outlier_channels() -> tuple[dict[str, Any], Array]:
    """Share of the energy of the sparse part that lies in the three largest of the 32 channels of each head."""
    _, k, _ = load_qkv()
    heads = k.reshape(-1, *k.shape[-2:])
    shares = np.empty((len(heads), heads.shape[-1]))
    for share, x in zip(shares, heads, strict=True):
        sparse = slra.robust_pca(x, max_iter=300, rng=0).sparse
        energy = np.sum(sparse.astype("float64") ** 2, axis=0)
        share[:] = energy / max(float(energy.sum()), 1e-300)
    ordered = -np.sort(-shares, axis=-1)
    top = ordered[:, :3].sum(axis=-1)
    report = {
        "heads": len(heads),
        "share of the three largest channels, even split": round(3 / shares.shape[-1], 4),
        "share of the three largest channels, median": round(float(np.median(top)), 4),
        "heads where they hold more than half": int(np.sum(top > 0.5)),
    }
    return report, ordered


def draw(pictures: list[Array], shares: Array) -> None:
    """Draw one frame, its parts, and the channels of each head."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    titles = ("frame", "low rank: the background", "sparse: the foreground")
    for axis, picture, title in zip(axes.flat, pictures, titles, strict=False):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    axis = axes[1, 1]
    axis.plot(np.arange(1, shares.shape[1] + 1), shares.T, color="C0", alpha=0.15, lw=1)
    axis.plot(np.arange(1, shares.shape[1] + 1), np.median(shares, axis=0), color="C1", lw=2)
    axis.set(
        title="sparse part of the keys of 72 heads",
        xlabel="channel, largest first",
        ylabel="share of energy",
        yscale="log",
        ylim=(1e-4, 1),
    )
    figure.savefig(RESULTS / "decompose_images.png", dpi=110)


def main() -> None:
    """Measure, draw and write."""
    film, pictures = separate()
    channels, shares = outlier_channels()
    print(film, channels, sep="\n")
    print(save("decompose_images", {"film": film, "outlier channels of keys": channels}))
    draw(pictures, shares)


if __name__ == "__main__":
    main()
