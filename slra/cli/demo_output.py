"""The demo's results in words and cells."""

from rich.table import Table

from slra.cli.demo import N_ROUNDS, Comparison

__all__ = ["CAPTION", "HEADERS", "rows", "table", "title", "verdict"]

HEADERS = (
    "method",
    "rank",
    "error\nmedian",
    "error\nworst",
    "K, V\nKiB",
    "K, V\n/ exact",
    "time\nms",
    "time\n/ exact",
)
CAPTION = (
    "error: norm(out - exact) / norm(exact), Frobenius, median and worst over heads. "
    "K, V: all heads; rank r keeps n x r coordinates and a d x r basis of each, scores and output a shift too. "
    f"time: the whole call, factoring included, median of {N_ROUNDS} interleaved."
)


def title(comparison: Comparison) -> str:
    """Say what was computed on."""
    n_heads, n_tokens, d = comparison.shape
    return (
        f"Attention of {n_heads} MiniLM-L6 heads, {n_tokens} tokens, d = {d}, "
        f"float32, {comparison.backend}"
    )


def table(comparison: Comparison) -> Table:
    """Return the table for the terminal."""
    drawn = Table(title=title(comparison), caption=CAPTION, caption_justify="left")
    for header in HEADERS:
        drawn.add_column(header, justify="left" if header == "method" else "right")
    for row in rows(comparison):
        drawn.add_row(*row)
    return drawn


def rows(comparison: Comparison) -> list[list[str]]:
    """Return the cells under `HEADERS`, exact attention first."""
    kib, ms = comparison.exact_kv_bytes / 1024, comparison.exact_seconds * 1e3
    return [
        ["exact", "-", "0", "0", f"{kib:.0f}", "1.00", f"{ms:.1f}", "1.00"],
        *(
            [
                row.method,
                str(row.rank),
                f"{row.median_error:.2g}",
                f"{row.worst_error:.2g}",
                f"{row.kv_bytes / 1024:.0f}",
                f"{row.kv_bytes / comparison.exact_kv_bytes:.2f}",
                f"{row.seconds * 1e3:.1f}",
                f"{row.seconds / comparison.exact_seconds:.2f}",
            ]
            for row in comparison.rows
        ),
    ]


def verdict(comparison: Comparison) -> str:
    """One sentence on speed that says what was measured, whichever way it went."""
    _, n_tokens, d = comparison.shape
    faster = [
        f"{row.method} {row.rank}"
        for row in comparison.rows
        if row.seconds < comparison.exact_seconds
    ]
    if faster:
        return f"Faster than exact attention here, factoring included: {', '.join(faster)}."
    return (
        f"No rank is faster than exact attention here: exact is cheap at {n_tokens} tokens and "
        f"d = {d}, and every call pays for factoring Q, K and V."
    )
