"""What pages say of the pictures of the concepts."""

from typing import Any


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    """Return by page the phrases that must be in it."""
    drawn = result["figures"]
    return {
        "docs/svd.md": _svd(drawn["svd"]),
        "docs/decompose.md": [
            f"relative error of {drawn['decompose']['robust_pca_error']:.0e}".replace("e-0", "e-"),
            f"of the truncated SVD of rank 3 it is {drawn['decompose']['svd_error']:.2f}",
        ],
        "docs/low_rank_attention.md": [_errors(drawn["attention_error"])],
        "docs/adaptive_rank.md": _adaptive_rank(drawn["adaptive_rank"]),
        "docs/cache.md": _cache(drawn["cache"]),
    }


def _svd(drawn: dict[str, Any]) -> list[str]:
    rough, ours = (one["excess_percent"].values() for one in drawn.values())
    # Rounded up: it is a bound.
    within = -(-max(ours) // 0.01) / 100
    return [
        f"the error is {min(rough):.0f} to {max(rough):.0f}% above the least possible",
        f"the default is within {within:g}% of it",
    ]


def _errors(drawn: dict[str, Any]) -> str:
    svd, scores, output = (drawn[method]["8"] for method in ("svd", "scores", "output"))
    return f"the error of this head is {svd:.2f}, {scores:.2f} and {output:.2f}"


def _adaptive_rank(drawn: dict[str, Any]) -> list[str]:
    _, sampled, other = drawn["largest_error_over_rtol"].values()
    return [
        f"One rank for all six would have to be {drawn['common_rank']}",
        f"the true error came to {sampled:.2f} times the tolerance at most",
        f"the error came to {other:.2f} times the tolerance",
    ]


def _cache(drawn: dict[str, Any]) -> list[str]:
    none, some = (drawn["rank 8"][f"window {window}"] for window in (0, 64))
    more = drawn["rank 16"]["window 0"]
    return [
        f"at rank 8, {none['median_error']:.2f} without and {some['median_error']:.2f} with a window of 64, "
        f"for {none['stored_share']:.2f} and {some['stored_share']:.2f} of the numbers",
        f"rank 16 without a window has {more['median_error']:.2f} for {more['stored_share']:.2f}",
    ]
