"""Attention on NumPy where tiles do not pay: of few queries, and of all heads at once where there are few scores.

Few queries: reading keys and values is all the time there is. Matrix-vector products read each key and value once,
and there is no tile to rescale. Few scores: starting NumPy's functions is.
"""

from typing import Any

import numpy as np

from slra._backends.numpy_attention import (
    Arguments,
    Buffers,
    Power,
    at,
    cap,
    finite,
    head,
    hide,
    in_threads,
)
from slra._backends.standard.attention import ScoreOptions, Tile, TileBounds, scores_batch_shape
from slra._backends.standard.attention import hide as hide_scores
from slra._typing import Array

__all__ = ["FEW_QUERIES", "FEW_SCORES", "few_queries_attention", "few_scores_attention"]

# From about so many on, products of matrices are faster.
FEW_QUERIES = 8
# A chunk of keys, and a group of scores, stay in a second-level cache of 1 MB.
CHUNK_BYTES = 1 << 19
# So many scores of all heads take less time than a loop over four heads takes to start.
FEW_SCORES = 1 << 13


def few_queries_attention(
    q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
) -> tuple[Array, Array]:
    """Exact attention and its log-sum-exp, softmax over all keys at once, in memory linear in their number."""
    batch, n_queries, n_keys = scores_batch_shape(q, k, v, mask), q.shape[-2], k.shape[-2]
    arguments = Arguments(q, k, v, mask, options, batch)
    end, indices = options.last_key(n_queries, n_queries, n_keys), list(np.ndindex(*batch))
    out = np.zeros((len(indices), n_queries, v.shape[-1]), q.dtype)
    lse = np.full((len(indices), n_queries), -np.inf, q.dtype)
    # Several heads go together, as many as their scores stay in the second-level cache.
    size = max(1, CHUNK_BYTES // (n_queries * max(1, end) * q.itemsize))
    groups = [slice(i, min(i + size, len(indices))) for i in range(0, len(indices), size)]

    def run(group: Any, buffers: Buffers) -> None:
        scores = buffers.get("scores", group.stop - group.start, n_queries, end)
        for index, one in zip(indices[group], scores, strict=True):
            _few_scores(arguments, index, one)
        lse[group], total = _weigh(scores, arguments.power())
        for index, weights, target in zip(indices[group], scores, out[group], strict=True):
            np.matmul(weights, at(v, index)[:end], out=target)
        out[group] /= total[..., None]

    if end:
        n_products = arguments.n_scores() * (q.shape[-1] + v.shape[-1])
        in_threads(groups, run, q.dtype, n_products)
    return out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, n_queries)


def _few_scores(arguments: Arguments, index: tuple[int, ...], scores: Array) -> None:
    """Scores of one head, (queries, keys): a chunk of keys stays in the second-level cache for all queries."""
    q, k, options = at(arguments.q, index), at(arguments.k, index), arguments.options
    per_nat = arguments.power().per_nat
    factor = options.scale * (per_nat if options.softcap is None else 1 / options.softcap)
    q, end = q * q.dtype.type(factor), scores.shape[1]
    step = max(1, CHUNK_BYTES // (q.shape[1] * q.itemsize))
    for left in range(0, end, step):
        chunk = slice(left, min(left + step, end))
        for query, target in zip(q, scores, strict=True):
            np.matmul(k[chunk], query, out=target[chunk])
    cap(scores, options, per_nat)
    is_plain = arguments.mask is None and options.alibi is None
    if not is_plain or not options.sees_all(len(q), len(k)):
        hide(head(arguments, index), scores.T, Tile(0, len(q), 0, end))


def _weigh(scores: Array, power: Power) -> tuple[Array, Array]:
    """Exponentiate scores in place, less the largest of each row; return log-sum-exps and sums, 1 for empty rows."""
    shift = scores.max(axis=-1)
    np.subtract(scores, finite(shift)[..., None], out=scores)
    power.function(scores, out=scores)
    total = scores.sum(axis=-1)
    empty = total == 0
    total[empty] = 1
    return np.where(empty, -np.inf, shift / power.per_nat + np.log(total)), total


def few_scores_attention(
    q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
) -> tuple[Array, Array]:
    """Exact attention and its log-sum-exp, of all heads at once."""
    scores = q * q.dtype.type(options.scale) @ k.swapaxes(-1, -2)
    if options.softcap is not None:
        scores = np.tanh(scores / q.dtype.type(options.softcap)) * q.dtype.type(options.softcap)
    n_queries, n_keys = scores.shape[-2:]
    if mask is not None or options.alibi is not None or not options.sees_all(n_queries, n_keys):
        diagonal = options.diagonal(n_queries, n_keys)
        bounds = TileBounds(mask, options, Tile(0, n_queries, 0, n_keys), diagonal)
        part, seen = bounds.additive(np, scores.dtype, None), bounds.seen(np, None)
        scores = hide_scores(np, scores, part, seen)
    shift = scores.max(axis=-1, keepdims=True)
    shift[shift == -np.inf] = 0
    scores -= shift
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    lse = np.log(total)
    lse += shift
    total[total == 0] = 1
    out = scores @ v
    out /= total
    return out, lse[..., 0]
