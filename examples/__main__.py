"""Run the examples and keep what they print, draw and return, for the pages that show them.

python -m examples [NAME ...]
"""

import argparse
import contextlib
import io
import json
from importlib import import_module

from benchmarks.common import RESULTS, save
from docs.figures.style import shrink
from examples import EXAMPLES, OUTPUT, PAGES, PICTURES


def run(name: str) -> dict:
    """Write docs/_static/examples/NAME.png and the output into docs/examples/NAME.md; return the numbers."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    picture = PICTURES / f"{name}.png"
    module, printed = import_module(f"examples.{name}"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        numbers = module.main(picture)
    shrink(picture)
    page = PAGES / f"{name}.md"
    page.write_text(
        OUTPUT.sub(lambda _: f"```text\n{printed.getvalue()}```\n", page.read_text(), count=1)
    )
    print(f"== {name}\n{printed.getvalue()}", end="")
    return numbers._asdict()


def main() -> None:
    """Run the named examples, or all; write benchmarks/results/examples.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *EXAMPLES], metavar="NAME")
    names = parser.parse_args().names or EXAMPLES
    path = RESULTS / "examples.json"
    known = json.loads(path.read_text())["examples"] if path.exists() else {}
    known |= {name: run(name) for name in names}
    save("examples", {"examples": {name: known[name] for name in EXAMPLES if name in known}})


if __name__ == "__main__":
    main()
