"""Draw the pictures of the concepts for the documentation, and keep the numbers that they show.

    python -m benchmarks.figures     about twenty seconds on one core

Writes docs/_static/figures/*.png and results/figures.json. Nothing is timed.
"""

from benchmarks.common import save
from docs.figures import FIGURES, FOLDER, draw


def main() -> None:
    numbers = {}
    for name in FIGURES:
        numbers[name] = draw(name, FOLDER)
        print(FOLDER / f"{name}.png", (FOLDER / f"{name}.png").stat().st_size, "bytes")
    save("figures", {"figures": {name: one for name, one in numbers.items() if one}})


if __name__ == "__main__":
    main()
