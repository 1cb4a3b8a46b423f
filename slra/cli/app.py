"""Commands and what they print; the computing is in the modules beside this one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slra.cli.backends import BackendUnavailableError, open_backend
from slra.cli.demo import N_ROUNDS, Comparison, compare, count_calls
from slra.cli.files import require_writable
from slra.data import load_sample

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

BackendName = StrEnum("BackendName", ["numpy", "torch", "jax", "cupy"])


@app.callback()
def root() -> None:
    """Sparse and low-rank approximation, and attention on it."""


@app.command()
def demo(
    backend: Annotated[
        BackendName, typer.Option(help="The array library that computes.")
    ] = BackendName.numpy,
    output: Annotated[Path, typer.Option(help="Directory for the picture.")] = Path("slra-demo"),
) -> None:
    """Compress the attention of a real encoder and show what it costs and saves."""
    from slra.cli.plots import draw, save

    try:
        opened = open_backend(backend.value)
        require_writable(output, "--output")
    except (OSError, BackendUnavailableError) as error:
        _fail(str(error))

    sample = load_sample()
    with _progress() as progress:
        task = progress.add_task("Attention, exact and low rank", total=count_calls())
        comparison = compare(opened, sample, lambda: progress.advance(task))
    console = Console()
    console.print(_table(comparison))
    console.print(_verdict(comparison))

    picture = output / "demo.png"
    try:
        save(draw(sample, comparison), picture)
    except OSError as error:
        _fail(f"cannot write {picture}: {error.strerror}")
    typer.echo(f"Picture: {picture}")


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _table(comparison: Comparison) -> Table:
    n_heads, n_tokens, d = comparison.shape
    table = Table(
        title=f"Attention of {n_heads} MiniLM-L6 heads, {n_tokens} tokens, d = {d}, "
        f"float32, {comparison.backend}",
        caption="error: norm(out - exact) / norm(exact), Frobenius, median and worst over heads. "
        "K, V: all heads; rank r keeps n x r coordinates and a d x r basis of each, "
        "joint and output a shift too. "
        f"time: the whole call, factoring included, median of {N_ROUNDS} interleaved.",
        caption_justify="left",
    )
    table.add_column("method")
    for header in ("rank", "error\nmedian", "error\nworst", "K, V\nKiB", "K, V\n/ exact"):
        table.add_column(header, justify="right")
    for header in ("time\nms", "time\n/ exact"):
        table.add_column(header, justify="right")
    kib, ms = comparison.exact_kv_bytes / 1024, comparison.exact_seconds * 1e3
    table.add_row("exact", "-", "0", "0", f"{kib:.0f}", "1.00", f"{ms:.1f}", "1.00")
    for row in comparison.rows:
        table.add_row(
            row.method,
            str(row.rank),
            f"{row.median_error:.2g}",
            f"{row.worst_error:.2g}",
            f"{row.kv_bytes / 1024:.0f}",
            f"{row.kv_bytes / comparison.exact_kv_bytes:.2f}",
            f"{row.seconds * 1e3:.1f}",
            f"{row.seconds / comparison.exact_seconds:.2f}",
        )
    return table


def _verdict(comparison: Comparison) -> str:
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
