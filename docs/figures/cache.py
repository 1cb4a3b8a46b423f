"""Where a cache keeps which token, and what that costs in numbers stored and in error."""

import numpy as np

import slra
from docs.figures.style import BLUE, GREEN, ORANGE, SKY, YELLOW, figure, relative_error
from slra.data import load_sample

N_PREFIX, N_SINK, WINDOWS = 384, 4, (0, 16, 32, 64, 128, 256)
RANKS = ((4, GREEN, "^"), (8, BLUE, "s"), (16, ORANGE, "o"))
SHOWN_RANK, SHOWN_WINDOW = 8, 64


def draw():
    """Draw what is left of each key in one cache, and error against size for a few ranks and windows."""
    sample = load_sample()
    q, k, v = (x.astype(float) for x in sample[:3])
    exact = slra.attention(q, k, v, is_causal=True)[:, N_PREFIX:]
    result = figure(6.2)
    above, below = result.subplots(2, 1, height_ratios=(1.7, 3))
    numbers = {}
    for rank, color, marker in RANKS:
        basis = slra.fit_attention(*(x[:, :N_PREFIX] for x in (q, k, v)), rank, is_causal=True)
        shares, errors = [], []
        for window in WINDOWS:
            cache, out = decode(basis, window, q, k, v)
            errors.append(float(np.median(relative_error(out, exact, axis=(-2, -1)))))
            shares.append(stored_share(window, rank, *k.shape[-2:]))
            if (rank, window) == (SHOWN_RANK, SHOWN_WINDOW):
                _keys(above, relative_error(cache.decode()[0], k, axis=(0, -1)))
        below.plot(shares, errors, marker + "-", color=color, label=f"rank {rank} of {k.shape[-1]}")
        numbers[f"rank {rank}"] = {
            f"window {window}": {"stored_share": share, "median_error": error}
            for window, share, error in zip(WINDOWS, shares, errors, strict=True)
        }
    below.set(
        title=f"Outputs of tokens {N_PREFIX} to 511",
        xlabel="numbers stored / those of exact keys and values",
        ylabel="relative error\n(median of six heads)",
        xlim=(0, 1),
        ylim=(0, None),
    )
    windows = ", ".join(map(str, WINDOWS))
    below.legend(title=f"down each curve: window of\n{windows}", title_fontsize=9)
    return result, numbers


def decode(basis, window, q, k, v):
    """Read the prefix at once and the rest token by token; return the cache, and the outputs of the latter."""
    cache = slra.KVCache(basis, window=window, n_sink=N_SINK)
    cache = cache.append(k[:, :N_PREFIX], v[:, :N_PREFIX])
    outs = []
    for t in range(N_PREFIX, k.shape[-2]):
        step = slice(t, t + 1)
        cache = cache.append(k[:, step], v[:, step])
        outs.append(cache.attend(q[:, step]))
    return cache, np.concatenate(outs, axis=1)


def stored_share(window, rank, n_tokens, width):
    """Numbers of one head's tokens, without the maps and the room left in buffers, over those of exact ones."""
    n_exact = window + N_SINK
    return (n_exact * width + (n_tokens - n_exact) * rank) / (n_tokens * width)


def _keys(axis, errors):
    """Error of each key as the cache gives it back: nothing is lost of sinks and window."""
    tokens = np.arange(len(errors))
    is_exact = errors < 1e-9
    for which, color, name in (
        (is_exact & (tokens < N_SINK), ORANGE, f"{N_SINK} sinks"),
        (~is_exact, SKY, f"rank {SHOWN_RANK}"),
        (is_exact & (tokens >= N_SINK), YELLOW, f"window of {SHOWN_WINDOW}"),
    ):
        axis.plot(tokens[which], errors[which], "o", ms=3, color=color, label=name)
    axis.set(
        title="Keys that a cache gives back, by token",
        ylabel="relative error",
        xlabel="token",
        ylim=(-0.05, 1.25),
        xticks=(0, 128, 256, 384, 512),
    )
    axis.legend(ncols=3, loc="upper right", markerscale=2, columnspacing=1, handletextpad=0.2)
