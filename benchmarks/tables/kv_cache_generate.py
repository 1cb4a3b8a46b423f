"""What a compressed cache does to a language model."""

from statistics import median
from typing import Any

from benchmarks.markdown import significant, table

COMPARED = ("torch", "numpy")


def tables(result: dict[str, Any]) -> dict[str, str]:
    exact = result["exact"]
    rows = [("exact", "", "", "1.00 x", f"{2 ** exact['bits a byte']:.2f}", 0, 192)]
    rows += [
        (
            row["method"],
            row["rank"],
            row["window"],
            f"{1 / row['bytes ratio']:.2f} x",
            f"{row['perplexity']:.2f}",
            f"{row['divergence, bits']:.3f}",
            f"{row['bytes written alike, mean']:.0f}",
        )
        for row in result["rows"]
    ]
    head = ["method", "rank", "window", "bytes", "perplexity", "divergence, bits"]
    return {
        "text": table([*head, "bytes written alike"], rows, "lrrrrrr"),
        "rotary": table(
            ["rank", "error after", "error before", "step after", "step before"],
            [_rotary(result["rotary"], rank) for rank in (8, 16, 24)],
            "rrrrr",
        ),
    }


def _rotary(rows: list[dict[str, Any]], rank: int) -> tuple[Any, ...]:
    """Medians over the layers."""

    def middle(name: str) -> float:
        return median(row[name] for row in rows if row["rank"] == rank)

    errors = (significant(middle(f"error, {when}")) for when in ("after", "before"))
    times = (f"{middle(f'milliseconds, {when}'):.2f} ms" for when in ("after", "before"))
    return rank, *errors, *times


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    decoder = result["decoder"]
    return {
        "docs/cache.md": [
            f"A decoder of {decoder['parameters'] / 1e6:.2f} million parameters ({decoder['layers']} layers",
            f"to {result['held out bits a byte, whole windows']:.2f} bits a byte",
        ]
    }
