"""Solvers beside specialists.

    python -m benchmarks.solvers     about two minutes; writes benchmarks/results/solvers.json

Needs the ``bench`` extra, celer and skglm. Each method is given the first of the tolerances 1e-1, 1e-1.5, ... that
leads to an objective within 1e-6 of the least, relative to that of zero, and that call is timed.
"""

import math
from collections.abc import Callable
from importlib import metadata
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import slra
from benchmarks.common import interleaved, save, table
from benchmarks.markdown import significant

GAP = 1e-6
TOLERANCES = [10.0 ** (-k / 2) for k in range(2, 22)]
Vector = np.ndarray[Any, Any]


class Problem(NamedTuple):
    """``smooth(x)`` with its gradient plus ``weight * g``; ``others(tol)`` are specialists, each a call for x."""

    smooth: Callable[[Vector], tuple[float, Vector]]
    prox: Callable[[Vector, Any], Vector]
    weight: float
    penalty: Callable[[Vector], float]
    n: int
    others: dict[str, Callable[[float], Vector]]

    def value(self, x: Vector) -> float:
        return self.smooth(x)[0] + self.penalty(x)


def design(m: int, n: int, rho: float) -> tuple[Vector, Vector]:
    """Columns in which neighbours correlate by ``rho``; 5% of them make up the answer, with a tenth of noise."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((m, n))
    for j in range(1, n):
        A[:, j] = rho * A[:, j - 1] + math.sqrt(1 - rho**2) * A[:, j]
    x = np.zeros(n)
    x[rng.choice(n, n // 20, replace=False)] = rng.standard_normal(n // 20)
    b, noise = A @ x, rng.standard_normal(m)
    b += 0.1 * noise * np.linalg.norm(b) / np.linalg.norm(noise)
    return np.asfortranarray(A), b


def least_squares(A: Vector, b: Vector) -> Callable[[Vector], tuple[float, Vector]]:
    def smooth(x: Vector) -> tuple[float, Vector]:
        rest = A @ x - b
        return 0.5 * float(rest @ rest), A.T @ rest

    return smooth


def fitted(make: Callable[..., Any], A: Vector, b: Vector, **options: Any) -> Any:
    def call(tol: float) -> Vector:
        fit = make(fit_intercept=False, tol=tol, max_iter=100_000, **options).fit(A, b)
        return np.ravel(fit.coef_)

    return call


def lasso(m: int, n: int, rho: float, level: float) -> Problem:
    import celer
    import skglm
    from sklearn import linear_model

    A, b = design(m, n, rho)
    l1 = level * float(np.max(np.abs(A.T @ b)))
    others = {
        "scikit-learn": fitted(linear_model.Lasso, A, b, alpha=l1 / m),
        "celer": fitted(celer.Lasso, A, b, alpha=l1 / m),
        "skglm": fitted(skglm.Lasso, A, b, alpha=l1 / m),
    }
    penalty = lambda x: l1 * float(np.sum(np.abs(x)))  # noqa: E731
    return Problem(least_squares(A, b), slra.prox.prox_l1, l1, penalty, n, others)


def elastic_net(m: int, n: int) -> Problem:
    import celer
    from sklearn import linear_model

    A, b = design(m, n, 0.5)
    l1 = 0.05 * float(np.max(np.abs(A.T @ b)))
    options = {"alpha": 2 * l1 / m, "l1_ratio": 0.5}
    others = {
        "scikit-learn": fitted(linear_model.ElasticNet, A, b, **options),
        "celer": fitted(celer.ElasticNet, A, b, **options),
    }
    return Problem(
        least_squares(A, b),
        lambda x, t: slra.prox.prox_elastic_net(x, t, l2=1.0),
        l1,
        lambda x: l1 * float(np.sum(np.abs(x)) + x @ x / 2),
        n,
        others,
    )


def logistic(m: int, n: int) -> Problem:
    import celer
    from sklearn import linear_model

    A, b = design(m, n, 0.5)
    y = np.sign(b)
    l1 = 0.05 * float(np.max(np.abs(A.T @ y))) / 2

    def smooth(x: Vector) -> tuple[float, Vector]:
        margin = y * (A @ x)
        return float(np.sum(np.logaddexp(0, -margin))), -A.T @ (y / (1 + np.exp(margin)))

    sklearn = {"l1_ratio": 1.0, "solver": "liblinear"}
    others = {
        "scikit-learn": fitted(linear_model.LogisticRegression, A, y, C=1 / l1, **sklearn),
        "celer": fitted(celer.LogisticRegression, A, y, C=1 / l1),
    }
    penalty = lambda x: l1 * float(np.sum(np.abs(x)))  # noqa: E731
    return Problem(smooth, slra.prox.prox_l1, l1, penalty, n, others)


def group_lasso(m: int, n: int) -> Problem:
    import celer

    A, b = design(m, n, 0.5)
    norms = np.linalg.norm((A.T @ b).reshape(-1, 10), axis=1)
    weight = 0.1 * float(np.max(norms))

    def prox(x: Vector, t: Any) -> Vector:
        return slra.prox.prox_l21(x.reshape(-1, 10), t, axis=-1).reshape(-1)

    return Problem(
        least_squares(A, b),
        prox,
        weight,
        lambda x: weight * float(np.sum(np.linalg.norm(x.reshape(-1, 10), axis=1))),
        n,
        {"celer": fitted(celer.GroupLasso, A, b, groups=10, alpha=weight / m)},
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{
        f"lasso 500 x 2000, correlation {rho}, weight {level}": lambda rho=rho, level=level: lasso(
            500, 2000, rho, level
        )
        for rho in (0.5, 0.95)
        for level in (0.1, 0.01)
    },
    "lasso 1000 x 200, correlation 0.5, weight 0.01": lambda: lasso(1000, 200, 0.5, 0.01),
    "elastic net 500 x 1000": lambda: elastic_net(500, 1000),
    "l1 logistic 500 x 1000": lambda: logistic(500, 1000),
    "group lasso 500 x 1000, groups of 10": lambda: group_lasso(500, 1000),
}


def default(problem: Problem, tol: float) -> tuple[Vector, int]:
    result = slra.proximal_gradient(
        np.zeros(problem.n),
        problem.smooth,
        problem.prox,
        weight=problem.weight,
        tol=tol,
        max_iter=20_000,
    )
    # Two more at the start.
    return result.x, result.n_iter + 2


def measure(problem: Problem) -> dict[str, Any]:
    """Times of all methods in milliseconds, each with the tolerance that leads to the same objective."""
    least = problem.value(default(problem, 1e-10)[0])
    allowed = least + GAP * problem.value(np.zeros(problem.n))
    methods: dict[str, Callable[[float], Any]] = dict(problem.others)
    methods["slra"] = lambda tol: default(problem, tol)[0]
    calls, report = {}, {}
    for name, call in methods.items():
        for tol in TOLERANCES:
            if problem.value(call(tol)) <= allowed:
                calls[name] = lambda call=call, tol=tol: call(tol)
                report[name] = {"tol": tol}
                break
    report["slra"]["gradients"] = default(problem, report["slra"]["tol"])[1]
    for name, seconds in interleaved(calls, repeats=3).items():
        report[name]["ms"] = round(1e3 * median(seconds), 3)
    return report


COMPARED = ("numpy", "scipy", "scikit-learn")


def tables(result: dict[str, Any]) -> dict[str, Any]:
    specialists = []
    for name, methods in result["problems"].items():
        own = methods["slra"]["ms"]
        others = {
            other: f"{significant(own / one['ms'])} times"
            for other, one in methods.items()
            if other != "slra"
        }
        shown = ", ".join(f"{other}: {times}" for other, times in others.items())
        specialists.append((name, str(methods["slra"]["gradients"]), shown))
    return {
        "specialists": table(
            ["problem", "gradients", "time of `proximal_gradient` over that of"], specialists
        ),
    }


def losses(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Beside the fastest specialist of each problem."""
    over = {}
    for name, methods in result["problems"].items():
        others = {other: one["ms"] for other, one in methods.items() if other != "slra"}
        if others:
            over[name.partition(",")[0].partition(" ")[0]] = max(
                over.get(name.partition(" ")[0], 0.0), methods["slra"]["ms"] / min(others.values())
            )
    ratio = significant(over["lasso"])
    return [("a lasso, up to", "the fastest of celer, skglm and scikit-learn", ratio)]


def main() -> None:
    """Measure all and write the results."""
    import warnings

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    versions = {name: metadata.version(name) for name in ("celer", "skglm")}
    for name, make in PROBLEMS.items():
        found[name] = measure(make())
        print(name, found[name], flush=True)
        path = save(
            "solvers",
            {"problems": found, **versions},
            tables,
            losses=losses,
            compared=COMPARED,
        )
    print(path)


if __name__ == "__main__":
    main()
