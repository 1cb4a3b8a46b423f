"""Take a film of a still camera apart: background into a low-rank matrix, whatever moves into a sparse one.

Each frame becomes one row of a matrix. What stands still is the same in every row, and light that comes and goes
scales it: a matrix of rank 1 or 2. Whatever moves covers few pixels, and other ones each time: a sparse matrix.
Robust PCA splits their sum, with no notion of pictures and nothing to train.

The background is a photograph that ships with scikit-learn; two shapes move over it while the light changes and the
shadow of a cloud passes, and frames are rounded to 8 bits as a camera would.

Run: python examples/robust_pca_video.py
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image

import slra

N_FRAMES, BLOCK = 80, 8
# Above this, half of what the shapes differ from the background on average, a pixel counts as moving.
THRESHOLD = 0.1


class Film(NamedTuple):
    """Frames from 0 to 1, (frames, rows, columns); the same without the shapes; where the shapes are."""

    frames: np.ndarray
    background: np.ndarray
    moving: np.ndarray


def photograph() -> np.ndarray:
    """Return a picture in grey from 0 to 1, averaged over blocks of 8 by 8: 53 by 80 pixels."""
    grey = load_sample_image("china.jpg").mean(axis=-1) / 255
    rows, columns = (size // BLOCK for size in grey.shape)
    grey = grey[: rows * BLOCK, : columns * BLOCK]
    return grey.reshape(rows, BLOCK, columns, BLOCK).mean(axis=(1, 3))


def film() -> Film:
    """Put light, shadow and two moving shapes into a photograph."""
    still = photograph()
    y, x = np.mgrid[: still.shape[0], : still.shape[1]]
    time = np.linspace(0, 1, N_FRAMES)[:, None, None]
    # The sun comes and goes over the whole picture, and a cloud darkens its left half for a while.
    light = 0.85 + 0.15 * np.cos(3 * time)
    shadow = np.exp(-((x / 40) ** 2)) * np.sin(np.pi * time) ** 2
    background = still * (light - 0.3 * shadow)
    # A disc crosses from left to right, a box from top to bottom. They hide what is behind them.
    disc = (x - 80 * time) ** 2 + (y - 38 - 4 * np.sin(9 * time)) ** 2 < 5**2
    box = (abs(x - 55) < 4) & (abs(y - 53 * time) < 3)
    frames = np.where(disc, 0.95, np.where(box, 0.05, background))
    return Film(np.round(255 * frames) / 255, background, disc | box)


def rows(frames: np.ndarray) -> np.ndarray:
    """Lay each frame out as one row."""
    return frames.reshape(len(frames), -1)


def overlap(found: np.ndarray, moving: np.ndarray) -> float:
    """Intersection over union of two sets of pixels, over all frames: 1 if they are the same."""
    return float(np.sum(found & moving) / np.sum(found | moving))


def relative_error(x: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))


class Numbers(NamedTuple):
    """What was measured; "svd" is a truncated SVD of rank 2, "median" the median of each pixel over time."""

    rank: int
    n_iter: int
    converged: bool
    background_error: dict[str, float]
    moving_overlap: dict[str, float]


def main(picture: str | Path = "robust_pca_video.png") -> Numbers:
    shot = film()
    x = rows(shot.frames)
    print(f"film: {N_FRAMES} frames of {shot.frames.shape[1]} x {shot.frames.shape[2]} pixels,")
    print(f"{np.mean(shot.moving):.1%} of the pixels are covered by something that moves")

    # One call. Its weight for the sparse part, 1/sqrt(number of pixels), is the one of the theory, not tuned. A
    # difference of 1e-4 is far below the 1/255 that the film was rounded to.
    split = slra.robust_pca(x, tol=1e-4, rng=0)
    sigma = np.linalg.svd(split.low_rank, compute_uv=False)
    rank = int(np.sum(sigma > 1e-3 * sigma[0]))
    print(f"robust_pca: {split.n_iter} iterations, converged: {split.converged}")
    print(f"singular values of the low-rank part above a thousandth of the first: {rank}")

    # Two simpler ways for comparison: least squares, which sparse but large errors pull far off, and the median of
    # each pixel, which knows nothing of light.
    U, S, Vh = slra.truncated_svd(x, 2)
    backgrounds = {
        "robust_pca": split.low_rank,
        "svd": (U * S) @ Vh,
        "median": np.broadcast_to(np.median(x, axis=0), x.shape),
    }
    error = {name: relative_error(y, rows(shot.background)) for name, y in backgrounds.items()}
    hits = {
        name: overlap(abs(x - y) > THRESHOLD, rows(shot.moving)) for name, y in backgrounds.items()
    }
    print("background by: relative error, overlap of what moves with the truth")
    for name in backgrounds:
        print(f"  {name}: {error[name]:.3f}, {hits[name]:.2f}")
    draw(shot, backgrounds, Path(picture))
    return Numbers(rank, split.n_iter, bool(split.converged), error, hits)


def draw(shot: Film, backgrounds: dict[str, np.ndarray], path: Path) -> None:
    """Three frames: given, the two parts, and the background by a plain SVD."""
    low_rank, svd = (backgrounds[name].reshape(shot.frames.shape) for name in ("robust_pca", "svd"))
    lines = (
        ("given", shot.frames, "gray", (0, 1)),
        ("low rank", low_rank, "gray", (0, 1)),
        ("sparse", shot.frames - low_rank, "PuOr", (-1, 1)),
        ("SVD, rank 2", svd, "gray", (0, 1)),
    )
    figure = Figure(figsize=(5, 4.9), layout="constrained")
    axes = figure.subplots(len(lines), 3)
    for line, (name, frames, colors, limits) in zip(axes, lines, strict=True):
        for axis, t in zip(line, (15, 40, 65), strict=True):
            axis.imshow(frames[t], cmap=colors, vmin=limits[0], vmax=limits[1])
            axis.set(xticks=(), yticks=())
            if axis is line[0]:
                axis.set_ylabel(name)
            if line is axes[0]:
                axis.set_title(f"frame {t}", fontsize=10)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main(*sys.argv[1:])
