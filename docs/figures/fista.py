"""Proximal gradient on a lasso problem: how far the objective is from its minimum, with momentum and without."""

import numpy as np

import slra
from docs.figures.style import BLUE, ORANGE, figure

N_ROWS, N_COLUMNS, N_NONZERO = 100, 300, 12
ITERATIONS = 300


def problem():
    """Return the lasso 1/2 ||A x - b||^2 + l1 ||x||_1: its smooth part, its prox, its objective and a step."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((N_ROWS, N_COLUMNS)) / np.sqrt(N_ROWS)
    truth = np.zeros(N_COLUMNS)
    truth[rng.choice(N_COLUMNS, N_NONZERO, replace=False)] = rng.standard_normal(N_NONZERO) * 2
    b = A @ truth + 0.05 * rng.standard_normal(N_ROWS)
    l1 = 0.05 * np.max(np.abs(A.T @ b))

    def value_and_grad(x):
        rest = A @ x - b
        return rest @ rest / 2, A.T @ rest

    def prox(x, step):
        return slra.prox.prox_l1(x, step * l1)

    def objective(x):
        return value_and_grad(x)[0] + l1 * slra.prox.norm_l1(x)

    return value_and_grad, prox, objective, 1 / np.linalg.norm(A, 2) ** 2


def draw():
    """Draw the gap of ISTA and of FISTA, iteration by iteration."""
    value_and_grad, prox, objective, step = problem()
    x0 = np.zeros(N_COLUMNS)
    best = slra.proximal_gradient(x0, value_and_grad, prox, tol=1e-13, max_iter=20_000)
    least = objective(best.x)
    result = figure(3.3)
    axis = result.subplots()
    numbers = {"nonzero_entries": int(np.sum(best.x != 0))}
    for name, accelerated, color, dash in (
        ("ISTA", False, ORANGE, "--"),
        ("FISTA with restart (the default)", True, BLUE, "-"),
    ):
        done = slra.proximal_gradient(
            x0,
            value_and_grad,
            prox,
            step=step,
            accelerated=accelerated,
            tol=None,
            max_iter=ITERATIONS,
            objective=objective,
        )
        gap = (np.asarray(done.objective, dtype=float) - least) / least
        axis.semilogy(
            np.arange(1, len(gap) + 1), np.maximum(gap, 1e-15), dash, color=color, label=name
        )
        numbers[name] = {"relative_gap_at_100": float(gap[99])}
    axis.set(
        title=f"Lasso, {N_ROWS} equations, {N_COLUMNS} unknowns",
        xlabel="iteration",
        ylabel="objective / minimum − 1",
        ylim=(1e-14, 10),
    )
    axis.legend()
    return result, numbers
