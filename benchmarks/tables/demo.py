"""The table of the README."""

from statistics import median
from typing import Any

from benchmarks.markdown import significant, table

NAMES = {
    "svd": "`svd`: Q, K and V each cut to rank r",
    "output": "`output`: fitted to what attention returns",
}
RANKS = (8, 16, 24)


def tables(result: dict[str, Any]) -> dict[str, str]:
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
