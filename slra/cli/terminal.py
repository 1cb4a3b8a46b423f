"""What all commands share of the terminal: the bar, errors, interrupts, files written."""

from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from slra.cli.files import replacing

__all__ = ["Commands", "fail", "progress", "write"]


class Commands(TyperGroup):
    """Commands that Ctrl-C ends with a word instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run one; 130 is what a shell says of a program that SIGINT ended."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from None


def fail(message: str) -> NoReturn:
    """End with one line on stderr."""
    typer.echo(message, err=True)
    raise typer.Exit(1)


def progress(*, transient: bool = False) -> Progress:
    """Return a bar on stderr. A transient one is wiped off at the end, and shows on terminals only."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        transient=transient,
        disable=transient and not console.is_terminal,
    )


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, and say so."""
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    typer.echo(f"Written: {path}")
