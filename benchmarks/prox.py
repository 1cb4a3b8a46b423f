"""Proximal operators beside PyProximal and NumPy's own steps.

    python -m benchmarks.prox     about a minute; writes benchmarks/results/prox.json

Needs the ``bench`` extra and pyproximal.
"""

from importlib import metadata
from statistics import median
from typing import Any

import numpy as np

import slra
from benchmarks.common import interleaved, save, table
from benchmarks.markdown import scientific, significant
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


COMPARED = ("numpy", "scipy")
THRESHOLD = "soft_threshold, 4M float32"


NUCLEAR = {noise: f"prox_nuclear, 1000 x 800, float64, noise {noise}" for noise in (0.01, 0.3)}


def _code(name: str) -> str:
    """As code, with the bars that would end a cell."""
    return f"`{name}`".replace("|", "\\|")


def tables(result: dict[str, Any]) -> dict[str, Any]:
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
    return {"measured": table(["what", "beside", "which takes, or gives"], rows)}


def losses(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The one pass that it cannot do without."""
    return [("`soft_threshold`", "`numpy.clip`", significant(result[THRESHOLD]["over numpy.clip"]))]


def main() -> None:
    """Measure all and write the results."""
    result = {
        "soft_threshold, 4M float32": soft_threshold(),
        "prox_nuclear, 1000 x 800, float64, noise 0.01": nuclear(0.01),
        "prox_nuclear, 1000 x 800, float64, noise 0.3": nuclear(0.3),
        "pyproximal": metadata.version("pyproximal"),
    }
    for name, each in result.items():
        print(name, each)
    print(save("prox", result, tables, losses=losses, compared=COMPARED))


if __name__ == "__main__":
    main()
