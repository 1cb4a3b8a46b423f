"""Randomized SVD on Dask beside ``svd_compressed``."""

from typing import Any

from benchmarks.markdown import duration, scientific, table

COMPARED = ("dask", "distributed", "numpy")
NAMES = {
    "slra, n_iter=1": "`randomized_svd`, `n_iter=1`",
    "slra, n_iter=2": "`n_iter=2`",
    "slra, n_iter=3": "`n_iter=3`, the default",
    "slra, n_iter=5": "`n_iter=5`",
    "svd_compressed, compute=True": "`svd_compressed`, `compute=True`",
    "svd_compressed, compute=False": "`svd_compressed`, `compute=False`: holds the whole matrix",
}


def tables(result: dict[str, Any]) -> dict[str, str]:
    generated, held = result["generated"], result["in memory"]
    rows = [
        (
            name,
            f"{generated[key]['passes']:g}",
            scientific(generated[key]["sigma_error"], 2),
            duration(generated[key]["seconds"]),
            duration(held[key]["seconds"], 3),
        )
        for key, name in NAMES.items()
    ]
    return {"beside": table(["", "passes", "sigma error", "generated", "in memory"], rows, "lrrrr")}


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    generated, held = result["generated"], result["in memory"]
    theirs, whole = "svd_compressed, compute=True", "svd_compressed, compute=False"

    def over(ours: int, other: str, part: dict[str, Any]) -> str:
        return f"{part[f'slra, n_iter={ours}']['seconds'] / part[other]['seconds']:.2f}"

    assert generated["slra, n_iter=5"]["passes"] == generated[theirs]["passes"]
    smaller = generated[theirs]["sigma_error"] / generated["slra, n_iter=5"]["sigma_error"]
    assert generated["slra, n_iter=2"]["sigma_error"] < generated[theirs]["sigma_error"]
    return {
        "docs/scaling.md": [
            f"At six passes the error is {round(smaller, -5 + 1):,.0f} times smaller and the run takes "
            f"{over(5, theirs, generated)} times as long",
            f"less than its error, in {over(2, theirs, generated)} of its time",
            f"as long as `svd_compressed` ({over(2, whole, held)}), or {over(2, whole, generated)} times as long when",
        ],
        "docs/performance.md": [
            f"at the same number of passes it takes {over(5, theirs, generated)} times as long as Dask's "
            "`svd_compressed`",
        ],
    }
