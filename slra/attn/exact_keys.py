"""Attention in which the few keys that receive most attention stay exact: sparse plus low rank over the keys."""

from typing import NamedTuple

from slra._typing import Array
from slra.attn._inputs import Inputs, join_heads
from slra.attn._rows import Grouped, group, row_weights, take_rows
from slra.attn.basis import Maps, attend_maps, per_query_head
from slra.attn.merge import merge_attention

__all__ = ["ExactKeys", "attend_with_exact_keys", "exact_part", "find_exact_keys", "without"]


class ExactKeys(NamedTuple):
    """The keys that stay exact, and the others."""

    indices: Array  # (..., H, m)
    keep: Array  # (..., H, Nk), False for keys that stay exact: they are not left to the low rank


def find_exact_keys(data: Grouped, rows: list[int], n_exact: int) -> ExactKeys:
    """Take the keys that receive most attention from these rows, over the query heads that share them."""
    backend, xp = data.backend, data.backend.xp
    weights = row_weights(data, take_rows(data.q, rows, backend), data.k, rows)
    indices = backend.top_indices(xp.sum(weights, axis=(-3, -2)), n_exact)
    every = xp.arange(data.k.shape[-2], device=backend.creation_device(data.k))
    return ExactKeys(indices, ~xp.any(indices[..., None] == every, axis=-2))


def attend_with_exact_keys(
    maps: Maps, inputs: Inputs, keys: ExactKeys, *, enable_gqa: bool
) -> tuple[Array, Array]:
    """Attend to some keys exactly and to the others under the maps, in one softmax."""
    others = attend_maps(
        maps,
        inputs._replace(mask=without(keys, inputs, enable_gqa=enable_gqa)),
        enable_gqa=enable_gqa,
        with_lse=True,
    )
    exact = _attend_exactly(inputs, keys, enable_gqa=enable_gqa)
    return merge_attention(*zip(others, exact, strict=True))


def without(keys: ExactKeys, inputs: Inputs, *, enable_gqa: bool) -> Array:
    """Mask the keys that stay exact, besides those that are masked anyway."""
    xp, mask = inputs.backend.xp, inputs.mask
    keep = keys.keep[..., None, :]
    if enable_gqa:
        keep = per_query_head(keep, inputs.q, xp)
    elif not inputs.has_heads:
        keep = keep[0, ...]
    if mask is None:
        return keep
    if xp.isdtype(mask.dtype, "bool"):
        return xp.logical_and(mask, keep)
    return xp.where(keep, mask, xp.full_like(mask, -xp.inf))


def _attend_exactly(inputs: Inputs, keys: ExactKeys, *, enable_gqa: bool) -> tuple[Array, Array]:
    part = exact_part(inputs, keys, enable_gqa=enable_gqa)
    out, lse = part.backend.attention(part.q, part.k, part.v, part.mask, part.options)
    if not inputs.has_heads:
        return out[0, 0, ...], lse[0, 0, ...]
    return join_heads(out, inputs, 2), join_heads(lse, inputs, 1)


def exact_part(inputs: Inputs, keys: ExactKeys, *, enable_gqa: bool) -> Grouped:
    """Lay the queries out by key head, and beside them (..., H, 1, m, D) the keys that stay exact."""
    data = group(inputs, enable_gqa=enable_gqa)
    k, v = (data.backend.gather_rows(x, keys.indices)[..., None, :, :] for x in (data.k, data.v))
    options = data.options._replace(is_causal=False)
    return data._replace(k=k, v=v, mask=_mask(data, keys), options=options)


def _mask(data: Grouped, keys: ExactKeys) -> Array | None:
    """Cut the columns of these keys out of the mask, and of the causal one, (..., H, G or 1, Nq or 1, m)."""
    backend, xp, mask = data.backend, data.backend.xp, data.mask
    indices = keys.indices[..., None, :]
    if mask is not None and mask.shape[-1] > 1:
        mask = xp.reshape(mask, ((1,) * (data.q.ndim - mask.ndim) + tuple(mask.shape)))
        columns = backend.gather_rows(xp.matrix_transpose(mask), indices)
        mask = xp.matrix_transpose(columns)
    if not data.options.is_causal:
        return mask
    n_queries, n_keys = data.q.shape[-2], data.k.shape[-2]
    rows = xp.arange(n_queries, device=backend.creation_device(data.q))[:, None]
    seen = indices[..., None, :] <= rows + data.options.diagonal(n_queries, n_keys)
    if mask is None:
        return seen
    if xp.isdtype(mask.dtype, "bool"):
        return xp.logical_and(mask, seen)
    return xp.where(seen, mask, xp.full_like(mask, -xp.inf))
