"""How a call travels: the layers of the library, and what passes between them."""

from matplotlib.patches import FancyBboxPatch

from docs.figures.style import BLACK, BLUE, GREEN, ORANGE, SKY, figure

# Left edge, bottom, width and height in hundredths of the picture; colour; title; lines below it.
BOXES = (
    (3, 87, 94, 11, BLACK, "your call", ("arrays of any library, plain options",)),
    (
        (
            3,
            60,
            45,
            20,
            BLUE,
            "attention: make_problem",
            ("attn/problem.py", "checks; heads by key head:", "(..., Hkv, G, N, D)"),
        ),
        (
            52,
            60,
            45,
            20,
            BLUE,
            "all else: resolve, promote",
            ("_validate.py", "one library, one device,", "one dtype"),
        ),
    ),
    (
        (
            3,
            29,
            45,
            24,
            GREEN,
            "AttentionProblem",
            (
                "attn/exact.py, fit.py, low_rank.py",
                "_estimators.py  _ranks.py",
                "_maps.py  _exact_keys.py",
                "cache/  baselines/",
            ),
        ),
        (
            52,
            29,
            45,
            24,
            GREEN,
            "backend and arrays",
            (
                "svd/  prox/  solvers/",
                "decompose/  objective.py",
                "written once,",
                "against the array API",
            ),
        ),
    ),
    (
        3,
        3,
        94,
        19,
        ORANGE,
        "Backend: the primitives",
        (
            "_backends/standard/: the reference, by theme",
            "numpy  torch  jax  cupy  dask:",
            "only what a library does better",
        ),
    ),
)
DOWN, UP = ((25, 87, 80), (74, 87, 80), (25, 60, 53), (74, 60, 53), (25, 29, 22), (74, 29, 22)), 50


def draw():
    """Draw layers from the call down to the library, and the way back."""
    result = figure(5.6)
    result.set_layout_engine("none")
    axis = result.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(0, 100))
    axis.axis("off")
    for layer in BOXES:
        for box in (layer,) if isinstance(layer[0], int) else layer:
            _box(axis, *box)
    for x, start, end in DOWN:
        _arrow(axis, (x, start), (x, end), BLACK)
    _arrow(axis, (UP, 22), (UP, 87), SKY)
    axis.text(
        UP,
        56.5,
        "back in the caller's\nlayout and dtype",
        fontsize=8.5,
        ha="center",
        va="center",
        color=BLUE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    return result, {}


def _box(axis, left, bottom, width, height, colour, title, lines):
    style = "round,pad=0,rounding_size=1.5"
    axis.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle=style,
            fill=False,
            edgecolor=colour,
            linewidth=1.8,
        )
    )
    axis.text(
        left + width / 2,
        bottom + height - 3.2,
        title,
        fontsize=11,
        ha="center",
        va="center",
        color=colour,
        weight="bold",
    )
    for i, line in enumerate(lines):
        axis.text(
            left + width / 2,
            bottom + height - 7.5 - 4.4 * i,
            line,
            fontsize=9,
            ha="center",
            va="center",
            color=BLACK,
        )


def _arrow(axis, start, end, colour):
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6}
    )
