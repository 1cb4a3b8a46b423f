"""All benchmarks under one roof.

python -m benchmarks                     what there is, when it last ran, and how long it takes
python -m benchmarks run NAME... | --all
python -m benchmarks tables [--check]    the tables of README.md and docs/, from benchmarks/results/*.json
"""

import subprocess
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import pages, topics

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def listing(context: typer.Context) -> None:
    """Say what there is, when it last ran, and how long it takes."""
    if context.invoked_subcommand is not None:
        return
    table = Table()
    for header in ("name", "what", "last result", "takes about"):
        table.add_column(header, no_wrap=header != "what")
    for topic in topics.find().values():
        date = topic.date or ("none yet" if topic.writes else "makes data")
        table.add_row(topic.name, topic.summary, date, topic.takes or "?")
    Console().print(table)


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that write results.")] = False,
) -> None:
    """Run benchmarks one after the other, each in a process of its own."""
    found = topics.find()
    if everything == bool(names):
        raise typer.BadParameter("give names, or --all")
    unknown = [name for name in names or [] if name not in found]
    if unknown:
        raise typer.BadParameter(f"no benchmark {', '.join(unknown)}; there are {', '.join(found)}")
    chosen = names or [name for name, topic in found.items() if topic.writes]
    summary, failed = Table("name", "result", "seconds"), False
    console = Console()
    for name in chosen:
        console.rule(name)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", found[name].module], cwd=pages.ROOT).returncode
        summary.add_row(
            name,
            "done" if code == 0 else f"exit status {code}",
            f"{time.perf_counter() - start:.0f}",
        )
        failed |= code != 0
    console.print(summary)
    if failed:
        raise typer.Exit(1)


@app.command()
def tables(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if one differs.")
    ] = False,
) -> None:
    """Write the tables of README.md and docs/ from the results that are kept; nothing runs again."""
    if not check:
        made = pages.all_tables(pages.results())
        for name, path in pages.pages().items():
            before = path.read_text()
            after = pages.fill(before, made)
            if after != before:
                path.write_text(after)
                typer.echo(f"written: {name}")
    wrong = pages.problems()
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
