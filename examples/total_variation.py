"""Take noise out of a photograph, and keep its edges: least squares with a penalty on total variation.

    minimise  1/2 ||x - noisy||^2 + weight * sum over pixels of |gradient of x|

The penalty has no simple proximal operator, because the gradient, a linear map K, stands inside of it. It is what
`slra.primal_dual` is for, which needs K, its transpose, and a projection.

Run: python examples/total_variation.py
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image

import slra

BLOCK, NOISE, WEIGHT = 4, 0.1, 0.07


class Numbers(NamedTuple):
    """Iterations, whether they were enough, and errors as root mean squares."""

    n_iter: int
    converged: bool
    error: dict[str, float]


def photograph() -> np.ndarray:
    """Return a picture in grey from 0 to 1, averaged over blocks of 4 by 4: 106 by 160 pixels."""
    grey = load_sample_image("china.jpg").mean(axis=-1) / 255
    rows, columns = (size // BLOCK for size in grey.shape)
    grey = grey[: rows * BLOCK, : columns * BLOCK]
    return grey.reshape(rows, BLOCK, columns, BLOCK).mean(axis=(1, 3))


def gradient(x: np.ndarray) -> np.ndarray:
    """Differences to the next pixel below and to the right, 0 at the edges: (2, rows, columns)."""
    down = np.diff(x, axis=0, append=x[-1:])
    right = np.diff(x, axis=1, append=x[:, -1:])
    return np.stack([down, right])


def transpose(u: np.ndarray) -> np.ndarray:
    """Apply the transpose of `gradient`."""
    down, right = u[0, :-1], u[1, :, :-1]
    return -np.diff(down, axis=0, prepend=0, append=0) - np.diff(right, axis=1, prepend=0, append=0)


def denoise(noisy: np.ndarray, weight: float) -> slra.SolveResult:
    return slra.primal_dual(
        noisy,
        lambda x: (0.5 * np.sum((x - noisy) ** 2), x - noisy),
        None,
        # The conjugate of weight * |.| is 0 on vectors up to that length: its operator projects on them.
        lambda u, sigma: slra.prox.project_l2_ball(u, weight, axis=0),
        gradient,
        transpose,
        tol=1e-5,
    )


def main(picture: str | Path = "total_variation.png") -> Numbers:
    clean = photograph()
    noisy = clean + NOISE * np.random.default_rng(0).standard_normal(clean.shape)
    result = denoise(noisy, WEIGHT)
    # For comparison the blur that comes nearest to the clean picture, which nobody has outside of a demonstration.
    blurred = min(
        (gaussian_filter(noisy, width) for width in np.linspace(0.3, 2, 35)),
        key=lambda x: np.sum((x - clean) ** 2),
    )
    pictures = {"noisy": noisy, "best blur": blurred, "total variation": result.x}
    error = {name: float(np.sqrt(np.mean((x - clean) ** 2))) for name, x in pictures.items()}
    print(f"picture: {clean.shape[0]} x {clean.shape[1]} pixels, from 0 to 1")
    print(f"primal_dual: {result.n_iter} iterations, converged: {result.converged}")
    print("root mean square of the error")
    for name, one in error.items():
        print(f"  {name}: {one:.4f}")
    draw({"clean": clean, **pictures}, Path(picture))
    return Numbers(result.n_iter, bool(result.converged), error)


def draw(pictures: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    for axis, (name, x) in zip(figure.subplots(2, 2).flat, pictures.items(), strict=True):
        axis.imshow(x, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=(), yticks=())
        axis.set_title(name, fontsize=10)
    figure.savefig(path, dpi=75)


if __name__ == "__main__":
    main(*sys.argv[1:])
