"""How all pictures look: 5 inches wide, so that 10 points can still be read on a phone."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from slra.cli.plots import STYLE

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "SKY",
    "YELLOW",
    "figure",
    "relative_error",
    "shrink",
    "styled",
    "write",
]

# Okabe and Ito: told apart with any colour vision. Lines also differ in marker or dash.
BLACK, ORANGE, SKY, GREEN = "#222222", "#D55E00", "#56B4E9", "#009E73"
YELLOW, BLUE = "#E69F00", "#0072B2"

_STYLE = STYLE | {
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def styled():
    """Context in which figures are made and filled."""
    return mpl.rc_context(_STYLE)


def figure(height: float) -> Figure:
    """Return an empty figure, 5 inches wide."""
    return Figure(figsize=(5, height), layout="constrained")


def write(drawn: Figure, path: Path) -> None:
    """Save a PNG of 800 pixels across."""
    drawn.savefig(path, format="png", dpi=160)
    shrink(path)


def shrink(path: Path) -> None:
    """Leave a PNG 256 colours, and a third of its bytes."""
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(path, format="PNG", optimize=True)


def relative_error(x: np.ndarray, exact: np.ndarray, axis: tuple[int, ...] | None = None):
    """Frobenius norm of the difference over that of ``exact``."""
    return np.linalg.norm(x - exact, axis=axis) / np.linalg.norm(exact, axis=axis)
