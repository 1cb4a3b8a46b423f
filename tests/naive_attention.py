"""Attention as the formula has it, and queries, keys and values to try it on."""

import numpy as np


def naive_attention(
    q,
    k,
    v,
    *,
    mask=None,
    is_causal=False,
    causal_align="bottom_right",
    window=None,
    lengths_q=None,
    lengths_k=None,
    sinks=None,
    alibi=None,
    scale=None,
    enable_gqa=False,
    softcap=None,
):
    """Return softmax(scale * q k^T + mask) v and the log-sum-exp, term by term as written."""
    q, k, v = (x.astype("float64") for x in (q, k, v))
    if enable_gqa:
        k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    seen, distance = places(
        scores.shape, is_causal, causal_align or "top_left", window, lengths_q, lengths_k
    )
    if alibi is not None:
        scores = scores - np.asarray(alibi, dtype="float64")[..., None, None] * distance
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        sinks = np.asarray(sinks, dtype="float64")[..., None, None]
        scores = np.concatenate([scores, np.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
        v = np.concatenate([v, np.zeros_like(v[..., :1, :])], axis=-2)
    peak = np.max(scores, axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(scores - peak)
    total = np.sum(weights, axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    return weights / np.where(total == 0, 1, total) @ v, lse


def places(shape, is_causal, causal_align, window, lengths_q, lengths_k):
    """Which query sees which key, and how far from it it stands, row by row as the documentation has it."""
    *batch, n_q, n_k = shape
    batch = tuple(batch[:-1])
    rows = []
    for lengths, n in ((lengths_q, n_q), (lengths_k, n_k)):
        table = np.full((*batch, 1), n) if lengths is None else np.asarray(lengths)
        if table.ndim == len(batch) and (batch == table.shape or table.shape == ()):
            table = table[..., None]
        rows.append(np.broadcast_to(table, (*batch, table.shape[-1])).reshape(-1, table.shape[-1]))
    seen, distance = np.zeros((2, len(rows[0]), n_q, n_k))
    left, right = (None if x in (None, -1) else x for x in window or (None, None))
    right = 0 if is_causal else right
    for one_seen, one_distance, row_q, row_k in zip(seen, distance, *rows, strict=True):
        top = start = 0
        for m, n in zip(row_q, row_k, strict=True):
            offset = {"bottom_right": n - m, "top_left": 0}.get(causal_align, causal_align)
            ahead = np.arange(n) - (np.arange(m) + offset)[:, None]
            here = slice(top, top + m), slice(start, start + n)
            is_seen = np.ones((m, n), dtype=bool) if left is None else ahead >= -left
            one_seen[here] = is_seen if right is None else is_seen & (ahead <= right)
            one_distance[here] = np.abs(ahead)
            top, start = top + m, start + n
    seen, distance = (x.reshape(*batch, 1, n_q, n_k) for x in (seen == 1, distance))
    return (seen, distance) if len(shape) > 2 else (seen[0], distance[0])


def qkv(shape_q, shape_k, d_v=None, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    shape_v = (*shape_k[:-1], d_v or shape_k[-1])
    return [rng.standard_normal(shape).astype(dtype) for shape in (shape_q, shape_k, shape_v)]


TOL = {"float64": 1e-12, "float32": 4e-6}


def decaying(seed=0, heads=2, heads_k=2, n_q=40, n_k=50, d=8, d_v=6, batch=(), dtype="float64"):
    """Q, K, V with decaying spectra, a common offset of the keys and of the values, and peaked attention."""
    rng = np.random.default_rng(seed)

    def draw(n_heads, n, width):
        x = rng.standard_normal((*batch, n_heads, n, width)) * 0.75 ** np.arange(width)
        return x @ np.linalg.qr(rng.standard_normal((n_heads, width, width)))[0]

    q, k, v = 2 * draw(heads, n_q, d), 2 * draw(heads_k, n_k, d), draw(heads_k, n_k, d_v)
    k, v = k + rng.standard_normal(d), v + rng.standard_normal(d_v)
    return [x.astype(dtype) for x in (q, k, v)]


def frobenius(x):
    return np.linalg.norm(x, axis=(-2, -1))


def softmax_attention(scores, v, causal):
    if causal:
        scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


# Windows, sequences in rows, sinks and slopes: of two sequences, with four query heads, and five keys or seven.
SLOPES, SINKS = np.asarray([0.5, 0.25, 0.1, 1.0]), np.asarray([0.3, -1.0, 2.0, 0.1])
STRUCTURES = {
    "window": {"window": (2, 1)},
    "window-left": {"window": (2, None), "softcap": 2.0},
    "window-right": {"window": (-1, 1)},
    "window-of-one": {"window": (0, 0)},
    "window-causal": {"window": (2, 3), "is_causal": True},
    "padded": {"lengths_k": [3, 5]},
    "padded-both": {"lengths_q": [2, 5], "lengths_k": [0, 4]},
    "padded-causal": {"lengths_k": [3, 5], "is_causal": True, "causal_align": "bottom_right"},
    "padded-window": {"lengths_k": [3, 5], "window": (1, 1), "causal_align": "top_left"},
    "packed": {"lengths_q": [[2, 5]], "lengths_k": [[3, 4]]},
    "packed-causal": {
        "lengths_q": [[2, 5, 0], [1, 2, 4]],
        "lengths_k": [[3, 4, 0], [5, 0, 2]],
        "is_causal": True,
        "causal_align": "bottom_right",
    },
    "sinks": {"sinks": SINKS},
    "alibi": {"alibi": SLOPES},
    "everything": {
        "window": (3, None),
        "lengths_q": [[2, 5], [4, 3]],
        "lengths_k": [[3, 4], [5, 2]],
        "sinks": SINKS,
        "alibi": SLOPES[None],
        "is_causal": True,
        "causal_align": "bottom_right",
        "softcap": 3.0,
        "scale": 0.4,
    },
}
