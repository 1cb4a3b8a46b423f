"""Attention on JAX as a scan over tiles of keys, mapped over tiles of queries.

Needs: jax. Both loops are checkpointed, so that a gradient recomputes tiles, and memory stays linear in the lengths
backwards too. (``jax.nn.dot_product_attention`` is quadratic in memory on a CPU.)
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from slra._backends.standard.attention import (
    ScoreOptions,
    SoftmaxState,
    capped,
    hide,
    scores_batch_shape,
)
from slra._typing import Array

__all__ = ["scanned_attention"]

QUERY_TILE, KEY_TILE = 512, 1024


def _even(n: int, largest: int) -> tuple[int, int]:
    """Return number and size of tiles that cover n with as little overlap as can be."""
    number = math.ceil(n / largest)
    return number, math.ceil(n / number)


def scanned_attention(
    q: Array, k: Array, v: Array, mask: Array | None, *, options: ScoreOptions
) -> tuple[Array, Array]:
    """Exact attention and its log-sum-exp."""
    # Operands: as constants, each new number would be compiled for, and what was compiled kept.
    numbers = options.scale, options.softcap, options.alibi
    plain = options._replace(scale=1.0, softcap=None, alibi=None)
    out, lse = _scanned(q, k, v, mask, numbers, options=plain)
    return out, lse


@functools.partial(jax.jit, static_argnames="options")
def _scanned(
    q: Array, k: Array, v: Array, mask: Array | None, numbers: tuple[Any, ...], *, options: Any
) -> tuple[Array, Array]:
    scale, softcap, alibi = numbers
    options = options._replace(scale=scale, softcap=softcap, alibi=alibi)
    n_queries = q.shape[-2]
    n_tiles, height = _even(n_queries, options.tile_height(QUERY_TILE, n_queries, k.shape[-2]))
    if n_tiles == 1:
        return _rows(q, k, v, mask, 0, height, options)

    # The last tile ends where the queries do, and so may begin before the one above it ends.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def rows(top: Array) -> tuple[Array, Array]:
        return _rows(q, k, v, mask, top, height, options)

    tops = jnp.minimum(jnp.arange(n_tiles) * height, n_queries - height)
    out, lse = lax.map(rows, tops)
    return _joined(out, n_queries, -2), _joined(lse, n_queries, -1)


def _joined(tiles: Array, n: int, axis: int) -> Array:
    """Lay tiles, stacked along the first axis, one after another along ``axis``."""
    height = tiles.shape[axis]
    n_whole = tiles.shape[0] - 1
    whole = jnp.moveaxis(tiles[:-1], 0, axis - 1)
    shape = list(tiles.shape[1:])
    shape[axis] = n_whole * height
    last = lax.slice_in_dim(
        tiles[-1], (n_whole + 1) * height - n, height, axis=tiles.ndim - 1 + axis
    )
    return jnp.concatenate([whole.reshape(shape), last], axis=axis)


def _rows(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    top: Any,
    height: int,
    options: ScoreOptions,
) -> tuple[Array, Array]:
    """Attention of one tile of queries, by online softmax over the tiles of keys."""
    n_keys = k.shape[-2]
    diagonal, first = options.diagonal(q.shape[-2], n_keys), options.first
    base: Any = 0
    if first is not None and options.is_causal:
        # So many keys are all that this tile of queries sees.
        n_keys = max(1, min(n_keys, height + diagonal - first))
        base = jnp.clip(top + first, 0, k.shape[-2] - n_keys)
    n_tiles, width = _even(n_keys, KEY_TILE)
    shape = (*scores_batch_shape(q, k, v, mask), height)
    q = lax.dynamic_slice_in_dim(q, top, height, axis=q.ndim - 2) * options.scale

    def add(state: SoftmaxState, start: Any) -> SoftmaxState:
        left = jnp.minimum(start, base + n_keys - width)
        keys, values = (lax.dynamic_slice_in_dim(x, left, width, axis=x.ndim - 2) for x in (k, v))
        scores = capped(jnp, q @ jnp.matrix_transpose(keys), options.softcap)
        part = None if mask is None else _tile(mask, top, left, height, width)
        # The last tile begins before the one to its left ends: what that has seen is not counted twice.
        columns = left + jnp.arange(width)
        rows = (top + jnp.arange(height))[:, None]
        seen = columns >= start
        if options.is_causal:
            seen = seen & (columns <= rows + diagonal)
        if first is not None:
            seen = seen & (columns >= rows + first)
        if options.alibi is not None:
            distances = jnp.abs(rows + options.position - columns).astype(scores.dtype)
            scores = scores - options.alibi * distances
        return state.add(jnp, hide(jnp, scores, part, seen), values, lax.stop_gradient)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state: SoftmaxState, start: Array) -> tuple[SoftmaxState, None]:
        is_seen: Any = True
        if options.is_causal:
            is_seen = start <= top + height - 1 + diagonal
        if first is not None:
            is_seen = is_seen & (start + width - 1 >= top + first)
        if is_seen is True:
            return add(state, start), None
        return lax.cond(is_seen, add, lambda state, _: state, state, start), None

    state = SoftmaxState.empty(jnp, shape, v.shape[-1], dtype=q.dtype)
    if n_tiles == 1:
        state = add(state, base)
    else:
        state, _ = lax.scan(step, state, base + jnp.arange(n_tiles) * width)
    return state.result(jnp)


def _tile(mask: Array, top: Any, left: Any, height: int, width: int) -> Array:
    """Cut a tile out of a mask, whose axes of length one stay as they are."""
    for axis, first, n in ((mask.ndim - 2, top, height), (mask.ndim - 1, left, width)):
        if mask.shape[axis] > 1:
            mask = lax.dynamic_slice_in_dim(mask, first, n, axis=axis)
    return mask
