"""Exact attention and its gradient, tile by tile, in the array API standard and nothing else.

Shapes throughout: q (..., Nq, D), k (..., Nk, D), v (..., Nk, Dv), mask broadcastable to (..., Nq, Nk), out
(..., Nq, Dv), lse (..., Nq); leading axes broadcast. A library overrides a step of `Attention`, or all of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slra._typing import Array, CausalAlign, DType, Namespace

__all__ = [
    "Attention",
    "ScoreOptions",
    "SoftmaxState",
    "Tile",
    "TileBounds",
    "Tiling",
    "broadcast_shapes",
    "capped",
    "combine_masks",
    "hide",
    "scores_batch_shape",
    "sum_to",
]


# Lower tiles take longer to start than to compute: at 64, windows of 16 and 64 took 1.1 to 1.4 times as long, at 32
# twice as long (NumPy and torch, one head of 4096 x 64).
LEAST_HEIGHT = 128


class ScoreOptions(NamedTuple):
    """What is done to a score between the product of query and key and the softmax.

    Plain values, which hash: JAX compiles a function for each, but for the two numbers and the slopes, which are its
    operands. The numbers may also be 0-d arrays, of libraries that trace or differentiate.
    """

    scale: Any
    # Also where a window has a right end: then the diagonal lies that much further to the right.
    is_causal: bool = False
    causal_align: CausalAlign = "bottom_right"
    softcap: Any = None
    # Query i may attend to keys from i + this on, where a window has a left end.
    first: int | None = None
    # Slopes by head, broadcastable to the scores: query i is at key i + position, and a score loses the slope times
    # the distance.
    alibi: Array | None = None
    position: int = 0

    def diagonal(self, n_queries: int, n_keys: int) -> int:
        """Query i may attend to keys up to and including i + this, where attention is causal."""
        if isinstance(self.causal_align, int):
            return self.causal_align
        return n_keys - n_queries if self.causal_align == "bottom_right" else 0

    def last_key(self, bottom: int, n_queries: int, n_keys: int) -> int:
        """Return how many keys, from the first, the queries before ``bottom`` attend to."""
        if not self.is_causal:
            return n_keys
        return max(0, min(n_keys, bottom + self.diagonal(n_queries, n_keys)))

    def first_key(self, top: int, n_keys: int) -> int:
        """Return the first key that queries from ``top`` on attend to."""
        return 0 if self.first is None else max(0, min(n_keys, top + self.first))

    def tile_height(self, largest: int, n_queries: int, n_keys: int) -> int:
        """Height of a tile: half as high as a window is wide, where there is one.

        So many queries then read one and a half times the keys that each attends to.
        """
        if self.first is None or not self.is_causal:
            return largest
        width = self.diagonal(n_queries, n_keys) - self.first + 1
        return min(largest, max(LEAST_HEIGHT, width // 2))

    def sees_all(self, n_queries: int, n_keys: int) -> bool:
        """Whether neither causality nor a window hides anything."""
        is_cut = self.is_causal and self.diagonal(n_queries, n_keys) < n_keys - 1
        return not is_cut and (self.first is None or n_queries - 1 + self.first <= 0)


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

    def is_left_of(self, first: int | None) -> bool:
        """Whether part of this tile is before the first key of its last query."""
        return first is not None and self.left < self.bottom - 1 + first


class TileBounds(NamedTuple):
    """What decides which scores of one tile count."""

    mask: Array | None
    options: ScoreOptions
    tile: Tile
    # Query i may attend to keys up to and including i + this, where attention is causal.
    diagonal: int

    @property
    def is_cut(self) -> bool:
        """Whether the causal bound, or the left end of a window, passes through the tile."""
        is_late = self.options.is_causal and self.tile.crosses(self.diagonal)
        return is_late or self.tile.is_left_of(self.options.first)

    def seen(self, xp: Namespace, device: Any) -> Array | None:
        """Return what causality and a window show of the tile, or None where that is all."""
        if not self.is_cut:
            return None
        tile, first = self.tile, self.options.first
        rows = xp.arange(tile.top, tile.bottom, device=device)[:, None]
        columns = xp.arange(tile.left, tile.right, device=device)[None, :]
        if not self.options.is_causal:
            return columns >= rows + first
        seen = columns <= rows + self.diagonal
        return seen if first is None else seen & (columns >= rows + first)

    def distances(self, xp: Namespace, dtype: DType, device: Any) -> Array:
        """Distance of each query of the tile from each key."""
        tile, like = self.tile, {"dtype": dtype, "device": device}
        start = tile.top + self.options.position
        rows = xp.arange(start, start + tile.bottom - tile.top, **like)[:, None]
        return xp.abs(rows - xp.arange(tile.left, tile.right, **like)[None, :])

    def additive(self, xp: Namespace, dtype: DType, device: Any) -> Array | None:
        """Cut the mask to the tile; where slopes are given too, it is what is added to the scores."""
        part, slopes = None if self.mask is None else self.tile.of(self.mask), self.options.alibi
        if slopes is None:
            return part
        bias = -slopes * self.distances(xp, dtype, device)
        if part is None:
            return bias
        if part.dtype != xp.bool:
            return part + bias
        return xp.where(part, bias, xp.full_like(bias, -math.inf))


class Tiling(NamedTuple):
    """The matrix of scores in tiles of this height and width."""

    height: int
    width: int
    n_queries: int
    n_keys: int
    options: ScoreOptions

    def bounds(self, mask: Array | None, tile: Tile) -> TileBounds:
        """Bounds of one of the tiles."""
        diagonal = self.options.diagonal(self.n_queries, self.n_keys)
        return TileBounds(mask, self.options, tile, diagonal)

    def rows(self) -> list[slice]:
        """Cut the queries into rows of tiles."""
        return _slices(self.n_queries, self.height)

    def columns(self) -> list[slice]:
        """Cut the keys into columns of tiles."""
        return _slices(self.n_keys, self.width)

    def seen_row(self, queries: slice) -> list[Tile]:
        """Tiles from the first to the last key that these queries attend to."""
        end = self.options.last_key(queries.stop, self.n_queries, self.n_keys)
        lefts = range(self.options.first_key(queries.start, self.n_keys), end, self.width)
        row = (queries.start, queries.stop)
        return [Tile(*row, left, min(left + self.width, end)) for left in lefts]

    def row(self, queries: slice) -> list[Tile]:
        """Tiles, of whole columns, of the keys that these queries attend to."""
        end = self.options.last_key(queries.stop, self.n_queries, self.n_keys)
        start = self.options.first_key(queries.start, self.n_keys)
        row, columns = (queries.start, queries.stop), self.columns()
        return [Tile(*row, x.start, x.stop) for x in columns if x.start < end and x.stop > start]


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def scores_batch_shape(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[int, ...]:
    """Shape of the leading axes of the result of attention."""
    shapes = [x.shape[:-2] for x in (q, k, v, mask) if x is not None]
    return broadcast_shapes(*shapes)


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Broadcast as NumPy does, which would make numbers of sizes that are symbols (torch.export) or traced."""
    whole: list[int] = []
    for axis in range(-max([len(shape) for shape in shapes]), 0):
        size: int = 1
        for shape in shapes:
            n = shape[axis] if len(shape) >= -axis else 1
            if n is size or n == 1:
                continue
            if size != 1 and n != size:
                raise ValueError(f"shapes must broadcast, got {', '.join(map(str, shapes))}")
            size = n
        whole.append(size)
    return tuple(whole)


def capped(xp: Namespace, products: Array, softcap: Any) -> Array:
    """Scores from the products of scaled queries and keys."""
    return products if softcap is None else softcap * xp.tanh(products / softcap)


def combine_masks(xp: Namespace, mask: Array | None, seen: Array) -> Array:
    """Mask of what a mask (boolean, additive or None) and a boolean array both show."""
    if mask is None:
        return seen
    if mask.dtype == xp.bool:
        return mask & seen
    return xp.where(seen, mask, xp.full_like(mask, -math.inf))


def hide(xp: Namespace, scores: Array, mask: Array | None, seen: Array | None = None) -> Array:
    """Make -inf of scores that a mask or ``seen`` hides, or add the mask where it is floating."""
    if mask is not None and mask.dtype != xp.bool:
        scores, mask = scores + xp.astype(mask, scores.dtype), None
    # After the addition: a sum may be NaN (inf - inf) where the key is hidden anyway.
    shown = mask if seen is None else combine_masks(xp, mask, seen)
    if shown is None:
        return scores
    return xp.where(shown, scores, xp.full_like(scores, -math.inf))


class SoftmaxState(NamedTuple):
    """Online softmax: largest score so far, sum of exp(score - peak), and the same sum of values."""

    peak: Array
    total: Array
    out: Array

    @classmethod
    def empty(
        cls, xp: Namespace, shape: tuple[int, ...], width: int, **like: Any
    ) -> "SoftmaxState":
        """State of rows, (..., Nq), that have met no key; ``like`` has their dtype and device."""
        peak, total = xp.full(shape, -math.inf, **like), xp.zeros(shape, **like)
        return cls(peak, total, xp.zeros((*shape, width), **like))

    def add(
        self, xp: Namespace, scores: Array, v: Array, stop_gradient: Callable[[Array], Array]
    ) -> "SoftmaxState":
        """Take in one tile of scores, and the values that belong to it."""
        # The result does not depend on the peak, so no gradient needs to pass through it.
        peak = xp.maximum(self.peak, xp.max(stop_gradient(scores), axis=-1))
        # A row that has met no key yet has the peak -inf, and exp(-inf - -inf) would be NaN.
        shift = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
        weights = xp.exp(scores - shift[..., None])
        decay = xp.exp(self.peak - shift)
        total = self.total * decay + xp.sum(weights, axis=-1)
        return SoftmaxState(peak, total, self.out * decay[..., None] + weights @ v)

    def result(self, xp: Namespace) -> tuple[Array, Array]:
        """Return the output and the log-sum-exp; 0 and -inf for a row without keys."""
        empty = self.total == 0
        total = xp.where(empty, xp.ones_like(self.total), self.total)
        return self.out / total[..., None], xp.where(empty, self.peak, self.peak + xp.log(total))


class Attention:
    """Attention for one namespace, ``xp``: loops over tiles, and the steps that they are made of."""

    xp: Namespace

    def creation_device(self, like: Array) -> Any:
        """Device to create an array on that is to meet ``like``."""
        raise NotImplementedError

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Exact attention and its log-sum-exp, in memory linear in the lengths."""
        rows = self.checkpoint(self._attention_rows)
        tiling = self._tiling(q, k, v, mask, options)
        parts = [rows(q, k, v, mask, tiling, queries) for queries in tiling.rows()]
        outs, lses = zip(*parts, strict=True)
        if len(parts) == 1:
            return outs[0], lses[0]
        return self.xp.concat(outs, axis=-2), self.xp.concat(lses, axis=-1)

    def attention_output(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> Array:
        """Exact attention, where nobody asks for the log-sum-exp."""
        return self.attention(q, k, v, mask, options)[0]

    def mapped_queries(self, q: Array, wq: Array, c: Array) -> tuple[Array, Array]:
        """Project queries (B, H * shared, M, D), and multiply them by ``c`` (1 or B, H, 1, D).

        By maps ``wq`` (1 or B, H, shared or 1, D, r). Both come with the queries of a group of heads as rows,
        (B, H, shared * M, .).
        """
        xp, n_heads = self.xp, wq.shape[1]
        n_rows = q.shape[1] // n_heads * q.shape[2]

        def stack(x: Array) -> Array:
            return xp.reshape(x, (x.shape[0], n_heads, n_rows, x.shape[-1]))

        if wq.shape[2] == 1:
            mapped = self.matmul(stack(q), wq[:, :, 0, ...])
        else:
            wq = xp.reshape(wq, (wq.shape[0], q.shape[1], *wq.shape[-2:]))
            mapped = stack(self.matmul(q, wq))
        return mapped, self.matmul(stack(q), xp.matrix_transpose(c))

    def attention_through(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
        back: Array,
        mean: Array,
        shift: Array | None,
    ) -> tuple[Array, Array]:
        """Attention to projected values, brought back as ``out @ back + mean``; 0 for a row without keys.

        Arrays have axes (B, H, ., .), ``back`` and ``mean`` may have B = 1. To the log-sum-exp comes ``shift``, (B, H,
        Nq, 1), times the scale: what keys that are shifted back add to each score of a query.
        """
        xp = self.xp
        out, lse = self.attention(q, k, v, mask, options)
        whole = self.matmul(out, back) + mean
        whole = xp.where(lse[..., None] == -math.inf, xp.zeros_like(whole), whole)
        return whole, lse if shift is None else lse + options.scale * shift[..., 0]

    def merged(self, outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
        """Join attention to parts of the keys, given the log-sum-exp of each; +inf counts as none."""
        xp, log_sums = self.xp, self.xp.stack(lses)
        log_sums = xp.where(log_sums == xp.inf, xp.full_like(log_sums, -math.inf), log_sums)
        peak = xp.max(log_sums, axis=0)
        # Where no part attends to anything the peak is -inf, and -inf - -inf would be NaN.
        shift = xp.where(peak == -xp.inf, xp.zeros_like(peak), peak)
        weights = xp.exp(log_sums - shift)
        total = xp.sum(weights, axis=0)
        empty = total == 0
        total = xp.where(empty, xp.ones_like(total), total)
        weights = xp.astype(weights / total, outs[0].dtype)
        is_empty = (log_sums == -math.inf)[..., None]
        outs = [xp.where(is_empty[i, ...], xp.zeros_like(x), x) for i, x in enumerate(outs)]
        out = sum(weights[i, ..., None] * shard for i, shard in enumerate(outs))
        return out, xp.where(empty, peak, shift + xp.log(total))

    def attention_vjp(
        self,
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
        xp = self.xp
        tiling = self._tiling(q, k, v, mask, options)
        narrow = options.tile_height(tiling.width, tiling.n_queries, tiling.n_keys)
        tiling = tiling._replace(width=narrow)
        dk = [xp.zeros_like(k[..., keys, :]) for keys in tiling.columns()]
        dv = [xp.zeros_like(v[..., keys, :]) for keys in tiling.columns()]
        dq = []
        for rows in tiling.rows():
            q_rows, grad_rows = q[..., rows, :] * options.scale, self.tile_rows(grad_out, rows)
            dq_rows = xp.zeros_like(q_rows)
            for tile in tiling.row(rows):
                i = tile.left // tiling.width
                k_tile = k[..., tile.left : tile.right, :]
                v_tile = v[..., tile.left : tile.right, :]
                weights, grad_scores = self.tile_gradients(
                    self.matmul(q_rows, xp.matrix_transpose(k_tile)),
                    self.matmul(grad_rows, xp.matrix_transpose(v_tile)),
                    tiling.bounds(mask, tile),
                    lse[..., rows, None],
                    delta[..., rows, None],
                )
                dq_rows = dq_rows + sum_to(self.matmul(grad_scores, k_tile), q_rows.shape, xp)
                dk[i] = dk[i] + self.sum_over_rows(grad_scores, q_rows, k_tile.shape)
                dv[i] = dv[i] + self.sum_over_rows(weights, grad_rows, v_tile.shape)
            dq.append(dq_rows * options.scale)
        return xp.concat(dq, axis=-2), xp.concat(dk, axis=-2), xp.concat(dv, axis=-2)

    def attention_slope_gradient(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        options: ScoreOptions,
        lse: Array,
        delta: Array,
        grad_out: Array,
    ) -> Array:
        """Gradient with respect to the slopes of ``options``: what a score gets, times minus the distance."""
        xp, alibi = self.xp, options.alibi
        if alibi is None:
            raise AssertionError("there are slopes")
        total = xp.zeros_like(alibi)
        tiling, device = self._tiling(q, k, v, mask, options), self.creation_device(q)
        for rows in tiling.rows():
            q_rows, grad_rows = q[..., rows, :] * options.scale, grad_out[..., rows, :]
            for tile in tiling.seen_row(rows):
                k_tile, v_tile = (x[..., tile.left : tile.right, :] for x in (k, v))
                bounds = tiling.bounds(mask, tile)
                grad_weights = self.matmul(grad_rows, xp.matrix_transpose(v_tile))
                products = self.matmul(q_rows, xp.matrix_transpose(k_tile))
                sums = lse[..., rows, None], delta[..., rows, None]
                weights, _ = self.tile_gradients(products, grad_weights, bounds, *sums)
                grad_scores = weights * (grad_weights - sums[1])
                grad_slopes = -grad_scores * bounds.distances(xp, q.dtype, device)
                total = total + sum_to(grad_slopes, alibi.shape, xp)
        return total

    def _tiling(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> Tiling:
        n_matrices, lengths = (
            math.prod(scores_batch_shape(q, k, v, mask)),
            (q.shape[-2], k.shape[-2]),
        )
        height, width = self.tile_shape(n_matrices, lengths, q)
        return Tiling(options.tile_height(height, *lengths), width, *lengths, options)

    def _attention_rows(
        self, q: Array, k: Array, v: Array, mask: Array | None, tiling: Tiling, queries: slice
    ) -> tuple[Array, Array]:
        """Attention of one tile of queries, by online softmax over the tiles of keys.

        Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867;
        Dao et al., FlashAttention, arXiv:2205.14135, Algorithm 1.
        """
        xp = self.xp
        q = q[..., queries, :] * tiling.options.scale
        shape = (*scores_batch_shape(q, k, v, mask), q.shape[-2])
        like = {"dtype": q.dtype, "device": self.creation_device(q)}
        state = SoftmaxState.empty(xp, shape, v.shape[-1], **like)
        for tile in tiling.seen_row(queries):
            keys = slice(tile.left, tile.right)
            products = self.matmul(q, xp.matrix_transpose(k[..., keys, :]))
            scores = self.tile_scores(products, tiling.bounds(mask, tile))
            state = self.softmax_step(state, scores, v[..., keys, :])
        return self.softmax_result(state)

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply operands that may be views: ``a @ b``."""
        raise NotImplementedError

    def tile_rows(self, x: Array, rows: slice) -> Array:
        """Rows of ``x`` that are multiplied by one tile after the other."""
        return x[..., rows, :]

    def sum_over_rows(self, a: Array, b: Array, shape: tuple[int, ...]) -> Array:
        """``a^T b``, summed to ``shape`` over the axes of the batch along which that was broadcast."""
        xp = self.xp
        return sum_to(self.matmul(xp.matrix_transpose(a), b), shape, xp)

    def tile_shape(self, n_matrices: int, lengths: tuple[int, int], like: Array) -> tuple[int, int]:
        """Height and width of a tile of scores, which is held for ``n_matrices`` pairs of q and k at once.

        ``lengths`` are the numbers of queries and keys.
        """
        # 2 MB in float32 for each, which stays in the second-level cache.
        return 512, 1024

    def tile_scores(self, products: Array, bounds: TileBounds) -> Array:
        """Scores of one tile, after softcap and mask, from the products of scaled queries and keys."""
        return self._hidden(capped(self.xp, products, bounds.options.softcap), bounds)

    def softmax_step(self, state: SoftmaxState, scores: Array, v: Array) -> SoftmaxState:
        """Take one tile of scores, and the values that belong to it, into the online softmax."""
        return state.add(self.xp, scores, v, self.stop_gradient)

    def softmax_result(self, state: SoftmaxState) -> tuple[Array, Array]:
        """Return the output and the log-sum-exp; 0 and -inf for a row without keys."""
        return state.result(self.xp)

    def tile_gradients(
        self, products: Array, grad_weights: Array, bounds: TileBounds, lse: Array, delta: Array
    ) -> tuple[Array, Array]:
        """Softmax weights of one tile, and the gradient with respect to its products."""
        xp, softcap = self.xp, bounds.options.softcap
        scores = capped(xp, products, softcap)
        # The log-sum-exp of an empty row is -inf, like all its scores.
        shift = xp.where(lse == -math.inf, xp.zeros_like(lse), lse)
        weights = xp.exp(self._hidden(scores, bounds) - shift)
        if softcap is None:
            return weights, weights * (grad_weights - delta)
        slope = weights * (1 - (scores / softcap) ** 2)
        return weights, slope * (grad_weights - delta)

    def _hidden(self, scores: Array, bounds: TileBounds) -> Array:
        """Apply the mask and the causal bound to one tile of scores."""
        xp, device = self.xp, self.creation_device(scores)
        part = bounds.additive(xp, scores.dtype, device)
        return hide(xp, scores, part, bounds.seen(xp, device))

    def stop_gradient(self, x: Array) -> Array:
        """Return ``x``, through which no gradient passes."""
        return x

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` such that a gradient recomputes its insides instead of keeping them."""
        return function


def sum_to(x: Array, shape: tuple[int, ...], xp: Namespace) -> Array:
    """Sum over the axes along which an array of this shape was broadcast."""
    x = xp.sum(x, axis=tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1)
    return xp.sum(x, axis=axes, keepdims=True) if axes else x
