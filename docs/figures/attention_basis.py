"""The one idea, with the matrices of a real head: a thin map on the feature axis, tokens untouched."""

import slra
from docs.figures.style import figure
from slra.data import load_sample

HEAD, RANK, SHOWN_TOKENS = 2, 8, 96
# Inches: features and coordinates are equally wide wherever they stand.
FEATURE, TOKEN, MARGIN, GAP = 0.062, 0.021, 0.6, 0.5


def draw():
    """Draw k - c times W_k, and the same for the values, in true proportions."""
    sample = load_sample()
    q, k, v = (x[HEAD : HEAD + 1].astype(float) for x in sample[:3])
    basis = slra.fit_attention(q, k, v, RANK)
    _, low_k, low_v = basis.project(q, k, v)
    result = figure(5.8)
    result.set_layout_engine("none")
    rows = (
        (3.3, ("k − c", "W$_k$", "k′"), (k - basis.c, basis.wk, low_k)),
        (0.5, ("v − μ", "W$_v$", "v′"), (v - basis.mu, basis.wv, low_v)),
    )
    for bottom, names, matrices in rows:
        _product(result, bottom, names, [x[0] for x in matrices])
    return result, {}


def _product(result, bottom, names, matrices):
    """Three matrices side by side, with the signs between them."""
    width, height = result.get_size_inches()
    x, map_, low = matrices
    top = bottom + SHOWN_TOKENS * TOKEN
    panels = (
        (x[:SHOWN_TOKENS], f"{len(x)} tokens ({SHOWN_TOKENS} shown)", TOKEN, "×"),
        (map_, f"{len(map_)} features", FEATURE, "="),
        (low[:SHOWN_TOKENS], f"{len(x)} tokens", TOKEN, ""),
    )
    left = MARGIN
    for name, (matrix, rows, unit, sign) in zip(names, panels, strict=True):
        wide, tall = matrix.shape[1] * FEATURE, len(matrix) * unit
        axis = result.add_axes((left / width, (top - tall) / height, wide / width, tall / height))
        peak = abs(matrix).max()
        axis.imshow(matrix, cmap="PuOr", vmin=-peak, vmax=peak, aspect="auto")
        axis.grid(visible=False)
        axis.set(xlabel=f"{matrix.shape[1]} wide", ylabel=rows, xticks=(), yticks=())
        axis.set_title(name, loc="center", fontsize=13)
        result.text(
            (left + wide + 0.2) / width,
            (top - 1) / height,
            sign,
            fontsize=22,
            ha="center",
            va="center",
        )
        left += wide + GAP + (0.12 if sign else 0)
