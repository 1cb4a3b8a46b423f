"""Proximal operators and solvers."""

from typing import Any

from benchmarks.markdown import scientific, significant, table

COMPARED = ("numpy", "scipy", "scikit-learn")
THRESHOLD = "soft_threshold, 4M float32"
NUCLEAR = {noise: f"prox_nuclear, 1000 x 800, float64, noise {noise}" for noise in (0.01, 0.3)}


def _code(name: str) -> str:
    """As code, with the bars that would end a cell."""
    return f"`{name}`".replace("|", "\\|")


def tables(result: dict[str, Any]) -> dict[str, str]:
    soft = result[THRESHOLD]
    rows = [
        (
            f"`soft_threshold`, 4M float32, {soft['slra.soft_threshold']['ms']} ms",
            _code(other),
            over,
        )
        for other, over in (
            (name, f"{significant(soft[name]['over slra.soft_threshold'])} times as long")
            for name in ("sign(x) * max(|x| - tau, 0)", "pyproximal.L1.prox", "numpy.clip")
        )
    ]
    for noise, name in NUCLEAR.items():
        one = result[name]
        over = one["pyproximal.Nuclear.prox"]["over slra.prox.prox_nuclear"]
        warm = one["pyproximal.Nuclear.prox"]["ms"] / one["the same, warm"]["ms"]
        for start, ratio in (("cold", over), ("warm", warm)):
            apart = scientific(one["relative difference"][start])
            rows.append(
                (
                    f"`prox_nuclear`, 1000 x 800, rank 10, noise {noise}, {start}",
                    f"`pyproximal.Nuclear`, {result['pyproximal']}",
                    f"{significant(ratio)} times as long; apart by {apart}",
                )
            )
    lasso = [one for one in result["lasso, 2000 x 5000, float64"].values() if isinstance(one, dict)]
    apart = max(one["objective over coordinate descent, minus 1"] for one in lasso)
    rows.append(
        (
            "FISTA, lasso 2,000 x 5,000, with NumPy, array-api-strict, PyTorch and JAX",
            "coordinate descent of scikit-learn",
            f"objectives apart by {scientific(apart)}",
        )
    )
    return {"measured": table(["what", "beside", "which takes, or gives"], rows)}


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    over = significant(result[THRESHOLD]["over numpy.clip"])
    return {"docs/performance.md": [f"{over} times the time of `numpy.clip` alone"]}
