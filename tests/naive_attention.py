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
    if is_causal:
        n_q, n_k = scores.shape[-2:]
        offset = {"bottom_right": n_k - n_q, "top_left": 0}.get(causal_align, causal_align)
        scores = np.where(np.tri(n_q, n_k, offset, dtype=bool), scores, -np.inf)
    peak = np.max(scores, axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(scores - peak)
    total = np.sum(weights, axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    return weights / np.where(total == 0, 1, total) @ v, lse


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
