"""Exact attention and its gradient, tile by tile, in the array API standard and nothing else.

`Primitives` offers these as methods. Shapes throughout: q (..., Nq, D), k (..., Nk, D), v (..., Nk, Dv), mask
broadcastable to (..., Nq, Nk), out (..., Nq, Dv), lse (..., Nq); leading axes broadcast.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slra._typing import Array, CausalAlign, Namespace

if TYPE_CHECKING:
    from slra._backends.agnostic import Primitives

__all__ = [
    "ScoreOptions",
    "SoftmaxState",
    "Tile",
    "capped",
    "scores_batch_shape",
    "sum_to",
    "tiled_attention",
    "tiled_attention_vjp",
]

# One tile of scores is 512 x 1024: 2 MB in float32, which stays in the second-level cache.
QUERY_TILE, KEY_TILE = 512, 1024


class ScoreOptions(NamedTuple):
    """What is done to a score between the product of query and key and the softmax."""

    scale: float
    is_causal: bool = False
    causal_align: CausalAlign = "bottom_right"
    softcap: float | None = None

    def diagonal(self, n_queries: int, n_keys: int) -> int:
        """Query i may attend to keys up to and including i + this, where attention is causal."""
        return n_keys - n_queries if self.causal_align == "bottom_right" else 0

    def last_key(self, bottom: int, n_queries: int, n_keys: int) -> int:
        """Return how many keys, from the first, the queries before ``bottom`` attend to."""
        if not self.is_causal:
            return n_keys
        return max(0, min(n_keys, bottom + self.diagonal(n_queries, n_keys)))


class Tile(NamedTuple):
    """A rectangle of the matrix of scores."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, mask: Array) -> Array:
        """Cut this tile out of a mask, whose axes of length one stay as they are."""
        if mask.shape[-2] > 1:
            mask = mask[..., self.top : self.bottom, :]
        return mask[..., self.left : self.right] if mask.shape[-1] > 1 else mask

    def crosses(self, diagonal: int) -> bool:
        """Whether part of this tile is after the causal diagonal."""
        return self.right - 1 > self.top + diagonal


def scores_batch_shape(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[int, ...]:
    """Shape of the leading axes of the result of attention."""
    shapes = [x.shape[:-2] for x in (q, k, v, mask) if x is not None]
    return np.broadcast_shapes(*shapes)


def tiled_attention(
    table: "Primitives", q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
) -> tuple[Array, Array]:
    """Exact attention and its log-sum-exp."""
    rows = table.recomputed(_attention_rows)
    parts = [rows(table, q, k, v, mask, options, top) for top in range(0, q.shape[-2], QUERY_TILE)]
    outs, lses = zip(*parts, strict=True)
    if len(parts) == 1:
        return outs[0], lses[0]
    return table.xp.concat(outs, axis=-2), table.xp.concat(lses, axis=-1)


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _row_tiles(top: int, n_queries: int, n_keys: int, options: ScoreOptions) -> list[Tile]:
    """Tiles of the keys that the queries from ``top`` attend to."""
    bottom = min(top + QUERY_TILE, n_queries)
    end = options.last_key(bottom, n_queries, n_keys)
    key_tiles = _slices(n_keys, KEY_TILE)
    return [Tile(top, bottom, keys.start, keys.stop) for keys in key_tiles if keys.start < end]


def _attention_rows(
    table: "Primitives",
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
    top: int,
) -> tuple[Array, Array]:
    """Attention of one tile of queries, by online softmax over the tiles of keys.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867;
    Dao et al., FlashAttention, arXiv:2205.14135, Algorithm 1.
    """
    xp = table.xp
    diagonal = options.diagonal(q.shape[-2], k.shape[-2])
    row = _row_tiles(top, q.shape[-2], k.shape[-2], options)
    q = q[..., top : min(top + QUERY_TILE, q.shape[-2]), :] * options.scale
    shape = (*scores_batch_shape(q, k, v, mask), q.shape[-2])
    like = {"dtype": q.dtype, "device": table.creation_device(q)}
    state = SoftmaxState(
        xp.full(shape, -math.inf, **like),
        xp.zeros(shape, **like),
        xp.zeros((*shape, v.shape[-1]), **like),
    )
    for tile in row:
        keys = slice(tile.left, tile.right)
        scores = capped(table, q @ xp.matrix_transpose(k[..., keys, :]), options)
        scores = masked(table, scores, mask, options, tile, diagonal)
        state = state.add(table, scores, v[..., keys, :])
    return state.result(table)


class SoftmaxState(NamedTuple):
    """Online softmax: largest score so far, sum of exp(score - peak), and the same sum of values."""

    peak: Array
    total: Array
    out: Array

    def add(self, table: "Primitives", scores: Array, v: Array) -> "SoftmaxState":
        """Take in one tile of scores, and the values that belong to it."""
        xp = table.xp
        # The result does not depend on the peak, so no gradient needs to pass through it.
        peak = xp.maximum(self.peak, xp.max(table.constant(scores), axis=-1))
        # A row that has met no key yet has the peak -inf, and exp(-inf - -inf) would be NaN.
        shift = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
        weights = xp.exp(scores - shift[..., None])
        decay = xp.exp(self.peak - shift)
        total = self.total * decay + xp.sum(weights, axis=-1)
        return SoftmaxState(peak, total, self.out * decay[..., None] + weights @ v)

    def result(self, table: "Primitives") -> tuple[Array, Array]:
        """Return the output and the log-sum-exp; 0 and -inf for a row without keys."""
        xp = table.xp
        empty = self.total == 0
        total = xp.where(empty, xp.ones_like(self.total), self.total)
        return self.out / total[..., None], xp.where(empty, self.peak, self.peak + xp.log(total))


def capped(table: "Primitives", products: Array, options: ScoreOptions) -> Array:
    """Scores from the products of scaled queries and keys."""
    if options.softcap is None:
        return products
    return options.softcap * table.xp.tanh(products / options.softcap)


def masked(
    table: "Primitives",
    scores: Array,
    mask: Array | None,
    options: ScoreOptions,
    tile: Tile,
    diagonal: int,
) -> Array:
    """Apply the mask and the causal bound to one tile of scores."""
    xp = table.xp
    if mask is not None:
        part = tile.of(mask)
        if xp.isdtype(mask.dtype, "bool"):
            scores = xp.where(part, scores, xp.full_like(scores, -math.inf))
        else:
            scores = scores + xp.astype(part, scores.dtype)
    if options.is_causal and tile.crosses(diagonal):
        device = table.creation_device(scores)
        rows = xp.arange(tile.top, tile.bottom, device=device)[:, None]
        columns = xp.arange(tile.left, tile.right, device=device)[None, :]
        scores = xp.where(columns <= rows + diagonal, scores, xp.full_like(scores, -math.inf))
    return scores


def tiled_attention_vjp(
    table: "Primitives",
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    options: ScoreOptions,
    lse: Array,
    delta: Array,
    grad_out: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of attention with respect to q, k and v, from recomputed tiles of weights.

    ``delta`` is rowsum(grad_out * out) - grad_lse, shape (..., Nq).
    Source: Dao et al., FlashAttention, arXiv:2205.14135, Algorithm 4.
    """
    xp = table.xp
    key_tiles = _slices(k.shape[-2], KEY_TILE)
    dk = [xp.zeros_like(k[..., keys, :]) for keys in key_tiles]
    dv = [xp.zeros_like(v[..., keys, :]) for keys in key_tiles]
    dq = []
    for rows in _slices(q.shape[-2], QUERY_TILE):
        q_rows, grad_rows = q[..., rows, :] * options.scale, grad_out[..., rows, :]
        dq_rows = xp.zeros_like(q_rows)
        for i, tile in enumerate(_row_tiles(rows.start, q.shape[-2], k.shape[-2], options)):
            k_tile = k[..., tile.left : tile.right, :]
            v_tile = v[..., tile.left : tile.right, :]
            weights, slope = _weights_and_slope(
                table, q_rows, k_tile, mask, options, tile, lse, k.shape[-2]
            )
            grad_weights = grad_rows @ xp.matrix_transpose(v_tile)
            grad_scores = slope * (grad_weights - delta[..., rows, None])
            dq_rows = dq_rows + sum_to(grad_scores @ k_tile, q_rows.shape, xp)
            dk[i] = dk[i] + sum_to(xp.matrix_transpose(grad_scores) @ q_rows, k_tile.shape, xp)
            dv[i] = dv[i] + sum_to(xp.matrix_transpose(weights) @ grad_rows, v_tile.shape, xp)
        dq.append(dq_rows * options.scale)
    return xp.concat(dq, axis=-2), xp.concat(dk, axis=-2), xp.concat(dv, axis=-2)


def _weights_and_slope(
    table: "Primitives",
    q: Array,
    k: Array,
    mask: Array | None,
    options: ScoreOptions,
    tile: Tile,
    lse: Array,
    n_keys: int,
) -> tuple[Array, Array]:
    """Return the softmax weights of one tile, and their product with the derivative of the softcap."""
    xp = table.xp
    scores = capped(table, q @ xp.matrix_transpose(k), options)
    diagonal = options.diagonal(lse.shape[-1], n_keys)
    lse = lse[..., tile.top : tile.bottom, None]
    # The log-sum-exp of an empty row is -inf, like all its scores.
    shift = xp.where(lse == -math.inf, xp.zeros_like(lse), lse)
    weights = xp.exp(masked(table, scores, mask, options, tile, diagonal) - shift)
    if options.softcap is None:
        return weights, weights
    return weights, weights * (1 - (scores / options.softcap) ** 2)


def sum_to(x: Array, shape: tuple[int, ...], xp: Namespace) -> Array:
    """Sum over the axes along which an array of this shape was broadcast."""
    x = xp.sum(x, axis=tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1)
    return xp.sum(x, axis=axes, keepdims=True) if axes else x
