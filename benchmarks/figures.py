"""Draw the pictures of the concepts for the documentation, and keep the numbers that they show.

    python -m benchmarks.figures     about twenty seconds on one core

Writes docs/_static/figures/*.png and results/figures.json. Nothing is timed.
"""

from typing import Any

from benchmarks.common import save
from docs.figures import FIGURES, FOLDER, draw


def says(drawn: dict[str, Any]) -> list[str]:
    """Phrases that repeat what the pictures show."""
    return [
        *_svd(drawn["svd"]),
        f"relative error of {drawn['decompose']['robust_pca_error']:.0e}".replace("e-0", "e-"),
        f"of the truncated SVD of rank 3 it is {drawn['decompose']['svd_error']:.2f}",
        _errors(drawn["attention_error"]),
        *_adaptive_rank(drawn["adaptive_rank"]),
        *_cache(drawn["cache"]),
    ]


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


def main() -> None:
    numbers = {}
    for name in FIGURES:
        numbers[name] = draw(name, FOLDER)
        print(FOLDER / f"{name}.png", (FOLDER / f"{name}.png").stat().st_size, "bytes")
    kept = {name: one for name, one in numbers.items() if one}
    save("figures", kept, says=says, keep={"figures": kept})


if __name__ == "__main__":
    main()
