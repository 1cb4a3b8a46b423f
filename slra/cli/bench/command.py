"""The command ``python -m slra bench``."""

import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from slra.cli.bench import comparisons
from slra.cli.bench.output import about_machine, record, table
from slra.cli.files import replacing, require_writable
from slra.cli.timing import machine

__all__ = ["bench", "run"]


def bench(
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Time the main functions on this machine, beside what else is installed, in about a minute."""
    try:
        if json is not None:
            _check_target(json)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("Compare", total=count_rounds())
            found = run(Console(), lambda: progress.advance(task))
        if json is not None:
            with replacing(json) as partial:
                partial.write_text(json_format.dumps(found, indent=1) + "\n", encoding="utf-8")
            typer.echo(f"Written: {json}")
    except OSError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def count_rounds() -> int:
    """How often `run` calls `advance`."""
    return len(comparisons.COMPARISONS) * (comparisons.N_ROUNDS + 1)


def run(console: Console, advance: Callable[[], object]) -> dict[str, Any]:
    """Make every comparison and print it as soon as it is there."""
    found = []
    for make in comparisons.COMPARISONS:
        comparison = make()
        rows = comparisons.measure(comparison, advance)
        console.print(table(comparison, rows), "")
        found.append(record(comparison, rows))
    # Last: by now every library that takes part has loaded its BLAS.
    about = machine()
    console.print(about_machine(about), highlight=False)
    return {"machine": about, "comparisons": found}


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"--json must be a file, got the directory {path}")
    require_writable(path.parent, "the folder of --json")
