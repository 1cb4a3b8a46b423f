"""What all benchmarks share: interleaved timing, the machine they ran on, and where results go."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slra._files import write_file
from slra.cli.timing import REST, machine, rounds

__all__ = ["RESULTS", "earlier", "interleaved", "save", "table"]

RESULTS = Path(__file__).parent / "results"
# All that a run has measured, to go on from or look into; not kept in the repository.
RAW = Path(__file__).parent / "raw"
LOSSES = ["where slra is slower", "than", "times as long"]


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, list[float]]:
    """Time functions in turn, ``repeats`` times each after one call to warm up; seconds."""
    for function in functions.values():
        function()
    return dict(zip(functions, rounds(list(functions.values()), repeats, rest=REST), strict=True))


def table(head: list[str], rows: Iterable[Iterable[Any]], align: str = "") -> dict[str, Any]:
    """Return a table as results keep it; `align` has a letter for each column, "r" for numbers."""
    cells = [[str(cell) for cell in row] for row in rows]
    return {"head": head, "align": align.ljust(len(head), "l"), "rows": cells}


def earlier(topic: str) -> dict[str, Any]:
    """All that earlier runs on this machine have measured."""
    path = RAW / f"{topic}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(
    topic: str,
    measured: dict[str, Any],
    tables: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    *,
    losses: Callable[[dict[str, Any]], list[tuple[str, ...]]] | None = None,
    says: Callable[[dict[str, Any]], list[str]] | None = None,
    compared: tuple[str, ...] = ("numpy",),
    parts: Iterable[str] = (),
    keep: dict[str, Any] | None = None,
) -> Path:
    """Write what was measured to ``raw/``, and what pages show of it, with the machine, to ``results/``.

    ``tables`` makes them by name, as `table` does, ``losses`` the rows of one more that all topics have in common, and
    ``says`` phrases that must be on a page: once all ``parts`` have been measured. ``keep`` is for tests.
    """
    _write(RAW / f"{topic}.json", measured)
    if missing := set(parts) - set(measured):
        print(
            f"results/{topic}.json is left as it is: {', '.join(sorted(missing))} not measured yet"
        )
        return RAW / f"{topic}.json"
    where = machine()
    where["versions"] = {name: where["versions"][name] for name in compared}
    shown = {"machine": where, "tables": tables(measured) if tables else {}}
    if losses:
        shown["tables"]["losses"] = table(LOSSES, losses(measured), "llr")
    shown |= {"says": says(measured) if says else []} | (keep or {})
    return _write(RESULTS / f"{topic}.json", shown)


def _write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())
    return path
