"""Draw the pictures of the documentation, all or those named, and keep the numbers that pages quote.

python -m docs.figures [NAME ...]
"""

import argparse
import json

from benchmarks.common import RESULTS, save
from docs.figures import FIGURES, FOLDER, draw


def main() -> None:
    """Write docs/_static/figures/*.png and benchmarks/results/figures.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], metavar="NAME")
    names = parser.parse_args().names or FIGURES
    path = RESULTS / "figures.json"
    known = json.loads(path.read_text())["figures"] if path.exists() else {}
    for name in names:
        known[name] = draw(name, FOLDER)
        print(FOLDER / f"{name}.png", (FOLDER / f"{name}.png").stat().st_size, "bytes")
    save("figures", {"figures": {name: known[name] for name in FIGURES if known.get(name)}})


if __name__ == "__main__":
    main()
