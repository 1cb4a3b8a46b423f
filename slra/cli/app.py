"""The commands; what they compute and print is in the modules beside this one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from slra.cli.backends import BackendUnavailableError, open_backend
from slra.cli.bench.command import bench
from slra.cli.demo import compare, count_calls
from slra.cli.demo_output import table, verdict
from slra.cli.files import check_target, require_writable
from slra.cli.report.advice import advise
from slra.cli.report.measure import count_steps, measure_all
from slra.cli.report.output import overview, tables, to_json
from slra.cli.report.source import MAX_TOKENS, read_source
from slra.cli.terminal import Commands, fail, progress, write
from slra.data import load_sample

__all__ = ["app"]

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
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
    output: Annotated[Path, typer.Option(help="Directory for the picture and the page.")] = Path(
        "slra-demo"
    ),
) -> None:
    """Compress the attention of a real encoder and show what it costs and saves."""
    from slra.cli.demo_page import page
    from slra.cli.plots import draw, save

    try:
        opened = open_backend(backend.value)
        require_writable(output, "--output")
    except (OSError, BackendUnavailableError) as error:
        fail(str(error))

    sample = load_sample()
    with progress() as bar:
        task = bar.add_task("Attention, exact and low rank", total=count_calls())
        comparison = compare(opened, sample, lambda: bar.advance(task))
    Console().print(table(comparison), verdict(comparison), sep="\n")

    picture = output / "demo.png"
    try:
        save(draw(sample, comparison), picture)
    except OSError as error:
        fail(f"cannot write {picture}: {error.strerror}")
    typer.echo(f"Picture: {picture}")
    write(output / "demo.html", page(sample, comparison))


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...|MODEL",
            help="Q, K and V: one .npz or .safetensors file with arrays q, k, v (or layer0/q and so on), "
            "one .npy file of shape (3, ..., H, N, D), or three .npy files. Or the directory of a Hugging Face "
            "model on this machine, with --text.",
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
        bool, typer.Option("--causal", help="Attend to no later token; a model knows by itself.")
    ] = False,
    scale: Annotated[
        float | None, typer.Option(help="Of the scores; 1/sqrt(D) if not given.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Say how far the attention of your own arrays or model can be compressed, head by head."""
    if html is not None:  # here, so that a missing matplotlib is noticed before the work
        from slra.cli.report.page import page

    try:
        for option, path in (("--html", html), ("--json", json)):
            if path is not None:
                check_target(option, path, [*paths, *([] if text is None else [text])])
        with progress(transient=True) as bar:
            what = "Reading" if text is None else "Running the model"
            reading = bar.add_task(what, total=None)
            source = read_source(
                paths,
                text=text,
                max_tokens=max_tokens,
                causal=causal,
                scale=scale,
                advance=lambda total: bar.update(reading, total=total, advance=1),
            )
    except (OSError, ValueError) as error:
        fail(str(error))

    try:
        with progress() as bar:
            task = bar.add_task("Attention, exact and low rank", total=count_steps(source.layers))
            reports = measure_all(source.layers, lambda: bar.advance(task))
    except ValueError as error:
        fail(str(error))
    console = Console()
    console.print(source.title, markup=False, highlight=False, soft_wrap=True)
    for one in reports:
        console.print(*tables(one), *advise(one), sep="\n")
    if len(reports) > 1:
        console.print(overview(reports))
    if html is not None:
        write(html, page(reports, source.title))
    if json is not None:
        write(json, to_json(reports, source.parts))
