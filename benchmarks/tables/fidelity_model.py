"""A whole encoder with every attention replaced."""

from typing import Any

from benchmarks.markdown import scientific, table

COMPARED = ("numpy", "torch")


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = [
        (
            row["rank"],
            row["method"],
            row["fit"],
            f"{row['cosine_mean']:.3f}",
            f"{row['cosine_min']:.3f}",
            f"{row['top10_agreement']:.2f}",
        )
        for row in result["rows"]
    ]
    head = ["rank of 32", "method", "fit", "cosine, mean", "cosine, worst", "top-10 in common"]
    return {"rows": table(head, rows)}


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    fold = result["fold_at_rank_16"]
    counts = result["passages"], result["tokens"], result["calibration_passages"]
    return {
        "docs/low_rank_attention.md": [
            f"{counts[0]} passages of {counts[1]} tokens",
            f"one basis per layer, from {counts[2]} other passages",
            f"shrink from {fold['attention_parameters']:,} to {fold['attention_parameters_folded']:,} numbers",
            f"by at most {scientific(fold['largest_difference'])}",
        ]
    }
