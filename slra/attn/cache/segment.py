"""Tokens in r dimensions: how they are stored, read, and attended to."""

import numpy as np

from slra._backends import Backend
from slra._typing import Array
from slra.attn.cache.ask import Ask, fold, part_mask, sees_all, unfold
from slra.attn.cache.rotary import rotate
from slra.attn.cache.state import (
    Segment,
    SegmentMaps,
    Settings,
    SparseTokens,
    arange_like,
    grown,
    is_host,
    zeros,
)

__all__ = ["attend_segment", "new_segment", "read_keys", "read_values", "store_tokens"]

# Rows that are brought to the dtype and the dimensions they are computed in at once.
CHUNK_ROWS = 4096


def new_segment(
    maps: SegmentMaps, start: Array, n_rows: int, settings: Settings, backend: Backend
) -> Segment:
    """Room for ``n_rows`` tokens from ``start`` on."""
    lead = (settings.n_batch, settings.n_heads, n_rows)
    dtype = settings.storage_dtype(backend, maps.wk.dtype)
    rank_qk, rank_v = settings.rank
    k = backend.key_buffer((*lead, rank_qk + settings.carries_shift), dtype, maps.wk)
    v = zeros((*lead, rank_v), maps.wk, backend, dtype)
    if not settings.n_sparse:
        return Segment(maps, start, k, v, None, None)
    sparse = []
    for width in (settings.width, settings.width_v):
        like = zeros((*lead, width), maps.wk, backend)
        values, indices = backend.largest_in_rows(like, settings.n_sparse)
        sparse.append(SparseTokens(backend.xp.astype(values, dtype), indices))
    return Segment(maps, start, k, v, *sparse)


def store_tokens(
    segment: Segment, k: Array, v: Array, places: Array, settings: Settings, backend: Backend
) -> Segment:
    """Write tokens (B, H, m, .) at places (B, m), counted from the start of the segment; negative ones are left out."""
    xp, maps = backend.xp, segment.maps
    dtype = segment.k.dtype
    small_k = xp.astype(k @ maps.wk - maps.c @ maps.wk, dtype)
    small_v = xp.astype(v @ maps.wv - maps.mu @ maps.wv, dtype)
    new: list[Array] = [small_k, small_v]
    if settings.carries_shift:
        new[0] = xp.concat([small_k, xp.ones_like(small_k[..., :1])], axis=-1)
    if segment.sparse_k is not None:
        hat_k = _decoded_keys(segment, xp.astype(small_k, k.dtype), settings, backend)
        hat_v = xp.astype(small_v, v.dtype) @ maps.uv + maps.mu
        for x, hat in ((k, hat_k), (v, hat_v)):
            values, indices = backend.largest_in_rows(x - hat, settings.n_sparse)
            new += [xp.astype(values, dtype), indices]
    held = [segment.k, segment.v, *(segment.sparse_k or ()), *(segment.sparse_v or ())]
    if is_host(places):
        held = [grown(buffer, int(places.max()) + 1, backend) for buffer in held]
    k, v, *sparse = (backend.put_rows(*one, places) for one in zip(held, new, strict=True))
    if not sparse:
        return segment._replace(k=k, v=v)
    return Segment(maps, segment.start, k, v, SparseTokens(*sparse[:2]), SparseTokens(*sparse[2:]))


def _decoded_keys(segment: Segment, small: Array, settings: Settings, backend: Backend) -> Array:
    """Keys that the low rank stands for."""
    back = segment.maps.back(settings.n_shared, backend.xp)
    return small[..., : settings.rank[0]] @ back + segment.maps.c


def _cut(buffer: Array, rows: slice, segment: Segment, backend: Backend) -> Array:
    """Rows of a buffer in the dtype to compute in."""
    return backend.xp.astype(buffer[:, :, rows, :], segment.maps.wk.dtype, copy=False)


def _sparse(
    tokens: SparseTokens, rows: slice, width: int, segment: Segment, backend: Backend
) -> Array:
    values = _cut(tokens.values, rows, segment, backend)
    return backend.scatter_rows(values, tokens.indices[:, :, rows, :], width)


def read_keys(segment: Segment, rows: slice, settings: Settings, backend: Backend) -> Array:
    """Keys, as they were appended, that a segment stands for, (B, H, rows, D)."""
    k = _decoded_keys(segment, _cut(segment.k, rows, segment, backend), settings, backend)
    if segment.sparse_k is None:
        return k
    return k + _sparse(segment.sparse_k, rows, settings.width, segment, backend)


def read_values(segment: Segment, rows: slice, settings: Settings, backend: Backend) -> Array:
    """Values that a segment stands for, (B, H, rows, Dv)."""
    v = _cut(segment.v, rows, segment, backend) @ segment.maps.uv + segment.maps.mu
    if segment.sparse_v is None:
        return v
    return v + _sparse(segment.sparse_v, rows, settings.width_v, segment, backend)


def attend_segment(
    segment: Segment, end: Array, asked: Ask, settings: Settings, backend: Backend
) -> list[tuple[Array, Array]]:
    """Attention to the tokens before ``end``, and its log-sum-exp, chunk by chunk where rows must be made first."""
    n_rows = int(np.max(end - segment.start)) if is_host(end) else segment.k.shape[-2]
    is_read_as_is = (
        settings.rotary is None
        and segment.sparse_k is None
        and segment.k.dtype == segment.maps.wk.dtype
    )
    step = max(1, n_rows if is_read_as_is else CHUNK_ROWS)
    starts = range(0, n_rows, step)
    chunks = [slice(first, min(first + step, n_rows)) for first in starts]
    return [_attend_rows(segment, end, rows, asked, settings, backend) for rows in chunks]


def _attend_rows(
    segment: Segment, end: Array, rows: slice, asked: Ask, settings: Settings, backend: Backend
) -> tuple[Array, Array]:
    maps, start, n_queries = segment.maps, segment.start, asked.q.shape[-2]
    mask = None
    if not sees_all(asked, start, end, rows):
        positions = start[:, None] + arange_like(start, rows.start, rows.stop, backend)
        mask = part_mask(asked, (positions, start[:, None], end[:, None]), settings, backend)
    features = _rotated if settings.rotary is not None else _features
    q, k, shift = features(segment, rows, asked, settings, backend)
    v = _cut(segment.v, rows, segment, backend)
    if segment.sparse_v is not None:
        more = _sparse(segment.sparse_v, rows, settings.width_v, segment, backend)
        v = backend.xp.concat([v, more], axis=-1)
    out, lse = backend.attention(q, k, v, mask, settings.options)
    rank_v = settings.rank[1]
    whole = out[..., :rank_v] @ maps.uv + maps.mu
    if segment.sparse_v is not None:
        whole = whole + out[..., rank_v:]
    if shift is not None:
        lse = lse + settings.options.scale * shift[..., 0]
    return unfold(whole, n_queries, backend), unfold(lse, n_queries, backend)


def _features(
    segment: Segment, rows: slice, asked: Ask, settings: Settings, backend: Backend
) -> tuple[Array, Array, Array | None]:
    """Make queries and keys whose products are the scores under the maps, but for a shift that belongs to the query.

    With sparse entries there are more features: q'k' + q s = (q', q) (k', s).
    """
    xp, maps = backend.xp, segment.maps
    q, k = fold(asked.q @ maps.wq, settings, backend), _cut(segment.k, rows, segment, backend)
    whole = fold(asked.q, settings, backend)
    shift = whole @ xp.matrix_transpose(maps.c)
    if settings.carries_shift:
        q = xp.concat([q, shift], axis=-1)
    if segment.sparse_k is not None:
        more = _sparse(segment.sparse_k, rows, settings.width, segment, backend)
        q, k = xp.concat([q, whole], axis=-1), xp.concat([k, more], axis=-1)
    return q, k, None if settings.carries_shift else shift


def _rotated(
    segment: Segment, rows: slice, asked: Ask, settings: Settings, backend: Backend
) -> tuple[Array, Array, None]:
    """Make queries and keys in all dimensions, rotated.

    Products depend on the distance of two positions only, so both are counted from the first of the rows: angles stay
    small, and those of the keys are the same for all elements of the batch.
    """
    frequencies = settings.rotary or ()
    k = read_keys(segment, rows, settings, backend)
    inside = arange_like(segment.start, 0, rows.stop - rows.start, backend)
    since = asked.positions - segment.start[:, None] - rows.start
    q = fold(rotate(asked.q, since, frequencies, backend), settings, backend)
    return q, rotate(k, inside, frequencies, backend), None
