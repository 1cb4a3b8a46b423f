"""Time of low-rank attention, the fit included."""

import math
from typing import Any

from benchmarks.markdown import duration, significant, table

COMPARED = ("numpy", "scipy", "torch")
NAMES = {
    "naive numpy": "the formula, NumPy, in place",
    "numpy exact": "`slra.attention`, NumPy",
    "torch sdpa": "torch SDPA",
    "numpy": "rank 32, NumPy, fit included",
    "numpy, fitted before": "rank 32, NumPy, basis fitted before",
    "torch": "rank 32, torch, fit included",
    "torch, fitted before": "rank 32, torch, basis fitted before",
}


def tables(result: dict[str, Any]) -> dict[str, str]:
    long, errors = result["long"]["median"], result["long"]["errors"]
    rows = [
        (
            name,
            duration(long[key]),
            significant(long["naive numpy"] / long[key]),
            significant(long["torch sdpa"] / long[key]),
            _range(errors[key.partition(",")[0]]) if "rank" in name else "",
        )
        for key, name in NAMES.items()
    ]
    head = [
        "n = 8192, 4 heads, d = 128",
        "time",
        "times faster than the formula",
        "than torch SDPA",
    ]
    return {"long": table([*head, "relative error by head"], rows, "lrrrr")}


def _range(errors: list[float]) -> str:
    return f"{significant(min(errors))} to {significant(max(errors))}"


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    long = result["long"]
    naive, sdpa, on_torch = (
        significant(long[f"{name}_speedup_over_{other}"])
        for name, other in (("numpy", "naive"), ("numpy", "sdpa"), ("torch", "sdpa"))
    )
    plain = [row for row in result["short"] if "rank" in row and "n_exact" not in row]
    output, others = (
        _range([row["over_exact"] for row in plain if row["method"] in methods])
        for methods in (("output",), ("svd", "scores"))
    )
    errors = _range(long["errors"]["numpy"])
    doubled = long["errors"]["float64"]
    apart = max(
        abs(x / y - 1)
        for name in ("numpy", "torch")
        for x, y in zip(long["errors"][name], doubled, strict=True)
    )
    return {
        "README.md": [
            f"it is {naive} times faster than naive NumPy attention, and on torch {on_torch} times faster than its "
            f"fused kernel, at an error of {errors}"
        ],
        "docs/low_rank_attention.md": [
            f"{naive} times faster than the formula and {sdpa} times faster than torch's fused kernel at full d; on "
            f"torch {on_torch} times faster than that kernel",
            f"Fitted in float64 the errors are the same within {math.ceil(100 * apart)}%",
            f'of "svd": {_range(long["errors"]["svd"])}',
            f'{output} times the time of exact attention for "output", {others} for "svd" and "scores"',
        ],
        "docs/performance.md": [f'{output} times as long as exact attention for "output"'],
    }
