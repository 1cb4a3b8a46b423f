"""What all benchmarks share: interleaved timing, the machine they ran on, and where results go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slra._files import write_file
from slra.cli.timing import REST, machine, rounds

__all__ = ["RESULTS", "interleaved", "machine", "save"]

RESULTS = Path(__file__).parent / "results"


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, list[float]]:
    """Time functions in turn, ``repeats`` times each after one call to warm up; seconds."""
    for function in functions.values():
        function()
    return dict(zip(functions, rounds(list(functions.values()), repeats, rest=REST), strict=True))


def save(topic: str, result: dict[str, Any]) -> Path:
    """Write results, with the machine, to ``benchmarks/results/<topic>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{topic}.json"
    write_file(path, (json.dumps({"machine": machine(), **result}, indent=1) + "\n").encode())
    return path
