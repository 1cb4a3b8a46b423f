"""Time of low-rank attention, the fit included, and the error beside it.

    python -m benchmarks.fidelity_speed     about three minutes on two cores; writes results/fidelity_speed.json

Long: n = 8192, 4 heads, d = 128, rank 32, float32, singular values of Q, K and V decaying as 1/j, scores with a
standard deviation of 3 over all heads; against naive NumPy attention and torch's fused kernel at full d. Short: the 72
heads of MiniLM on 512 tokens, every method in NumPy, against exact attention in NumPy.
"""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

import slra
from benchmarks.common import interleaved, save, table
from benchmarks.fidelity import Data, by_method, minilm, relative, synthetic
from benchmarks.markdown import duration, significant, span
from benchmarks.minilm import exact_attention
from slra.cli.bench.problems import naive_attention

RANK = 32


def long() -> dict[str, Any]:
    data = synthetic("power-law", n=8192, d=128, heads=4)
    tensors = [torch.from_numpy(x) for x in data]
    bases = {"numpy": slra.fit_attention(*data, RANK), "torch": slra.fit_attention(*tensors, RANK)}
    seconds = interleaved(
        {
            "naive numpy": lambda: naive_attention(*data),
            "torch sdpa": lambda: scaled_dot_product_attention(*(x[None] for x in tensors)),
            "numpy exact": lambda: slra.attention(*data),
            "numpy": lambda: slra.low_rank_attention(*data, RANK),
            "numpy, fitted before": lambda: bases["numpy"].attend(*data),
            "torch": lambda: slra.low_rank_attention(*tensors, RANK),
            "torch, fitted before": lambda: bases["torch"].attend(*tensors),
        },
        repeats=7,
    )
    median = {name: float(np.median(t)) for name, t in seconds.items()}
    exact = np.stack([exact_attention(*(x[h] for x in data)) for h in range(4)])
    doubled = slra.low_rank_attention(*(x.astype(np.float64) for x in data), RANK)
    errors = {
        "numpy": relative(slra.low_rank_attention(*data, RANK), exact).tolist(),
        "torch": relative(slra.low_rank_attention(*tensors, RANK).numpy(), exact).tolist(),
        "float64": relative(doubled, exact).tolist(),
        "svd": relative(slra.low_rank_attention(*data, RANK, method="svd"), exact).tolist(),
    }
    return {
        "seconds": seconds,
        "median": median,
        "numpy_speedup_over_naive": median["naive numpy"] / median["numpy"],
        "numpy_speedup_over_sdpa": median["torch sdpa"] / median["numpy"],
        "torch_speedup_over_sdpa": median["torch sdpa"] / median["torch"],
        "errors": errors,
    }


def short(data: Data) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"method": method, "rank": rank}
        for method in ("svd", "scores", "output")
        for rank in (8, 16, 24)
    ]
    rows += [{"method": "output", "rank": rank, "n_exact": 16} for rank in (8, 16, 24)]
    rows += [{"method": m, "rank": 64} for m in ("nystrom", "linformer", "favor")]
    rows.append({"method": "topk", "rank": 8, "n_exact": 64})
    exact = exact_attention(*data)
    calls = {str(i): lambda o=row: by_method(data, **o) for i, row in enumerate(rows)}
    seconds = interleaved({"exact": lambda: slra.attention(*data), **calls}, repeats=5)
    base = float(np.median(seconds["exact"]))
    for i, row in enumerate(rows):
        error = relative(by_method(data, **row), exact)
        row |= {
            "median_error": float(np.median(error)),
            "over_exact": float(np.median(seconds[str(i)])) / base,
        }
    return [{"method": "exact", "seconds": base}, *rows]


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


def tables(result: dict[str, Any]) -> dict[str, Any]:
    long, errors = result["long"]["median"], result["long"]["errors"]
    rows = [
        (
            name,
            duration(long[key]),
            significant(long["naive numpy"] / long[key]),
            significant(long["torch sdpa"] / long[key]),
            span(errors[key.partition(",")[0]]) if "rank" in name else "",
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


def losses(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Short sequences, by method."""
    plain = [row for row in result["short"] if "rank" in row and "n_exact" not in row]
    return [
        (
            f"512 tokens, d = 32, low rank with its fit, {name}",
            "exact attention",
            span([row["over_exact"] for row in plain if row["method"] in methods]),
        )
        for name, methods in (('"output"', ("output",)), ('"svd", "scores"', ("svd", "scores")))
    ]


def says(result: dict[str, Any]) -> list[str]:
    errors = result["long"]["errors"]
    return [f'of "svd": {span(errors["svd"])}']


def main() -> None:
    result = {"long": long(), "short": short(minilm())}
    save("fidelity_speed", result, tables, losses=losses, says=says, compared=COMPARED)
    for name, x in result["long"].items():
        if name != "seconds":
            print(name, x)
    print(*result["short"], sep="\n")


if __name__ == "__main__":
    main()
