"""Proximal operators and solvers beside PyProximal, NumPy's own steps and scikit-learn.

    python -m benchmarks.prox     about a minute; writes benchmarks/results/prox.json

Needs the ``bench`` extra and pyproximal.
"""

from importlib import metadata
from statistics import median
from typing import Any

import numpy as np

import slra
from benchmarks.common import interleaved, save
from slra import prox


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Medians in milliseconds, and how many times the median of ``base`` each takes."""
    middle = {name: median(each) for name, each in seconds.items()}
    return {
        name: {"ms": round(1e3 * t, 3), f"over {base}": round(t / middle[base], 3)}
        for name, t in middle.items()
    }


def soft_threshold() -> dict[str, Any]:
    """Soft threshold of four million numbers in single precision."""
    import pyproximal

    x = np.random.default_rng(0).standard_normal(4_000_000).astype("float32")
    other = pyproximal.L1()

    def textbook() -> np.ndarray[Any, Any]:
        return np.sign(x) * np.maximum(np.abs(x) - 1.0, 0)

    result = slra.soft_threshold(x, 1.0)
    seconds = interleaved(
        {
            "slra.soft_threshold": lambda: slra.soft_threshold(x, 1.0),
            "sign(x) * max(|x| - tau, 0)": textbook,
            "pyproximal.L1.prox": lambda: other.prox(x, 1.0),
            "numpy.clip": lambda: np.clip(x, -1.0, 1.0),
        },
        repeats=21,
    )
    return {
        "equal to the textbook form": bool(np.array_equal(result, textbook())),
        "negative zeros": int(np.sum(np.signbit(result) & (result == 0))),
        **ratios(seconds, "slra.soft_threshold"),
        "over numpy.clip": round(
            median(seconds["slra.soft_threshold"]) / median(seconds["numpy.clip"]), 3
        ),
    }


def nuclear(noise: float) -> dict[str, Any]:
    """Prox of the nuclear norm, 1000 x 800, rank 10 above the threshold."""
    import pyproximal

    rng = np.random.default_rng(0)
    m, n = 1000, 800
    x = rng.standard_normal((m, 10)) @ rng.standard_normal((10, n))
    x += noise * rng.standard_normal((m, n))
    tau = 100.0
    other = pyproximal.Nuclear((m, n), sigma=1.0)
    reference = other.prox(x.ravel(), tau).reshape(m, n)
    factors = prox.prox_nuclear(x, tau, return_factors=True, rng=1)
    results = {
        "cold": prox.prox_nuclear(x, tau, rng=1),
        "warm": prox.prox_nuclear(x, tau, warm_start=factors.Vh, rng=1),
    }
    seconds = interleaved(
        {
            "slra.prox.prox_nuclear": lambda: prox.prox_nuclear(x, tau, rng=1),
            "the same, warm": lambda: prox.prox_nuclear(x, tau, warm_start=factors.Vh, rng=1),
            "pyproximal.Nuclear.prox": lambda: other.prox(x.ravel(), tau),
        },
        repeats=7,
    )
    return {
        "rank": int(factors.S.shape[0]),
        "relative difference": {
            name: float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
            for name, y in results.items()
        },
        **ratios(seconds, "slra.prox.prox_nuclear"),
    }


def lasso() -> dict[str, Any]:
    """Objective of FISTA on a lasso of 2,000 x 5,000, relative to coordinate descent."""
    import array_api_compat.numpy
    import array_api_compat.torch
    import array_api_strict
    import jax
    from sklearn.linear_model import Lasso

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    A = rng.standard_normal((2000, 5000))
    truth = np.where(rng.random(5000) < 0.02, rng.standard_normal(5000), 0)
    b = A @ truth + 0.5 * rng.standard_normal(2000)
    l1 = 0.1 * float(np.max(np.abs(A.T @ b)))
    fit = Lasso(alpha=l1 / 2000, fit_intercept=False, tol=1e-10, max_iter=20_000).fit(A, b)

    def value(x: np.ndarray[Any, Any]) -> float:
        return float(np.linalg.norm(A @ x - b) ** 2 / 2 + l1 * np.sum(np.abs(x)))

    best = value(fit.coef_)
    report: dict[str, Any] = {"coordinate descent": best, "nonzero": int(np.sum(fit.coef_ != 0))}
    for xp in (array_api_compat.numpy, array_api_strict, array_api_compat.torch, jax.numpy):
        a, y = xp.asarray(A), xp.asarray(b)
        at = xp.matrix_transpose(a)

        def smooth(x: Any, a: Any = a, at: Any = at, y: Any = y, xp: Any = xp) -> Any:
            misfit = a @ x - y
            return xp.sum(misfit * misfit) / 2, at @ misfit

        result = slra.proximal_gradient(
            xp.zeros(5000, dtype=xp.float64),
            smooth,
            lambda x, step: slra.soft_threshold(x, l1 * step),
            tol=1e-7,
            max_iter=2000,
        )
        found = value(np.asarray(result.x))
        report[xp.__name__] = {
            "objective over coordinate descent, minus 1": found / best - 1,
            "iterations": result.n_iter,
            "converged": result.converged,
        }
    return report


def main() -> None:
    """Measure all and write the results."""
    result = {
        "soft_threshold, 4M float32": soft_threshold(),
        "prox_nuclear, 1000 x 800, float64, noise 0.01": nuclear(0.01),
        "prox_nuclear, 1000 x 800, float64, noise 0.3": nuclear(0.3),
        "lasso, 2000 x 5000, float64": lasso(),
        "pyproximal": metadata.version("pyproximal"),
    }
    for name, each in result.items():
        print(name, each)
    print(save("prox", result))


if __name__ == "__main__":
    main()
