"""Graphs of proximal operators of one variable."""

import numpy as np

from docs.figures.style import BLUE, figure
from slra import prox

# tau = 1 throughout.
OPERATORS = (
    ("l1: shrink; small become 0", lambda x: prox.prox_l1(x, 1)),
    ("l0: keep; small become 0", lambda x: prox.prox_l0(x, 1)),
    ("elastic net: also scale", lambda x: prox.prox_elastic_net(x, 1, l2=0.5)),
    ("Huber: scale small ones", lambda x: prox.prox_huber(x, 1, delta=0.5)),
    ("nonnegative l1", lambda x: prox.prox_nonneg_l1(x, 1)),
    ("box from −1 to 2", lambda x: prox.project_box(x, -1, 2)),
)


def draw():
    """Draw each operator over the dashed line of doing nothing."""
    result = figure(6.6)
    x = np.linspace(-3, 3, 1201)
    axes = result.subplots(3, 2, sharex=True, sharey=True)
    for axis, (title, operator) in zip(axes.flat, OPERATORS, strict=True):
        y = operator(x)
        jumps = np.abs(np.diff(y)) > 0.1
        y[:-1][jumps] = np.nan
        axis.axhline(0, color="#999999", lw=0.8)
        axis.axvline(0, color="#999999", lw=0.8)
        axis.plot(x, x, "--", color="#777777", lw=1.1)
        axis.plot(x, y, color=BLUE, lw=2.4)
        axis.set(title=title, xticks=range(-3, 4), yticks=range(-3, 4), aspect="equal")
    result.supxlabel("x", fontsize=10)
    result.supylabel("prox(x)   (dashed: x unchanged)", fontsize=10)
    return result, {}
