"""Both forms of the combined objective on a convex toy: is the descent monotone, and do they meet?

The task is least squares, L = 1/2 ||X M - B||_F^2 with X = (Q^, K^, V^), n by D each; the l1 weights differ. With the
penalty only subgradients of L + l1 are used, under three rules for the step.

python -m benchmarks.objective_toy     about 20 seconds; writes results/objective_toy.json
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import slra
from slra import objective

L1 = (1.0, 0.5, 0.2)
N_ITER = 400


class Toy(NamedTuple):
    M: np.ndarray
    B: np.ndarray

    @classmethod
    def draw(cls, seed: int = 0) -> "Toy":
        """M has singular values from 1 to 3, so that the minimiser is unique."""
        rng = np.random.default_rng(seed)
        U, V = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
        return cls(U * np.linspace(1, 3, 8) @ V, rng.standard_normal((3, 20, 8)))

    @property
    def lipschitz(self) -> float:
        return float(np.linalg.norm(self.M, 2) ** 2)

    def task(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss of the task and its gradient."""
        misfit = x @ self.M - self.B
        return float(np.sum(misfit**2)) / 2, misfit @ self.M.T

    def value(self, x: np.ndarray) -> float:
        return float(objective.combined_objective(self.task(x)[0], *x, L1))

    def subgradient(self, x: np.ndarray) -> np.ndarray:
        return self.task(x)[1] + np.stack(objective.l1_penalty_grad(*x, L1))


def proximal(toy: Toy, x: np.ndarray, n_iter: int = N_ITER) -> tuple[np.ndarray, list[float]]:
    """Proximal gradient without momentum, whose step 1/L makes it monotone."""

    def prox(x: np.ndarray, step: float) -> np.ndarray:
        return np.stack(objective.l1_penalty_prox(*x, L1, step=step))

    options: dict[str, Any] = {"accelerated": False, "tol": None, "max_iter": n_iter}
    result = slra.proximal_gradient(
        x,
        toy.task,
        prox,
        step=1 / toy.lipschitz,
        objective=toy.value,
        **options,
    )
    return result.x, [toy.value(x), *result.objective.tolist()]


def _descend(
    toy: Toy, x: np.ndarray, n_iter: int, move: Callable[[int, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, list[float]]:
    values = [toy.value(x)]
    for k in range(n_iter):
        x = x + move(k, x)
        values.append(toy.value(x))
    return x, values


def step_for_each_entry(toy: Toy, x: np.ndarray, n_iter: int = N_ITER) -> Any:
    """Subgradient steps of length 1/L, halved entry by entry until that entry's part of an upper bound falls.

    The bound is L(x) + sum_i (g_i d_i + Lip/2 d_i^2 + l1_i (|x_i + d_i| - |x_i|)), g the gradient of the task: where
    each part is negative the objective falls. No entry needs to wait for another that is near its kink.
    """
    weights, lipschitz = np.asarray(L1)[:, None, None], toy.lipschitz

    def move(_: int, x: np.ndarray) -> np.ndarray:
        gradient, direction = toy.task(x)[1], -toy.subgradient(x)
        step = np.full_like(x, 1 / lipschitz)
        for _ in range(60):
            d = step * direction
            bound = gradient * d + lipschitz / 2 * d**2 + weights * (np.abs(x + d) - np.abs(x))
            rises = bound > -step * direction**2 / 4
            if not rises.any():
                break
            step = np.where(rises, step / 2, step)
        return np.where(rises, 0.0, step * direction)

    return _descend(toy, x, n_iter, move)


def common_step(toy: Toy, x: np.ndarray, n_iter: int = N_ITER) -> Any:
    """Subgradient steps with one step length, halved from 1/L until the objective falls."""

    def move(_: int, x: np.ndarray) -> np.ndarray:
        direction, before, step = -toy.subgradient(x), toy.value(x), 1 / toy.lipschitz
        while step > 1e-18:
            if toy.value(x + step * direction) < before:
                return step * direction
            step /= 2
        return np.zeros_like(x)

    return _descend(toy, x, n_iter, move)


def diminishing_step(toy: Toy, x: np.ndarray, n_iter: int = N_ITER) -> Any:
    """Subgradient steps of length 2 / (mu (k + 2)), mu = 1 the strong convexity, at most 1/L."""
    return _descend(
        toy, x, n_iter, lambda k, x: -min(1 / toy.lipschitz, 2 / (k + 2)) * toy.subgradient(x)
    )
