"""The pictures of the documentation, one file each: ``python -m benchmarks.figures`` draws them all."""

from importlib import import_module
from pathlib import Path

from docs.figures.style import styled, write

__all__ = ["FIGURES", "FOLDER", "draw"]

FOLDER = Path(__file__).parents[1] / "_static" / "figures"
FIGURES = (
    "architecture",
    "svd",
    "prox",
    "fista",
    "decompose",
    "attention_basis",
    "attention_error",
    "adaptive_rank",
    "online_softmax",
    "cache",
)


def draw(name: str, folder: Path) -> dict:
    """Write ``folder/name.png``, and return the numbers it shows that a page may quote."""
    module = import_module(f"docs.figures.{name}")
    folder.mkdir(parents=True, exist_ok=True)
    with styled():
        drawn, numbers = module.draw()
        write(drawn, folder / f"{name}.png")
    return numbers
