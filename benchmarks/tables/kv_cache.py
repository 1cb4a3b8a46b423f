"""One decoding step on a compressed cache."""

from typing import Any

from benchmarks.markdown import duration, significant, table

COMPARED = ("numpy", "torch")
DATA = {"s = 1/i": "$s_i = 1/i$", "s = i^-1.5": "$s_i = i^{-1.5}$"}
LIBRARIES = ("numpy", "torch")


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = []
    for row in (row for row in result["rows"] if "seconds" in row):
        name = DATA.get(row["data"], f"{row['data']}, n = {row['n']}, d = {row['d']}")
        against = [row[f"against {library}"] for library in LIBRARIES]
        paid = [one["break-even tokens"] for one in against]
        rows.append(
            (
                name,
                f"{row['query heads']} on {row['key heads']}",
                row["rank"],
                significant(row["error"]["all heads"]),
                f"{1 / row['bytes']['ratio']:.2f} x",
                *(f"{one['times faster']:.1f} x" for one in against),
                duration(sum(row["fit seconds"].values())),
                ", ".join("never" if tokens is None else f"{tokens:.0f}" for tokens in paid),
            )
        )
    head = ["data", "heads", "rank", "error", "bytes", "NumPy", "torch", "fit and compression"]
    steps = table([*head, "break-even (NumPy, torch)"], rows, "llrrrrrrr")
    by_length = [
        (row["n"], *(f"{row[f'against {library}']['times faster']:.1f} x" for library in LIBRARIES))
        for row in sorted(result["against length"], key=lambda row: row["n"])
    ]
    return {"steps": steps, "lengths": table(["tokens", "NumPy", "torch"], by_length, "rrr")}


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    first, second = (
        row for row in result["rows"] if row["data"] == "s = 1/i" and row["rank"] == 32
    )
    worst = [significant(row["error"]["worst head"]) for row in (first, second)]
    appends = result["10000 appends"]
    microseconds = appends["median microseconds"]
    short = [row for row in result["rows"] if row["data"] == "MiniLM"]
    slower = [row[f"against {library}"]["times faster"] for row in short for library in LIBRARIES]
    slowest, fastest = (significant(f(slower), 1) for f in (min, max))
    return {
        "docs/cache.md": [
            f"off by {worst[0]} in the first row and by {worst[1]} in the second",
            f"{appends['bytes of a token']} bytes a token",
            f"never more than {appends['most bytes over those in use']:.2f} times what is in use",
            f"{appends['bytes copied over bytes in use']:.1f} times the final bytes copied altogether",
            f"a median of {microseconds['first 1000']:.0f} microseconds for the first thousand and of "
            f"{microseconds['last 1000']:.0f} for the last",
        ],
        "docs/performance.md": [
            f"a step on a compressed cache runs at {slowest} to {fastest} of the speed of an exact one"
        ],
    }
