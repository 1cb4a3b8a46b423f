"""One row of attention, tile by tile: what the online softmax carries along, and that it ends at the answer."""

import numpy as np

import slra
from docs.figures.style import BLACK, BLUE, ORANGE, figure, relative_error
from slra.data import load_sample

HEAD, QUERY, TILE = 2, 100, 32


def draw():
    """Draw scores by tile with their running log-sum-exp, and the distance of the running output."""
    sample = load_sample()
    q, k, v = (x[HEAD : HEAD + 1].astype(float) for x in sample[:3])
    q = q[:, QUERY : QUERY + 1]
    scores = (q @ k.mT / np.sqrt(k.shape[-1]))[0, 0]
    exact = slra.attention(q, k, v)
    ends = np.arange(TILE, k.shape[-2] + 1, TILE)
    out, lse = slra.attention(q, k[:, :TILE], v[:, :TILE], return_lse=True)
    running, errors = [float(lse[0, 0])], [float(relative_error(out, exact))]
    for end in ends[1:]:
        part = slice(end - TILE, end)
        tile = slra.attention(q, k[:, part], v[:, part], return_lse=True)
        out, lse = slra.merge_attention((out, tile[0]), (lse, tile[1]))
        running.append(float(lse[0, 0]))
        errors.append(float(relative_error(out, exact)))

    result = figure(5.2)
    above, below = result.subplots(2, 1, sharex=True)
    above.plot(scores, ".", color="#888888", ms=3.5, label="scores s q·k")
    above.step([0, *ends], [running[0], *running], color=BLUE, label="running log-sum-exp ℓ")
    above.set(title=f"One query, keys in tiles of {TILE}", ylabel="score")
    above.set_ylim(None, max(running) + 4)
    above.legend(ncols=2)
    below.semilogy(ends, np.maximum(errors, 1e-16), "o-", color=ORANGE)
    below.set(
        xlabel="keys seen",
        ylabel="relative error\nof the running output",
        xticks=range(0, 513, 128),
    )
    below.axhline(2.2e-16, color=BLACK, lw=1, ls="--")
    below.text(0, 3e-16, "rounding", fontsize=9, va="bottom")
    return result, {"final_error": errors[-1]}
