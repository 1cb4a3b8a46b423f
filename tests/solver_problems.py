"""Sixty convex problems, in scales from 1e-6 to 1e6, single and double precision, from near and far."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import slra

SCALES = (1e-6, 1.0, 1e6)


class Problem(NamedTuple):
    """``functions(dtype)`` are f with its gradient, and the operator, in that precision."""

    name: str
    x0: np.ndarray
    functions: Callable[[Any], tuple[Callable, Callable]]


def draw(m, n, seed=0, condition=None):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n))
    if condition is not None:
        U, s, Vh = np.linalg.svd(A, full_matrices=False)
        A = (U * np.geomspace(1, 1 / condition, len(s))) @ Vh * s[0]
    truth = np.where(rng.random(n) < 0.3, rng.standard_normal(n), 0)
    return A, truth, A @ truth + 0.1 * rng.standard_normal(m)


def least_squares(A, b, prox, dtype):
    A, b = A.astype(dtype), b.astype(dtype)

    def smooth(x):
        rest = A @ x - b
        return 0.5 * np.vdot(rest, rest).real, np.conj(A.T) @ rest

    return smooth, prox


def lasso(m, n, level, scale, dtype, condition=None):
    """The solution is of the order of ``scale``."""
    A, _, b = draw(m, n, condition=condition)
    l1 = level * np.max(np.abs(A.T @ b)) * scale
    return least_squares(A, scale * b, lambda x, t: slra.prox.prox_l1(x, t * l1), dtype)


def elastic_net(scale, dtype):
    smooth, prox = lasso(30, 60, 0.1, scale, dtype)
    return smooth, lambda x, t: prox(x, t) / (1 + t)


def groups(scale, dtype):
    A, _, b = draw(40, 60)
    tau = 3.0 * scale

    def prox(x, t):
        return slra.prox.prox_l21(x.reshape(12, 5), t * tau, axis=-1).reshape(60)

    return least_squares(A, scale * b, prox, dtype)


def nonnegative(condition, scale, dtype):
    A, _, b = draw(60, 40, condition=condition)
    return least_squares(A, scale * b, lambda x, t: np.maximum(x, 0), dtype)


def on_simplex(scale, dtype):
    A, _, b = draw(30, 20)
    return least_squares(A, scale * b, lambda x, t: slra.prox.project_simplex(x, scale), dtype)


def complex_lasso(scale, dtype):
    A, _, b = draw(30, 50)
    A = A + 1j * draw(30, 50, seed=1)[0]
    kind = np.result_type(dtype, "complex64")
    l1 = 5.0 * scale
    return least_squares(A, scale * b, lambda x, t: slra.prox.prox_l1(x, t * l1), kind)


def logistic(scale, dtype):
    """Weights of the order of ``scale``, of features that are small where these are large."""
    A, _, b = draw(80, 40)
    A, y = (A / scale).astype(dtype), np.sign(b).astype(dtype)
    l1 = 0.05 * np.max(np.abs(A.T @ y))

    def smooth(x):
        margin = y * (A @ x)
        return np.sum(np.logaddexp(0, -margin)), -A.T @ (y / (1 + np.exp(margin)))

    return smooth, lambda x, t: slra.prox.prox_l1(x, t * l1)


def huber(scale, dtype):
    A, _, b = draw(60, 20)
    A, b = A.astype(dtype), (scale * b).astype(dtype)
    A = A.astype(dtype)

    def smooth(x):
        rest = (A @ x - b) / scale
        cut = np.clip(rest, -0.5, 0.5)
        return scale * np.sum(cut * (rest - cut / 2)), A.T @ cut

    return smooth, lambda x, t: x


def matrix(scale, dtype):
    """Completion by the nuclear norm."""
    rng = np.random.default_rng(0)
    low = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 10))
    mask = (rng.random(low.shape) < 0.7).astype(dtype)
    data = (scale * low).astype(dtype)

    def smooth(x):
        rest = mask * (x - data)
        return 0.5 * np.sum(rest * rest), rest

    return smooth, lambda x, t: slra.prox.prox_nuclear(x, 0.5 * scale * t)


def poisson(dtype):
    A, truth, _ = draw(60, 10)
    A = A.astype(dtype)
    counts = np.random.default_rng(0).poisson(np.exp(A @ truth)).astype(dtype)

    def smooth(x):
        rate = np.exp(A @ x)
        return np.sum(rate - counts * (A @ x)), A.T @ (rate - counts)

    return smooth, lambda x, t: x


def kullback_leibler(dtype):
    rng = np.random.default_rng(0)
    A = rng.random((50, 20)).astype(dtype)
    counts = rng.poisson(A @ rng.random(20) * 20).astype(dtype)

    def smooth(x):
        rate = A @ x
        if not np.all(rate > 0):
            return np.inf, x
        return np.sum(rate - counts * np.log(rate)), A.T @ (1 - counts / rate)

    return smooth, lambda x, t: np.maximum(x, 0)


def separable(value, slope, inside, dtype):
    def smooth(x):
        return (np.sum(value(x)) if np.all(inside(x)) else np.inf), slope(x)

    return smooth, lambda x, t: x


def barrier(dtype):
    cost = np.linspace(-1, 1, 6).astype(dtype)

    def smooth(x):
        left = 1 - np.sum(x)
        if not (np.all(x > 0) and left > 0):
            return np.inf, x
        return cost @ x - np.sum(np.log(x)) - np.log(left), cost - 1 / x + 1 / left

    return smooth, lambda x, t: x


def precision_matrix(scale, dtype):
    """Graphical lasso."""
    data = np.random.default_rng(0).standard_normal((40, 8))
    S = (np.cov(data.T) / scale).astype(dtype)

    def smooth(x):
        x = (x + x.T) / 2
        if np.linalg.eigvalsh(x)[0] <= 0:
            return np.inf, x
        return np.sum(S * x) - np.linalg.slogdet(x)[1], S - np.linalg.inv(x)

    return smooth, lambda x, t: slra.prox.prox_l1(x, 0.1 / scale * t)


def everywhere(x):
    return x == x


def problems():
    """Return all; those of one scale only are limited to it by a domain or an exponential."""
    found = []

    def add(name, x0, functions, dtypes=("float64", "float32")):
        for dtype in dtypes:
            kind = np.result_type(dtype, "complex64") if np.iscomplexobj(x0) else dtype
            start = np.asarray(x0).astype(kind)
            found.append(Problem(f"{name}, {dtype}", start, functions))

    for scale in SCALES:
        add(f"lasso, p > n, {scale:g}", np.zeros(120), partial(lasso, 40, 120, 0.1, scale))
        add(f"nonnegative, {scale:g}", np.zeros(40), partial(nonnegative, 10, scale))
        add(f"logistic, {scale:g}", np.zeros(40), partial(logistic, scale))
        add(f"matrix, {scale:g}", np.zeros((12, 10)), partial(matrix, scale))
    for scale, dtype in ((1e-6, "float32"), (1e6, "float64")):
        add(f"elastic net, {scale:g}", np.zeros(60), partial(elastic_net, scale), (dtype,))
        add(f"groups, {scale:g}", np.zeros(60), partial(groups, scale), (dtype,))
        add(f"simplex, {scale:g}", np.full(20, scale / 20), partial(on_simplex, scale), (dtype,))
        add(f"huber, {scale:g}", np.zeros(20), partial(huber, scale), (dtype,))
    add("complex lasso", np.zeros(50) + 0j, partial(complex_lasso, 1.0))
    add("lasso, p < n, far", np.full(30, 1e6), partial(lasso, 90, 30, 0.05, 1.0))
    add("lasso, all zero", np.ones(50), partial(lasso, 40, 50, 1.5, 1.0))
    add("lasso, condition 100", np.zeros(40), partial(lasso, 60, 40, 0.01, 1.0, condition=100))
    add("nonnegative, condition 1000", np.zeros(40), partial(nonnegative, 1000, 1.0), ("float64",))
    add("Poisson", np.zeros(10), poisson, ("float32",))
    add("Poisson, far", np.full(10, 3.0), poisson)
    add("Kullback-Leibler", np.full(20, 1e-3), kullback_leibler)
    add("Kullback-Leibler, far", np.full(20, 1e4), kullback_leibler, ("float64",))
    exponential = partial(
        separable, lambda x: np.exp(x) - 5 * x, lambda x: np.exp(x) - 5, everywhere
    )
    add("exp(x) - 5 x", np.full(3, -10.0), exponential)
    logarithm = partial(separable, lambda x: x - np.log(x), lambda x: 1 - 1 / x, lambda x: x > 0)
    add("x - log x, far", np.full(3, 100.0), logarithm)
    add("x - log x, near 0", np.full(3, 1e-4), logarithm, ("float64",))
    add(
        "cosh",
        np.asarray([20.0, 3.0, -7.0]),
        partial(separable, np.cosh, np.sinh, everywhere),
        ("float64",),
    )
    flat = partial(
        separable,
        lambda x: np.where(abs(1e-3 * x - 5) < 1, (1e-3 * x - 5) ** 2 / 2, abs(1e-3 * x - 5) - 0.5),
        lambda x: 1e-3 * np.clip(1e-3 * x - 5, -1, 1),
        everywhere,
    )
    add("flat", np.zeros(2), flat)
    add("barrier", np.full(6, 1e-4), barrier)
    add("precision matrix", 100 * np.eye(8), partial(precision_matrix, 1.0), ("float64",))
    add("precision matrix, near 0", 1e-3 * np.eye(8), partial(precision_matrix, 1.0))
    return found


def true_residual(problem, x):
    """Gradient mapping of ``x`` in double precision, relative as `proximal_gradient` says, L of the Hessian there."""
    smooth, prox = problem.functions("float64")
    x = x.astype(np.result_type(x, "float64"))
    _, grad = smooth(x)
    size = np.linalg.norm(x) or 1.0
    rng = np.random.default_rng(0)
    v = rng.standard_normal(x.shape)
    if x.shape[-1:] == x.shape[:1] and x.ndim == 2:
        v = v + v.T
    curvature = 0.0
    for _ in range(30):
        v = v / np.linalg.norm(v)
        short = 1e-6 * size
        v = (smooth(x + short * v)[1] - smooth(x - short * v)[1]) / (2 * short)
        curvature = np.linalg.norm(v)
        if curvature == 0:
            break
    step = 1 / curvature
    mapping = np.linalg.norm(x - prox(x - step * grad, step)) / step
    # A solution that is 0 has no digits of its own.
    size = max(np.linalg.norm(x), 1e-12 * np.linalg.norm(problem.x0))
    scale = max(np.linalg.norm(grad), curvature * size)
    return float(mapping / scale) if scale else 0.0
