"""Robust PCA, and keys compressed at equal bytes."""

from typing import Any

from benchmarks.markdown import duration, scientific, significant, table

RPCA = "robust_pca, 400 x 300, rank 10, 5% gross errors"


def tables(result: dict[str, Any]) -> dict[str, str]:
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


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    one = result[RPCA]
    exact = one["seeds"] - one["seeds with a wrong support"]
    return {
        "docs/decompose.md": [
            f"of {one['seeds']} matrices of 400 x 300 with 5% errors drawn uniformly from [-50, 50], {exact} supports "
            "are exact",
            f"{one['seeds']} seeds: {one['seeds converged']} converge, the support is exact on {exact}",
        ]
    }
