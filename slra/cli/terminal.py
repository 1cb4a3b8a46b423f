"""What all commands share of the terminal: progress, errors, interrupts, files written."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

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

from slra._files import write_file

__all__ = ["Advance", "Commands", "fail", "progress", "write"]

# Seconds between two lines of progress where stderr is a file or a pipe.
LINE_EVERY = 5.0


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


class Advance(Protocol):
    """Say that a step is done, and of how many once that is known."""

    def __call__(self, total: int | None = None) -> None:
        """Advance by one step."""


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Advance]:
    """Show on stderr how far something is: a bar on a terminal, elsewhere a line every few seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(what, total=total)

        def advance(total: int | None = None) -> None:
            bar.update(task, advance=1, total=total)  # a total of None leaves it as it is

        yield advance


class _Lines:
    """Progress as lines of text."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.shown = time.monotonic()

    def __call__(self, total: int | None = None) -> None:
        self.done += 1
        self.total = self.total if total is None else total
        now = time.monotonic()
        if now - self.shown < LINE_EVERY:
            return
        self.shown = now
        of = "" if self.total is None else f" of {self.total}"
        typer.echo(f"{self.what}: {self.done}{of}, {now - self.start:.0f} s", err=True)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, and say so."""
    try:
        write_file(path, text.encode())
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    typer.echo(f"Written: {path}")
