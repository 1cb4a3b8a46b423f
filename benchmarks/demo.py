"""The README's table and picture: what ``python -m slra demo`` measures, kept with the machine it ran on.

python -m benchmarks.demo     about five seconds; writes results/demo.json and docs/_static/demo.png
"""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import save, table
from benchmarks.markdown import significant
from slra.cli.backends import open_backend
from slra.cli.demo import compare
from slra.cli.plots import draw
from slra.cli.plots import save as save_picture
from slra.data import load_sample

PICTURE = Path(__file__).parents[1] / "docs" / "_static" / "demo.png"
NAMES = {
    "svd": "`svd`: Q, K and V each cut to rank r",
    "output": "`output`: fitted to what attention returns",
}


RANKS = (8, 16, 24)


def tables(result: dict[str, Any]) -> dict[str, Any]:
    exact = result["exact"]
    rows = [("exact", 32, 0, 0, "1.00 x", "1.00 x")]
    for row in result["rows"]:
        if row["method"] in NAMES and row["rank"] in RANKS:
            errors = row["relative_error_per_head"]
            rows.append(
                (
                    NAMES[row["method"]] if row["rank"] == RANKS[0] else "",
                    row["rank"],
                    significant(median(errors)),
                    significant(max(errors)),
                    f"{row['bytes'] / exact['bytes']:.2f} x",
                    f"{significant(row['seconds'] / exact['seconds'])} x",
                )
            )
    head = ["method", "rank", "error, median", "error, worst", "K and V, bytes", "time"]
    return {"heads": table(head, rows, "lrrrrr")}


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
    print(save("demo", {"exact": exact, "rows": rows}, tables), PICTURE)


if __name__ == "__main__":
    main()
