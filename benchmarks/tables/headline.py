"""What ``python -m slra bench`` measures."""

from typing import Any

from benchmarks.markdown import duration, scientific, significant, table

COMPARED = ("numpy", "scipy", "torch", "scikit-learn")


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = []
    for comparison in result["comparisons"]:
        first = comparison["rows"][0]
        for row in (row for row in comparison["rows"] if row["installed"]):
            title = f"{comparison['name']}, {comparison['problem']}" if row is first else ""
            rows.append(
                (
                    title,
                    f"`{row['name']}`".replace("|", "\\|"),
                    duration(row["median"]),
                    significant(row["median"] / first["median"]),
                    scientific(row["error"], 2),
                )
            )
    return {"all": table(["problem", "by", "time", "over slra", "error"], rows, "llrrr")}
