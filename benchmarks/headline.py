"""The headline of docs/performance.md: what ``python -m slra bench`` measures, kept with the machine it ran on.

python -m benchmarks.headline     about a minute on two cores; writes results/headline.json
"""

from typing import Any

from rich.console import Console

from benchmarks.common import save, table
from benchmarks.markdown import duration, scientific, significant
from slra.cli.bench.command import run
from slra.cli.bench.output import show

COMPARED = ("numpy", "scipy", "torch", "scikit-learn")


def tables(result: dict[str, Any]) -> dict[str, Any]:
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


def says(result: dict[str, Any]) -> list[str]:
    over = {
        (comparison["name"], row["name"]): row["median"] / comparison["rows"][0]["median"]
        for comparison in result["comparisons"]
        for row in comparison["rows"]
        if row["installed"]
    }
    full = significant(over["SVD of a batch", "numpy.linalg.svd"])
    loop = significant(over["SVD of a batch", "scikit-learn randomized_svd, in a loop"])
    nuclear = significant(over["prox of the nuclear norm", "by a full SVD, numpy"])
    return [
        f"{full} times faster than the one at the same error, {loop} times faster than the other",
        f"the nuclear norm's operator {nuclear} times faster",
    ]


def main() -> None:
    found = run(lambda: None)
    show(Console(), found)
    print(save("headline", found, tables, says=says, compared=COMPARED))


if __name__ == "__main__":
    main()
