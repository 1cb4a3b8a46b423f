"""Reconstruct a film from a quarter of its Fourier coefficients: magnetic resonance imaging by low rank plus sparse.

A scanner measures Fourier coefficients of each frame, line by line, and takes its time over each. What it leaves out
has to be made up for by what is known of such films: most of it hardly changes (a matrix of low rank, a frame a row),
and what does change is periodic, as a heart is (sparse once transformed along time). With M the lines measured, F the
Fourier transform of frames and T that of time,

    minimise  1/2 ||M F (L + S) - data||^2 + a ||L||_* + b ||T S||_1

over two films at once. It is the model of R. Otazo, E. Candes, D. Sodickson, Low-rank plus sparse matrix decomposition
for accelerated dynamic MRI, Magnetic Resonance in Medicine 73 (2015), here on a drawing instead of a patient.

Run: python examples/mri_low_rank_sparse.py
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import slra

SIDE, N_FRAMES, PART, NOISE = 48, 24, 0.25, 0.002
# Weights relative to the largest singular value and the largest coefficient of the first guess.
LOW_RANK, SPARSE = 0.01, 0.01

fourier = partial(np.fft.fft2, norm="ortho")
inverse = partial(np.fft.ifft2, norm="ortho")
in_time = partial(np.fft.fft, axis=0, norm="ortho")
back_in_time = partial(np.fft.ifft, axis=0, norm="ortho")

Films = tuple[np.ndarray, np.ndarray]


class Numbers(NamedTuple):
    """Iterations, whether they were enough, rank of L, and errors relative to the truth."""

    n_iter: int
    converged: bool
    rank: int
    error: dict[str, float]


def film() -> np.ndarray:
    """Draw a body with a heart that beats and a contrast agent that comes slowly: (frames, rows, columns)."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    time = np.arange(N_FRAMES)[:, None, None] / N_FRAMES
    body = 0.4 * ((x / 0.9) ** 2 + (y / 0.7) ** 2 < 1) + 0.2 * ((x + 0.4) ** 2 + y**2 < 0.09)
    agent = time * 0.4 * (((x - 0.45) / 0.2) ** 2 + ((y + 0.3) / 0.15) ** 2 < 1)
    radius = 0.22 + 0.06 * np.sin(6 * np.pi * time)
    heart = 0.5 * (((x - 0.1) / radius) ** 2 + ((y - 0.1) / radius) ** 2 < 1)
    return body + agent + heart


def measured_lines(rng: np.random.Generator) -> np.ndarray:
    """Choose lines for each frame, more often low frequencies: boolean, (frames, rows, 1)."""
    frequency = np.abs(np.fft.fftfreq(SIDE))
    weight = (1 - frequency / 0.55) ** 4
    lines = np.zeros((N_FRAMES, SIDE, 1), dtype=bool)
    for frame in lines:
        chosen = rng.choice(SIDE, int(PART * SIDE), replace=False, p=weight / weight.sum())
        frame[chosen] = True
        frame[frequency < 1.5 / SIDE] = True
    return lines


def reconstruct(data: np.ndarray, lines: np.ndarray) -> slra.SolveResult:
    guess = inverse(data)
    rank_weight = LOW_RANK * np.linalg.norm(guess.reshape(N_FRAMES, -1), 2)
    sparse_weight = SPARSE * np.max(np.abs(in_time(guess)))

    def misfit(films: Films) -> tuple[float, Films]:
        rest = lines * fourier(films[0] + films[1]) - data
        slope = inverse(rest)
        return 0.5 * float(np.sum(np.abs(rest) ** 2)), (slope, slope)

    def prox(films: Films, tau: float) -> Films:
        low, sparse = films
        low = slra.prox.prox_nuclear(low.reshape(N_FRAMES, -1), tau * rank_weight)
        sparse = back_in_time(slra.soft_threshold(in_time(sparse), tau * sparse_weight))
        return low.reshape(guess.shape), sparse

    # Two unknowns as a tuple; the length of the steps is found.
    return slra.proximal_gradient((guess, np.zeros_like(guess)), misfit, prox, tol=1e-4)


def main(picture: str | Path = "mri_low_rank_sparse.png") -> Numbers:
    truth = film()
    rng = np.random.default_rng(0)
    lines = measured_lines(rng)
    noise = rng.standard_normal((2, *truth.shape))
    data = lines * (fourier(truth) + NOISE * (noise[0] + 1j * noise[1]))
    print(f"film: {N_FRAMES} frames of {SIDE} x {SIDE}, {np.mean(lines):.0%} of the coefficients")
    result = reconstruct(data, lines)
    low, sparse = result.x
    sigma = np.linalg.svd(low.reshape(N_FRAMES, -1), compute_uv=False)
    rank = int(np.sum(sigma > 1e-3 * sigma[0]))
    print(f"proximal_gradient: {result.n_iter} iterations, converged: {result.converged}")
    print(f"rank of L: {rank}")
    films = {"zeros for the rest": inverse(data), "low rank + sparse": low + sparse}
    error = {
        name: float(np.linalg.norm(x - truth) / np.linalg.norm(truth)) for name, x in films.items()
    }
    print("relative error")
    for name, one in error.items():
        print(f"  {name}: {one:.3f}")
    draw({"truth": truth, **films, "L": low, "S": sparse}, Path(picture))
    return Numbers(result.n_iter, bool(result.converged), rank, error)


def draw(films: dict[str, np.ndarray], path: Path) -> None:
    """Draw two frames of each film, and below one row of pixels through the heart against time."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots(3, len(films), height_ratios=(2, 2, 1))
    for column, (name, x) in zip(axes.T, films.items(), strict=True):
        views = (x[2], x[10], x[:, int(0.55 * SIDE)])
        for axis, view in zip(column, views, strict=True):
            axis.imshow(np.abs(view), cmap="gray", vmin=0, vmax=1, aspect="auto")
            axis.set(xticks=(), yticks=())
        column[0].set_title(name, fontsize=8)
    for axis, label in zip(axes[:, 0], ("frame 2", "frame 10", "time"), strict=True):
        axis.set_ylabel(label, fontsize=8)
    figure.savefig(path, dpi=95)


if __name__ == "__main__":
    main(*sys.argv[1:])
