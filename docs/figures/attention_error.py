"""One head of a real encoder: what each way to fit a basis makes of its attention."""

import numpy as np

import slra
from docs.figures.style import BLUE, GREEN, ORANGE, figure, relative_error
from slra.data import load_sample

HEAD, SHOWN_RANK, SHOWN_TOKENS = 2, 8, 40
RANKS = (2, 4, 8, 12, 16, 20, 24, 28, 32)
METHODS = {"svd": (ORANGE, "o"), "scores": (GREEN, "^"), "output": (BLUE, "s")}


def weights(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """softmax(scale q k^T): attention with the unit matrix for values."""
    return slra.attention(
        q, k, np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2])), scale=scale
    )


def draw():
    """Draw error against rank, and the attention map exact and at a quarter of the rank."""
    sample = load_sample()
    q, k, v = (x[HEAD : HEAD + 1].astype(float) for x in sample[:3])
    exact, scale = slra.attention(q, k, v), q.shape[-1] ** -0.5
    result = figure(6)
    grid = result.add_gridspec(2, 3, height_ratios=(3, 2))
    axis = result.add_subplot(grid[0, :])
    maps, numbers = [("exact", weights(q, k, scale))], {}
    for name, (color, marker) in METHODS.items():
        errors = []
        for rank in RANKS:
            basis = slra.fit_attention(q, k, v, rank, method=name)
            errors.append(float(relative_error(basis.attend(q, k, v), exact)))
            if rank == SHOWN_RANK and name != "scores":
                # The map goes with ranks of queries and keys; the shift of the keys changes no weight.
                low_q, low_k, _ = basis.project(q, k, v)
                maps.append((f"{name}, rank {rank}", weights(low_q, low_k, scale)))
        axis.plot(RANKS, errors, marker + "-", color=color, label=f'method="{name}"')
        numbers[name] = dict(zip(RANKS, errors, strict=True))
    axis.set(
        title=f"Layer {sample.layer[HEAD]}, head {sample.head[HEAD]} of MiniLM-L6: error of the output",
        xlabel=f"rank r (of {q.shape[-1]})",
        ylabel="relative error",
        xticks=RANKS,
        ylim=(0, None),
    )
    axis.legend()
    axes = [result.add_subplot(grid[1, column]) for column in range(3)]
    for panel, (title, matrix) in zip(axes, maps, strict=True):
        corner = matrix[0, :SHOWN_TOKENS, :SHOWN_TOKENS]
        image = panel.imshow(corner, cmap="magma", norm="log", vmin=1e-3, vmax=0.5)
        panel.set(title=title, xlabel="key token", xticks=(0, 20, 39), yticks=())
        panel.grid(visible=False)
    axes[0].set(ylabel="query token", yticks=(0, 20, 39))
    bar = result.colorbar(image, ax=axes, location="bottom", aspect=40)
    bar.set_label("attention weight")
    return result, numbers
