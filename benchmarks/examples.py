"""Run the examples, and keep what they print, draw and return for the pages that show them.

    python -m benchmarks.examples     about a minute on one core

Writes docs/_static/examples/*.png, the output in docs/examples/*.md and results/examples.json. Nothing is timed.
"""

import contextlib
import io
from importlib import import_module
from typing import Any

from benchmarks.common import save
from docs.figures.style import shrink
from examples import EXAMPLES, OUTPUT, PAGES, PICTURES


def run(name: str) -> dict[str, Any]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    picture, page = PICTURES / f"{name}.png", PAGES / f"{name}.md"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        numbers = import_module(f"examples.{name}").main(picture)
    shrink(picture)
    block = f"```text\n{printed.getvalue()}```\n"
    page.write_text(OUTPUT.sub(lambda _: block, page.read_text(), count=1))
    print(f"== {name}\n{printed.getvalue()}", end="")
    return named(numbers)


def named(x: Any) -> Any:
    """Dictionaries in the place of named tuples, at any depth: JSON would drop the names."""
    if hasattr(x, "_asdict"):
        x = x._asdict()
    if isinstance(x, dict):
        return {name: named(value) for name, value in x.items()}
    return [named(value) for value in x] if isinstance(x, list) else x


def main() -> None:
    numbers = {name: run(name) for name in EXAMPLES}
    save("examples", numbers, keep={"examples": numbers})


if __name__ == "__main__":
    main()
