"""The command ``python -m slra bench``."""

import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from slra.cli.bench import comparisons
from slra.cli.bench.output import record, show
from slra.cli.files import check_targets
from slra.cli.terminal import fail, progress, write
from slra.cli.timing import machine

__all__ = ["bench", "run"]


def bench(
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Time the main functions on this machine, beside what else is installed, in about a minute."""
    try:
        if json is not None:
            check_targets({"--json": json}, [])
    except (OSError, ValueError) as error:
        fail(str(error))
    with progress("Comparisons", count_rounds()) as advance:
        found = run(advance)
    show(Console(), found)
    if json is not None:
        write(json, json_format.dumps(found, indent=1) + "\n")


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
