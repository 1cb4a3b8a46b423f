"""Error of every low-rank method against rank and against stored numbers.

    python -m benchmarks.fidelity     about five minutes on two cores; writes results/fidelity.json and fidelity.png

Data: all 72 heads of MiniLM-L6 on 512 tokens of English (`benchmarks.minilm`), d = 32, float32; and Gaussian Q, K and V
with flat, power-law (singular values as 1/j) and outlier (flat, but two directions 20 times larger) spectra, d = 64.
Errors are relative Frobenius errors of the output, per head, against float64. Stored numbers: what must be kept per key
to answer more queries; 2d for exact attention. Times are in `benchmarks.fidelity_speed`.
"""

from typing import Any

import numpy as np

import slra
from benchmarks.common import RESULTS, save, table
from benchmarks.markdown import significant
from benchmarks.minilm import exact_attention, load_qkv
from slra.cli.bench.problems import attention_inputs
from slra.cli.demo import relative_errors as relative

Data = tuple[np.ndarray, np.ndarray, np.ndarray]
OURS = ("svd", "scores", "output")
RANKS = (4, 8, 12, 16, 20, 24, 28)


def minilm() -> Data:
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in load_qkv())
    return q, k, v


def synthetic(kind: str, n: int = 1024, d: int = 64, heads: int = 8) -> Data:
    """Q, K and V with a stated spectrum; scores have a standard deviation of about 3."""
    spectrum = {
        "flat": np.ones(d),
        "power-law": 1 / np.arange(1.0, d + 1),
        "outlier": np.where(np.arange(d) < 2, 20.0, 1.0),
    }[kind]
    return attention_inputs(spectrum, n, heads)


def summary(errors: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(errors, (0.1, 0.5, 0.9))
    return {"p10": low, "median": median, "p90": high, "max": float(errors.max())}


def configurations(n: int, d: int) -> list[dict[str, Any]]:
    """Each method at each budget, with the numbers it stores per key."""
    rows = [
        {"method": method, "rank": rank, "stored": 2 * rank}
        for method in OURS
        for rank in RANKS
        if rank < d
    ]
    for m in (n // 64, n // 32, n // 8):
        rows += [
            {
                "method": "output",
                "rank": rank,
                "n_exact": m,
                "stored": (m * 2 * d + (n - m) * 2 * rank) / n,
            }
            for rank in RANKS
        ]
    for rank in (8, 16, 32, 64, 128, 256):
        rows.append({"method": "nystrom", "rank": rank, "stored": 3 * rank * d / n})
        rows.append({"method": "linformer", "rank": rank, "stored": 2 * rank * d / n})
        rows.append({"method": "favor", "rank": rank, "stored": rank * (d + 1) / n})
    rows += [
        {"method": "topk", "rank": d // 4, "n_exact": m, "stored": 2 * d + d // 4}
        for m in (n // 64, n // 16, n // 4)
    ]
    return rows


def by_method(data: Data, method: str, rank: int, n_exact: int = 0) -> np.ndarray:
    """Attention by one of our methods, or of others', where ``rank`` is the size that a paper counts."""
    if method in OURS:
        return slra.low_rank_attention(*data, rank, method=method, n_exact=n_exact)
    sizes = (rank, n_exact) if method == "topk" else (rank,)
    return getattr(slra.baselines, method)(*data, *sizes)


def measure(data: Data) -> list[dict[str, Any]]:
    """Errors of every configuration."""
    exact = exact_attention(*data)
    rows = configurations(data[0].shape[-2], data[0].shape[-1])
    for row in rows:
        out = by_method(data, row["method"], row["rank"], row.get("n_exact", 0))
        row |= summary(relative(out, exact))
    return rows


def plot(result: dict[str, Any]) -> None:
    """Error against stored numbers, for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9))
    for axis, name in zip(axes.flat, ("minilm", "flat", "power-law", "outlier"), strict=True):
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in result[name]:
            exact_keys = f", {row['n_exact']} exact keys" if "n_exact" in row else ""
            key = row["method"] + (exact_keys if row["method"] == "output" else "")
            curves.setdefault(key, []).append(row)
        for key, rows in curves.items():
            stored, median = ([row[x] for row in rows] for x in ("stored", "median"))
            axis.plot(stored, median, ".-", label=key)
        axis.set(xscale="log", yscale="log", title=name)
        axis.set(xlabel="stored numbers per key", ylabel="relative error of the output, median")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "fidelity.png", dpi=110)


COMPARED = ("numpy", "scipy")


def tables(result: dict[str, Any]) -> dict[str, Any]:
    found = {(row["method"], row["rank"], row.get("n_exact", 0)): row for row in result["minilm"]}
    ranks = [rank for method, rank, n_exact in found if (method, n_exact) == ("svd", 0)]
    rows = []
    for rank in ranks:
        runs = [*(found[method, rank, 0] for method in OURS), found["output", rank, 16]]
        stored = f"{runs[2]['stored']} and {runs[3]['stored']:.1f} of 64"
        rows.append((rank, *(f"{run['median']:.3f}" for run in runs), stored))
    head = ["rank", *OURS, "output, 16 exact keys", "stored, per key"]
    return {"errors": table(head, rows)}


def says(result: dict[str, Any]) -> list[str]:
    exact_keys = max(
        row["max"] for row in result["flat"] if row.get("n_exact") and row["method"] == "output"
    )
    return [f"exact keys make it worse, up to {significant(exact_keys, 3)}"]


def main() -> None:
    data = minilm()
    result: dict[str, Any] = {
        "minilm": measure(data),
    }
    for kind in ("flat", "power-law", "outlier"):
        result[kind] = measure(synthetic(kind))
    save("fidelity", result, tables, says=says, compared=COMPARED)
    plot(result)
    for name in ("minilm", "flat", "power-law", "outlier"):
        print(name)
        for row in result[name]:
            print("  ", {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()})


if __name__ == "__main__":
    main()
