"""The comparisons as a table for the terminal and as JSON."""

from typing import Any

from rich.table import Table

from slra.cli.bench.comparisons import N_ROUNDS, Comparison, Row

__all__ = ["about_machine", "record", "table"]


def table(comparison: Comparison, rows: list[Row]) -> Table:
    """One comparison; times over that of slra, in the first row."""
    found = Table(
        title=f"{comparison.name}: {comparison.problem}",
        caption=f"error: {comparison.error_is}. time: median of {N_ROUNDS} interleaved.",
        title_justify="left",
        caption_justify="left",
    )
    found.add_column("")
    for header in ("time\nms", "time\n/ slra", "error"):
        found.add_column(header, justify="right")
    for row in rows:
        found.add_row(row.name, *_cells(row, rows[0]))
    return found


def _cells(row: Row, first: Row) -> list[str]:
    if row.median is None or first.median is None or row.error is None:
        return ["not installed", "", ""]
    return [f"{row.median * 1e3:.1f}", f"{row.median / first.median:.2f}", f"{row.error:.1e}"]


def record(comparison: Comparison, rows: list[Row]) -> dict[str, Any]:
    """One comparison with all numbers, unrounded."""
    return {
        "name": comparison.name,
        "problem": comparison.problem,
        "error": comparison.error_is,
        "rows": [
            row._asdict() | {"median": row.median, "installed": bool(row.seconds)} for row in rows
        ],
    }


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
