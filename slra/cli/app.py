"""Commands and what they print; the computing is in the modules beside this one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slra.cli.backends import BackendUnavailableError, open_backend
from slra.cli.bench.command import bench
from slra.cli.demo import N_ROUNDS, Comparison, compare, count_calls
from slra.cli.files import replacing, require_writable
from slra.cli.report.advice import advise
from slra.cli.report.arrays import read_layers
from slra.cli.report.measure import count_steps, measure
from slra.cli.report.output import tables, to_json
from slra.data import load_sample

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(bench)

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


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Q, K and V: one .npz or .safetensors file with arrays q, k, v (or layer0/q and so on), "
            "one .npy file of shape (3, ..., H, N, D), or three .npy files.",
        ),
    ],
    causal: Annotated[bool, typer.Option("--causal", help="Attend to no later token.")] = False,
    scale: Annotated[
        float | None, typer.Option(help="Of the scores; 1/sqrt(D) if not given.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Say how far the attention of your own arrays can be compressed, head by head."""
    try:
        for option, path in (("--html", html), ("--json", json)):
            if path is not None:
                _check_target(option, path, files)
        layers = read_layers(files)
    except (OSError, ValueError) as error:
        _fail(str(error))

    options = {"is_causal": causal, "scale": scale}
    with _progress() as progress:
        task = progress.add_task("Attention, exact and low rank", total=count_steps(layers))
        reports = [measure(layer, options, lambda: progress.advance(task)) for layer in layers]
    console = Console()
    for one in reports:
        console.print(*tables(one), *advise(one), sep="\n")
    if html is not None:
        from slra.cli.report.page import page

        _write(html, page(reports, ", ".join(map(str, files))))
    if json is not None:
        _write(json, to_json(reports, files, options))


def _check_target(option: str, path: Path, files: list[Path]) -> None:
    """Find out before the work whether a file can be written, and that it is none that is read."""
    if path.is_dir() or path.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"{option} must be a file other than those that are read, got {path}")
    require_writable(path.parent, f"the folder of {option}")


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"cannot write {path}: {error.strerror}")
    typer.echo(f"Written: {path}")


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
