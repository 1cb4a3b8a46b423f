"""Exact attention to the keys with the largest low-rank scores.

Source: P. Singhania et al., Loki: low-rank keys for efficient sparse attention, arXiv:2406.02542, Algorithm 1: scores
in the leading principal components of the keys choose, query by query, the keys to attend to. (SparQ,
arXiv:2312.04985, chooses by the largest components of each query instead.)
"""

from slra._typing import Array
from slra.attn._rows import Grouped, row_weights, take_rows
from slra.svd.truncated import thin_svd

__all__ = ["topk_attention"]

QUERY_TILE = 512


def topk_attention(data: Grouped, rank: int, n_exact: int) -> Array:
    """Attend to ``n_exact`` keys a query, chosen in ``rank`` dimensions; ties are all taken."""
    backend, xp = data.backend, data.backend.xp
    centred = data.k - xp.mean(data.k, axis=-2, keepdims=True)
    components = xp.matrix_transpose(thin_svd(centred, backend)[2][..., :rank, :])
    q, k = data.q @ components[..., None, :, :], centred @ components
    n_queries = data.q.shape[-2]
    tiles = [
        list(range(top, min(top + QUERY_TILE, n_queries)))
        for top in range(0, n_queries, QUERY_TILE)
    ]
    return xp.concat([_tile(data, q, k, rows, n_exact) for rows in tiles], axis=-2)


def _tile(data: Grouped, q: Array, k: Array, rows: list[int], n_exact: int) -> Array:
    """Attention of some queries; memory is linear in the number of keys."""
    backend, xp, mask = data.backend, data.backend.xp, data.mask
    # Softmax, mask and all, keeps the order of the scores within a row.
    weights = row_weights(data, take_rows(q, rows, backend), k, rows)
    chosen = xp.logical_and(weights >= backend.kth_largest(weights, n_exact), weights > 0)
    if mask is not None and not xp.isdtype(mask.dtype, "bool"):
        part = take_rows(mask, rows, backend) if mask.shape[-2] > 1 else mask
        chosen = xp.where(chosen, part, xp.full_like(part, -xp.inf))
    return backend.attention_output(
        take_rows(data.q, rows, backend),
        data.k[..., None, :, :],
        data.v[..., None, :, :],
        chosen,
        data.options._replace(is_causal=False),
    )
