"""Which benchmarks there are, found by reading the files: nothing is imported, so nothing need be installed."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import RESULTS

__all__ = ["Topic", "find"]

FOLDER = Path(__file__).parent
# "about three minutes on two cores; writes ..."
TAKES = re.compile(r"\babout\s+((?:[\w-]+\s){1,2}(?:second|minute|hour)s?)\b")


class Topic(NamedTuple):
    """One benchmark: a module with a ``main``, or a package whose ``__main__`` has one."""

    name: str
    summary: str  # first line of its docstring
    takes: str | None  # as its docstring says
    writes: bool  # results, with `benchmarks.common.save`; the others make data for these
    date: str | None  # of the results that are kept

    @property
    def module(self) -> str:
        """What ``python -m`` runs."""
        return f"benchmarks.{self.name}"


def find() -> dict[str, Topic]:
    """All topics by name, in alphabetical order."""
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("*/__main__.py")]
    topics = [_read(file) for file in files if file != FOLDER / "__main__.py"]
    return {topic.name: topic for topic in sorted(filter(None, topics))}


def _read(file: Path) -> Topic | None:
    tree = ast.parse(file.read_text())
    if not any(isinstance(one, ast.FunctionDef) and one.name == "main" for one in tree.body):
        return None
    name = file.parent.name if file.name == "__main__.py" else file.stem
    text = ast.get_docstring(tree) or ""
    found = TAKES.search(text)
    writes = any(
        isinstance(one, ast.ImportFrom)
        and one.module == "benchmarks.common"
        and "save" in (alias.name for alias in one.names)
        for one in tree.body
    )
    return Topic(name, text.partition("\n")[0], found and found[1], writes, _date(name))


def _date(name: str) -> str | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["machine"]["date"] if path.exists() else None
