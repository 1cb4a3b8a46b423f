"""The command ``python -m slra bench``."""

import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from slra.cli.bench import comparisons
from slra.cli.bench.output import record, show
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
            found = run(lambda: progress.advance(task))
        show(Console(), found)
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


def run(advance: Callable[[], object]) -> dict[str, Any]:
    """Make every comparison, one after the other; the numbers are kept, the arrays are not."""
    found = []
    for make in comparisons.COMPARISONS:
        comparison = make()
        found.append(record(comparison, comparisons.measure(comparison, advance)))
    # The machine last: by now every library that takes part has loaded its BLAS.
    return {"comparisons": found, "machine": machine()}


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"--json must be a file, got the directory {path}")
    require_writable(path.parent, "the folder of --json")
