"""Attention by ``torch.nn.functional.scaled_dot_product_attention``.

Needs: torch. The fused kernels want 4-D tensors, q, k and v equally wide, and the last axis contiguous; otherwise torch
quietly takes a path that is several times slower and quadratic in memory.
"""

import torch
from torch.nn import functional

from slra._backends.standard.attention import (
    ScoreOptions,
    Tile,
    TileBounds,
    combine_masks,
    scores_batch_shape,
)
from slra._typing import Array

__all__ = ["expressible", "sdpa_attention"]

# Where a mask is needed, torch makes an additive one of it: for so many queries at a time.
QUERY_TILE = 1024


def expressible(mask: Array | None, options: ScoreOptions) -> bool:
    """Whether the fused kernels know these options; with a gradient for the mask or the slopes they do not."""
    added = [x for x in (mask, options.alibi) if x is not None]
    return options.softcap is None and not any(x.requires_grad for x in added)


def sdpa_attention(
    q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
) -> Array:
    """Exact attention, by torch's kernel."""
    if options.scale <= 0:
        # The kernel hides keys by -inf before it scales, which would make +inf or NaN of it.
        q, options = q * options.scale, options._replace(scale=1.0)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    diagonal = options.diagonal(n_queries, n_keys)
    sees_all = options.sees_all(n_queries, n_keys)
    is_plain = mask is None and options.alibi is None
    if is_plain and sees_all:
        out = _fused(q, k, v, None, scale=options.scale)
    elif is_plain and diagonal == 0 and options.is_causal and options.first is None:
        out = _fused(q, k, v, None, scale=options.scale, is_causal=True)
    elif sees_all and mask is not None and mask.shape[-2] == 1 and options.alibi is None:
        out = _fused(q, k, v, mask, scale=options.scale)
    else:
        height = options.tile_height(QUERY_TILE, n_queries, n_keys)
        tops = range(0, n_queries, height)
        tiles = [Tile(top, min(top + height, n_queries), 0, n_keys) for top in tops]
        out = torch.cat([_rows(q, k, v, mask, options, tile) for tile in tiles], dim=-2)
    return _restore_nan(q, k, out)


def _rows(
    q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions, tile: Tile
) -> Array:
    """Attention of one tile of queries, whose mask is small enough to be written out."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    left = options.first_key(tile.top, n_keys)
    right = options.last_key(tile.bottom, n_queries, n_keys)
    if left >= right:
        shape = (*scores_batch_shape(q, k, v, mask), tile.bottom - tile.top, v.shape[-1])
        return torch.zeros(shape, dtype=q.dtype, device=q.device)
    tile = tile._replace(left=left, right=right)
    bounds = TileBounds(mask, options, tile, options.diagonal(n_queries, n_keys))
    part, seen = bounds.additive(torch, q.dtype, q.device), bounds.seen(torch, q.device)
    if seen is not None:
        part = combine_masks(torch, part, seen)
    rows, keys = slice(tile.top, tile.bottom), slice(left, right)
    return _fused(q[..., rows, :], k[..., keys, :], v[..., keys, :], part, scale=options.scale)


def _fused(
    q: Array, k: Array, v: Array, mask: Array | None, *, scale: float, is_causal: bool = False
) -> Array:
    """Lay the arguments out as (batch, head, length, width), and call torch."""
    batch = scores_batch_shape(q, k, v, mask)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if len(batch) > 2 and batch[-1] == 1:
        # Not an axis of heads: with those in front of it the batch may not flatten without a copy.
        q, k, v, mask = (x if x is None or x.ndim < 3 else x.squeeze(-3) for x in (q, k, v, mask))
        return _fused(q, k, v, mask, scale=scale, is_causal=is_causal).unsqueeze(-3)
    given = [x if x is None else _padded(x, len(batch)) for x in (q, k, v, mask)]
    if len(batch) > 2 and any(x is not None and _partly_broadcast(x, batch) for x in given):
        # Flattening would copy what is only repeated: go through the first axis instead.
        picked = ([None if x is None else x[i % len(x)] for x in given] for i in range(batch[0]))
        return torch.stack([_fused(*one, scale=scale, is_causal=is_causal) for one in picked])
    width, v_width = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    arrays = [_widened(x, width) for x in given[:3]]
    q, k, v, mask = (x if x is None else _flattened(x, batch) for x in (*arrays, given[3]))
    out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    return out[..., :v_width].reshape(*batch, *out.shape[-2:-1], v_width)


def _padded(x: Array, n_batch: int) -> Array:
    """Put axes of length one in front, for (batch..., length, width) and no fewer than 4."""
    n_missing = max(n_batch, 2) + 2 - x.ndim
    return x[(None,) * n_missing]


def _partly_broadcast(x: Array, batch: tuple[int, ...]) -> bool:
    """Whether some leading axes, but for that of the heads, are broadcast and some are not."""
    sizes = [n for n, whole in zip(x.shape[:-3], batch[:-1], strict=True) if whole > 1]
    return 1 in sizes and any(n > 1 for n in sizes)


def _widened(x: Array, width: int) -> Array:
    """Pad the last axis with zeros, which change neither the products nor the rest of the output."""
    if x.shape[-1] < width:
        return functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _flattened(x: Array, batch: tuple[int, ...]) -> Array:
    """One batch axis for all but the heads; heads that are shared are repeated without a copy."""
    leading = (1,) * (2 - len(batch)) + batch
    x = x.expand(*leading[:-1], *x.shape[-3:]).flatten(0, -4)
    return x.expand(-1, leading[-1], -1, -1)


def _restore_nan(q: Array, k: Array, out: Array) -> Array:
    """Make rows NaN whose scores are all NaN, where torch's CPU kernel returns 0.

    https://github.com/pytorch/pytorch/issues/141128
    """
    lost = torch.isnan(q).any(-1) | torch.isnan(k).any(-1).all(-1)[..., None]
    return torch.where(lost[..., None], torch.nan, out)
