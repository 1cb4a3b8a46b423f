"""Robust PCA beside TensorLy and a full-SVD solver; compression of real keys at equal bytes.

    python -m benchmarks.decompose     about three minutes; writes benchmarks/results/decompose.json

Needs the ``bench`` extra and tensorly.
"""

from importlib import metadata
from statistics import median
from typing import Any

import numpy as np

import slra
from benchmarks.common import interleaved, save, table
from benchmarks.markdown import duration, scientific, significant
from benchmarks.minilm import load_qkv

RANKS = (8, 16, 24)
N_SEEDS = 50
Array = np.ndarray[Any, Any]


def corrupted(seed: int, m: int = 400, n: int = 300, rank: int = 10) -> tuple[Array, Array]:
    """Return a low-rank matrix and gross errors on 5% of its entries, uniform on [-50, 50]."""
    rng = np.random.default_rng(seed)
    low_rank = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    hit = rng.random((m, n)) < 0.05
    return low_rank, np.where(hit, rng.uniform(-50, 50, (m, n)), 0.0)


def full_svd_alm(x: Array, tol: float = 1e-7, max_iter: int = 500) -> tuple[Array, Array]:
    """Inexact ALM as published (Lin, Chen, Ma 2010): geometric penalty, primal residual, full SVDs."""
    l1 = 1 / np.sqrt(max(x.shape))
    size, largest = np.linalg.norm(x), np.linalg.norm(x, 2)
    multiplier = x / max(largest, np.max(np.abs(x)) / l1)
    penalty, sparse = 1.25 / largest, np.zeros_like(x)
    for _ in range(max_iter):
        U, S, Vh = np.linalg.svd(x - sparse + multiplier / penalty, full_matrices=False)
        low_rank = (U * np.maximum(S - 1 / penalty, 0)) @ Vh
        sparse = slra.soft_threshold(x - low_rank + multiplier / penalty, float(l1 / penalty))
        rest = x - low_rank - sparse
        multiplier, penalty = multiplier + penalty * rest, penalty * 1.5
        if np.linalg.norm(rest) <= tol * size:
            break
    return low_rank, sparse


def robust_pca() -> dict[str, Any]:
    """Recovery over many seeds, and times on one of them."""
    from tensorly.decomposition import robust_pca as tensorly_robust_pca

    errors, iterations, wrong, converged = [], [], 0, 0
    for seed in range(N_SEEDS):
        low_rank, sparse = corrupted(seed)
        result = slra.robust_pca(low_rank + sparse, rng=0)
        errors.append(relative(result.low_rank, low_rank))
        iterations.append(result.n_iter)
        wrong += bool(np.any((result.sparse != 0) != (sparse != 0)))
        converged += result.converged
    low_rank, sparse = corrupted(0)
    x = low_rank + sparse
    seconds = interleaved(
        {
            "slra.robust_pca": lambda: slra.robust_pca(x, rng=0),
            "full-SVD ALM": lambda: full_svd_alm(x),
        },
        repeats=7,
    )
    # Its own defaults, once to warm up and five times to measure: seconds each.
    seconds |= interleaved(
        {"tensorly": lambda: tensorly_robust_pca(x), "slra": lambda: slra.robust_pca(x, rng=0)}, 5
    )
    middle = {name: median(each) for name, each in seconds.items()}
    return {
        "seeds": N_SEEDS,
        "seeds converged": converged,
        "seeds with a wrong support": wrong,
        "largest relative error of the low-rank part": max(errors),
        "median iterations": median(iterations),
        "milliseconds": {name: round(1e3 * t, 1) for name, t in middle.items()},
        "tensorly over slra": round(middle["tensorly"] / middle["slra"], 2),
        "full-SVD ALM over slra": round(middle["full-SVD ALM"] / middle["slra.robust_pca"], 2),
        "relative error of tensorly": relative(tensorly_robust_pca(x)[0], low_rank),
        "relative error of the full-SVD ALM": relative(full_svd_alm(x)[0], low_rank),
    }


def relative(x: Array, exact: Array) -> float:
    """Relative Frobenius error."""
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def compress_heads(name: str, heads: Array) -> dict[str, Any]:
    """Compress every head at the bytes of a truncated SVD; count where sparse entries help."""
    report = {}
    for rank in RANKS:
        gains, entries, worse = [], [], 0
        for x in heads:
            U, S, Vh = slra.truncated_svd(x, rank)
            plain = relative((U * S) @ Vh, x)
            small = slra.compress(x, rank, "auto")
            assert small.nbytes <= (x.shape[0] + x.shape[1]) * rank * x.dtype.itemsize
            error = relative(small.to_dense(), x)
            # In single precision, what rounds differently is no loss.
            worse += error > plain * (1 + 1e-6)
            if small.values.shape[-1] > 0:
                gains.append(1 - error / plain)
                entries.append(small.values.shape[-1])
        report[f"{name}, rank {rank}"] = {
            "heads": len(heads),
            "heads with a larger error than the truncated SVD": int(worse),
            "heads where sparse entries help": len(gains),
            "relative gain there, median and largest": [
                round(float(f(gains)), 4) if gains else 0.0 for f in (np.median, np.max)
            ],
            "entries a row there, median": float(np.median(entries)) if entries else 0.0,
        }
    return report


def compression() -> dict[str, Any]:
    """Keys of all 72 heads of MiniLM-L6, 512 tokens by 32 features, and their transposes."""
    _, k, _ = load_qkv()
    heads = k.reshape(-1, *k.shape[-2:])
    turned = np.ascontiguousarray(np.swapaxes(heads, -1, -2))
    return compress_heads("keys, tokens x features", heads) | compress_heads(
        "keys, features x tokens", turned
    )


RPCA = "robust_pca, 400 x 300, rank 10, 5% gross errors"


def tables(result: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for case, found in result["compress at equal bytes"].items():
        gains = found["relative gain there, median and largest"]
        rows.append(
            (
                f"{case.removeprefix('keys, ')}",
                found["heads with a larger error than the truncated SVD"],
                found["heads where sparse entries help"],
                " / ".join(f"{gain:.0%}" for gain in gains),
                f"{found['entries a row there, median']:g}",
            )
        )
    head = ["keys as, bytes of", "heads that lose", "heads that gain", "gain, median / largest"]
    compressed = table([*head, "entries a row, median"], rows)
    one, ms = result[RPCA], result[RPCA]["milliseconds"]
    by = (
        ("`robust_pca`", "slra.robust_pca", None, "largest relative error of the low-rank part"),
        (
            "the same with full SVDs",
            "full-SVD ALM",
            "full-SVD ALM over slra",
            "relative error of the full-SVD ALM",
        ),
        (
            "TensorLy, its defaults",
            "tensorly",
            "tensorly over slra",
            "relative error of tensorly",
        ),
    )
    rows = [
        (
            name,
            duration(ms[key] / 1e3),
            significant(one[over] if over else 1),
            scientific(one[error]),
        )
        for name, key, over, error in by
    ]
    head = ["by", "time", "over slra", "relative error of the low-rank part"]
    return {"compress": compressed, "robust_pca": table(head, rows, "lrrr")}


def says(result: dict[str, Any]) -> list[str]:
    one = result[RPCA]
    exact = one["seeds"] - one["seeds with a wrong support"]
    return [
        f"robust PCA {significant(one['tensorly over slra'])} times faster than TensorLy's",
        f"{one['seeds']} seeds: {one['seeds converged']} converge, the support is exact on {exact}",
    ]


def main() -> None:
    """Measure all and write the results."""
    result = {
        "robust_pca, 400 x 300, rank 10, 5% gross errors": robust_pca(),
        "compress at equal bytes": compression(),
        "tensorly": metadata.version("tensorly"),
    }
    for name, each in result.items():
        print(name, each)
    print(save("decompose", result, tables, says=says))


if __name__ == "__main__":
    main()
