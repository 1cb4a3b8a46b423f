"""The comparisons as JSON, and as tables for the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from slra.cli.bench.comparisons import N_ROUNDS, Comparison, Row

__all__ = ["about_machine", "record", "show", "table"]


def record(comparison: Comparison, rows: list[Row]) -> dict[str, Any]:
    """Return one comparison with all numbers, unrounded."""
    return {
        "name": comparison.name,
        "problem": comparison.problem,
        "error": comparison.error_is,
        "rows": [
            row._asdict() | {"median": row.median, "installed": bool(row.seconds)} for row in rows
        ],
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """Print every comparison, and what the times are of."""
    for comparison in found["comparisons"]:
        console.print(f"{comparison['name']}: {comparison['problem']}", style="bold")
        console.print(table(comparison))
        console.print(f"error: {comparison['error']}\n", highlight=False)
    console.print(f"time: median of {N_ROUNDS} interleaved calls\n", highlight=False)
    console.print(about_machine(found["machine"]), highlight=False)


def table(comparison: dict[str, Any]) -> Table:
    """One comparison; times over that of slra, in the first row."""
    made = Table()
    made.add_column("")
    for header in ("time\nms", "time\n/ slra", "error"):
        made.add_column(header, justify="right")
    first = comparison["rows"][0]
    for row in comparison["rows"]:
        cells = ["not installed", "", ""]
        if row["installed"]:
            over = row["median"] / first["median"]
            cells = [f"{row['median'] * 1e3:.1f}", f"{over:.2f}", f"{row['error']:.1e}"]
        made.add_row(row["name"], *cells)
    return made


def about_machine(machine: dict[str, Any]) -> str:
    """Say what the times are of, in a few lines."""
    versions = {name: v for name, v in machine["versions"].items() if v != "not installed"}
    missing = [name for name, v in machine["versions"].items() if v == "not installed"]
    lines = [
        f"{machine['cpu'] or 'unknown processor'}, {machine['cores']} cores, Python {machine['python']}",
        f"BLAS and threads: {', '.join(machine['blas'])}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if missing:
        lines.append(f"not installed: {', '.join(missing)}")
    return "\n".join(lines)
