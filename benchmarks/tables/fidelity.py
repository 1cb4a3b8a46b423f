"""Errors of low-rank attention, and ranks by tolerance."""

from typing import Any

from benchmarks.markdown import significant, table

COMPARED = ("numpy", "scipy")
METHODS = ("svd", "scores", "output")


def tables(result: dict[str, Any]) -> dict[str, str]:
    found = {(row["method"], row["rank"], row.get("n_exact", 0)): row for row in result["minilm"]}
    ranks = [rank for method, rank, n_exact in found if (method, n_exact) == ("svd", 0)]
    rows = []
    for rank in ranks:
        runs = [*(found[method, rank, 0] for method in METHODS), found["output", rank, 16]]
        stored = f"{runs[2]['stored']} and {runs[3]['stored']:.1f} of 64"
        rows.append((rank, *(f"{run['median']:.3f}" for run in runs), stored))
    errors = table(["rank", *METHODS, "output, 16 exact keys", "stored, per key"], rows)
    rows = [
        (
            data,
            one["rtol"],
            f"{one['heads_within']:.0%}",
            f"{one['worst_over_rtol']:.3f}",
            f"{one['mean_rank']:.1f}",
            f"{one['over_oracle']:.2f}",
            f"{one['over_uniform_rank']:.2f}",
        )
        for data, part in (
            ("MiniLM, all rows seen", "adaptive"),
            ("power law, half the rows seen", "adaptive_sampled"),
        )
        for one in result[part]
    ]
    head = ["data", "rtol", "heads within", "worst error / rtol", "mean rank", "over oracle"]
    return {"errors": errors, "tolerance": table([*head, "over one rank for all"], rows)}


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    predicted = {row["method"]: row for row in result["calibration_at_rank_16"]}["output"]
    scores = {row["rank"]: row for row in result["score_part"]}[8]
    lost = scores["joint_over_svd_output_worst"] - 1
    assert max(row["joint_over_svd_scores_worst"] for row in result["score_part"]) < 1
    exact_keys = max(
        row["max"] for row in result["flat"] if row.get("n_exact") and row["method"] == "output"
    )
    return {
        "docs/low_rank_attention.md": [
            f"exact keys make it worse, up to {significant(exact_keys, 3)}",
            f'"scores" on its own can lose to "svd" by {lost:.0%} on the output of a head at rank 8',
            f'predicted over true error of "output" is {predicted["median"]:.2f} in the median and '
            f"{predicted['min']:.2f} to {predicted['max']:.2f} over all heads",
        ],
        "docs/performance.md": [f"make it worse, up to {significant(exact_keys, 3)}"],
    }
