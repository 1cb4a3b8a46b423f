"""The commands; what they compute and print is in the modules beside this one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import slra
from slra.cli import demo_pays
from slra.cli.backends import BackendUnavailableError, open_backend
from slra.cli.bench.command import bench
from slra.cli.demo import compare, count_calls
from slra.cli.demo_output import table, verdict
from slra.cli.files import check_targets, require_writable
from slra.cli.report.arrays import notes
from slra.cli.report.measure import N_LAYERS, LayerReport, count_steps, measure_all, sample_of
from slra.cli.report.output import show, to_json
from slra.cli.report.source import MAX_TOKENS, read_source
from slra.cli.terminal import Commands, fail, progress, write
from slra.data import load_sample

__all__ = ["app"]

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command()(bench)

BackendName = StrEnum("BackendName", ["numpy", "torch", "jax", "cupy"])


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slra {slra.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, metavar="", help="Say which it is."
        ),
    ] = False,
) -> None:
    """Sparse and low-rank approximation, and attention on it."""


@app.command()
def demo(
    backend: Annotated[
        BackendName, typer.Option(help="The array library that computes.")
    ] = BackendName.numpy,
    output: Annotated[Path, typer.Option(help="Directory for the picture and the page.")] = Path(
        "slra-demo"
    ),
) -> None:
    """Compress the attention of a real encoder, show what it costs and saves, and where it pays."""
    from slra.cli.demo_page import page
    from slra.cli.plots import draw, save

    try:
        opened = open_backend(backend.value)
        require_writable(output, "--output")
    except (OSError, BackendUnavailableError) as error:
        fail(str(error))

    sample = load_sample()
    steps = count_calls() + demo_pays.count_calls()
    with progress("Attention, exact and low rank", steps) as advance:
        comparison = compare(opened, sample, advance)
        paid = demo_pays.measure(opened, advance)
    Console().print(table(comparison), verdict(comparison), demo_pays.table(paid), sep="\n")

    picture = output / "demo.png"
    try:
        save(draw(sample, comparison), picture)
    except OSError as error:
        fail(f"cannot write {picture}: {error.strerror}")
    typer.echo(f"Picture: {picture}")
    write(output / "demo.html", page(sample, comparison, paid))


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...|MODEL",
            help="Q, K and V: one .npz or .safetensors file with arrays q, k, v (or layer0/q and so on), "
            "one .npy file of shape (3, ..., H, N, D), or three .npy files. Or the directory of a Hugging Face "
            "model on this machine, or a .gguf file of one, with --text.",
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="What the model reads: a file in UTF-8, - for standard input."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Of the text, as many as the model takes at most; {MAX_TOKENS} if not given.",
        ),
    ] = None,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal", metavar="", help="Attend to no later token; a model knows by itself."
        ),
    ] = False,
    scale: Annotated[
        float | None, typer.Option(help="Of the scores; 1/sqrt(D) if not given.")
    ] = None,
    all_layers: Annotated[
        bool,
        typer.Option(
            "--all-layers", metavar="", help=f"Every layer, not {N_LAYERS} of them evenly spaced."
        ),
    ] = False,
    details: Annotated[
        bool, typer.Option("--details", metavar="", help="Print every method, rank and head.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Say how far the attention of your own arrays or model can be compressed, head by head."""
    if html is not None:  # here, so that a missing matplotlib is noticed before the work
        from slra.cli.report.page import page

    try:
        check_targets({"--html": html, "--json": json}, [*paths, *([] if text is None else [text])])
        with progress("Reading" if text is None else "Running the model") as advance:
            source = read_source(
                paths,
                text=text,
                max_tokens=max_tokens,
                causal=causal,
                scale=scale,
                advance=advance,
            )
    except (OSError, ValueError) as error:
        fail(str(error))
    for note in notes(source.layers):
        typer.echo(note, err=True)

    layers = source.layers if all_layers else sample_of(source.layers)
    reports: list[LayerReport] = []
    try:
        with progress("Attention, exact and low rank", count_steps(layers)) as advance:
            for measured in measure_all(layers, advance):
                reports += [measured]  # one by one: Ctrl-C keeps those that are done
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        if not reports:
            raise
    which = "" if len(reports) == len(source.layers) else f", {len(reports)} of its layers"
    title = f"{source.title}{which}"
    show(Console(), title, reports, details=details)
    if html is not None:
        write(html, page(reports, title))
    if json is not None:
        write(json, to_json(reports, source.parts))
    if len(reports) < len(layers):
        typer.echo(f"Interrupted: {len(reports)} of {len(layers)} layers were measured.", err=True)
        raise typer.Exit(130)
    if len(layers) < len(source.layers):
        typer.echo(
            f"{len(layers)} of {len(source.layers)} layers; --all-layers takes all.", err=True
        )
