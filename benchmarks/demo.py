"""The README's table and picture: what ``python -m slra demo`` measures, kept with the machine it ran on.

Run: python -m benchmarks.demo
"""

from pathlib import Path

from benchmarks.common import save
from slra.cli.backends import open_backend
from slra.cli.demo import Comparison, compare
from slra.cli.plots import draw
from slra.cli.plots import save as save_picture
from slra.data import load_sample

PICTURE = Path(__file__).parents[1] / "docs" / "_static" / "demo.png"


def table(comparison: Comparison) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| method | rank | error, median | error, worst | K and V, bytes | time |",
        "|---|---:|---:|---:|---:|---:|",
        "| exact | 32 | 0 | 0 | 1.00 x | 1.00 x |",
    ]
    for row in comparison.rows:
        stored = row.kv_bytes / comparison.exact_kv_bytes
        time = row.seconds / comparison.exact_seconds
        lines.append(
            f"| `{row.method}` | {row.rank} | {row.median_error:.2g} | {row.worst_error:.2g} "
            f"| {stored:.2f} x | {time:.2f} x |"
        )
    return "\n".join(lines)


def main() -> None:
    sample = load_sample()
    comparison = compare(open_backend("numpy"), sample, lambda: None)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    save_picture(draw(sample, comparison), PICTURE)
    rows = [
        {
            "method": row.method,
            "rank": row.rank,
            "relative_error_per_head": row.errors.tolist(),
            "bytes": row.kv_bytes,
            "seconds": row.seconds,
        }
        for row in comparison.rows
    ]
    exact = {"bytes": comparison.exact_kv_bytes, "seconds": comparison.exact_seconds}
    save("demo", {"shape": comparison.shape, "exact": exact, "rows": rows})
    print(table(comparison))


if __name__ == "__main__":
    main()
