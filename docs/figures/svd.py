"""Singular values of a slowly decaying matrix, and the error that each way of approximating it leaves."""

import numpy as np

import slra
from docs.figures.style import BLACK, BLUE, ORANGE, figure

N_ROWS, N_COLUMNS = 600, 400
RANKS = (5, 10, 20, 40, 60, 80)
METHODS = {
    "no iteration (n_iter=0)": ({"method": "subspace", "n_iter": 0}, ORANGE, "o"),
    "the default (Krylov)": ({"method": "krylov"}, BLUE, "s"),
}


def matrix() -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix whose singular values are 1/sqrt(i), and these values."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((N_ROWS, N_COLUMNS)))
    right, _ = np.linalg.qr(rng.standard_normal((N_COLUMNS, N_COLUMNS)))
    sigma = 1 / np.sqrt(np.arange(1, N_COLUMNS + 1))
    return (left * sigma) @ right.T, sigma


def draw():
    """Draw values found beside values there are, and error over the least error there is."""
    x, sigma = matrix()
    tail = np.sqrt(np.cumsum((sigma**2)[::-1])[::-1])
    result = figure(6)
    above, below = result.subplots(2, 1)
    shown = np.arange(1, 61)
    above.plot(shown, sigma[:60], color=BLACK, label="exact")
    below.axhline(0, color=BLACK, label="least possible (Eckart–Young)")
    numbers = {}
    for name, (options, color, marker) in METHODS.items():
        found = slra.randomized_svd(x, 60, rng=1, **options).S
        above.plot(shown, found, marker, color=color, label=name, markevery=3, fillstyle="none")
        excess = []
        for rank in RANKS:
            U, S, Vh = slra.randomized_svd(x, rank, rng=1, **options)
            excess.append(100 * (np.linalg.norm(x - (U * S) @ Vh) / tail[rank] - 1))
        below.plot(RANKS, excess, marker + "-", color=color, label=name)
        numbers[name] = {"excess_percent": dict(zip(RANKS, excess, strict=True))}
    above.set(title="Singular values, rank 60 asked for", xlabel="index i", ylabel="σᵢ")
    above.set(yscale="log", xscale="log")
    above.set_yticks((0.1, 0.2, 0.5, 1), ("0.1", "0.2", "0.5", "1"))
    above.set_xticks((1, 2, 5, 10, 20, 60), ("1", "2", "5", "10", "20", "60"))
    above.minorticks_off()
    above.legend()
    below.set(
        title="Error of the approximation",
        xlabel="rank r",
        ylabel="% above the least possible",
    )
    below.legend()
    return result, numbers
