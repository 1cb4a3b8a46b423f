"""CuPy: kernels that read and write each array once.

Needs: cupy (extra ``cupy``) and, to allocate anything, a CUDA device.
"""

import math
from typing import Any

import cupy
import cupyx
import numpy as np

from slra._backends.cholesky_qr import tall_qr
from slra._backends.cupy_kernels import KERNELS, kernel
from slra._backends.cupy_products import product
from slra._backends.gram_svd import gram_svd
from slra._backends.standard import Backend, matrix_h
from slra._backends.standard.attention import (
    SoftmaxState,
    TileBounds,
    Tiling,
    scores_batch_shape,
)
from slra._backends.standard.bits import PLANE, TOKENS, WHOLE
from slra._backends.standard.sparse import index_dtype
from slra._typing import Array

__all__ = ["CupyBackend"]

# One tile of scores, over all matrices of a batch. Not tuned: that takes a GPU.
TILE_BYTES = 1 << 26
# CuPy runs a reduction on a block of threads for each result, or for up to 32 that lie side by side, unless CUB spreads
# it: a single result, of one contiguous input (cupy/cupy#9720). So where there are fewer blocks than this, the entries
# that make a result are cut into segments, of no fewer than that. Not tuned either.
ENOUGH_BLOCKS, LEAST_SEGMENT = 1 << 10, 1 << 11
# Longest rows in which the place of each entry is found by comparing it with all others.
LONGEST_RANKED = 1 << 10
# Threads of a block, and results side by side that it takes at most.
BLOCK, SIDE_BY_SIDE = 512, 32
# Longest side of the matrices whose SVDs cuSOLVER computes in a batch.
LARGEST_IN_BATCH = 32


class CupyBackend(Backend):
    """Overrides for CuPy."""

    takes_half = attends_in_half = True
    # Entries that are widened to double precision at once: 64 MB.
    slab = 1 << 23
    # Launches and waits are what a narrow block or a small tile would cost most. Not tuned.
    tolerance_width, n_at_once = 128, 1 << 24

    def refusal(self, x: Array) -> str | None:
        """Refuse arrays on another device than the current one, where results would come out."""
        current = cupy.cuda.Device()
        if self.device(x) == current:
            return None
        return f"must be on CuPy's current device, {current}, got {x.device}; enter `with x.device:` before the call"

    def cholesky(self, g: Array) -> Array:
        """See from its product with itself whether a factor is one: CuPy would say it, but wait for the device.

        Entry (i, j) of that product is off by at most (n + 1) eps sqrt(g_ii g_jj) for the factor and by as much for the
        product, see Higham, Accuracy and Stability of Numerical Algorithms, theorem 10.3; of complex numbers by 2^1.5
        times that.
        """
        xp, n = self.xp, g.shape[-1]
        with cupyx.errstate(linalg="ignore"):
            L = xp.linalg.cholesky(g)
        squares, pivots = (self.real_part(xp.linalg.diagonal(x)) for x in (g, L))
        sides = squares[..., :, None], squares[..., None, :], pivots[..., None, :]
        square, axes = self.matmul(L, matrix_h(L, xp)), (g.ndim - 2, g.ndim - 1)
        misfit = self._reduced("misfit", axes, square, g, *sides, join="max_part")
        return kernel("factor", g)(L, misfit, 8 * (n + 1) * float(xp.finfo(g.dtype).eps))

    def qr(self, y: Array) -> tuple[Array, Array]:
        """Cholesky-QR of a batch, of which CuPy would take the matrices one by one."""
        if math.prod(y.shape[:-2]) < 2:
            return super().qr(y)
        return tall_qr(y, self, super().qr)

    def triangular_factor(self, x: Array) -> Array:
        """Leave out the other factor, which takes as long."""
        if math.prod(x.shape[:-2]) < 2:
            return cupy.linalg.qr(x, mode="r")
        return self.qr(x)[1]

    def small_svd(self, b: Array) -> tuple[Array, Array, Array]:
        """Solve eigenvalue problems, which go in a batch, where CuPy would take the matrices one by one."""
        if math.prod(b.shape[:-2]) < 2 or max(b.shape[-2:]) <= LARGEST_IN_BATCH:
            return super().small_svd(b)
        return gram_svd(b, self, super().small_svd)

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Shrink in one pass."""
        return kernel("soft_threshold", x)(x, tau)

    def soft_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float
    ) -> Array:
        """Step and shrink in one pass: three accesses an entry instead of a dozen."""
        return kernel("soft_threshold_step", x)(x, grad, step, step * tau)

    def nonneg_threshold(self, x: Array, tau: Array | float) -> Array:
        """Subtract and cut off in one pass."""
        return kernel("nonneg_threshold", x)(x, tau)

    def elastic_threshold(self, x: Array, tau: Array | float, l2: float) -> Array:
        """Shrink and divide in one pass."""
        return kernel("elastic_threshold", x)(x, tau, 1 + tau * l2)

    def nonneg_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float
    ) -> Array:
        """Step, subtract and cut off in one pass."""
        return kernel("nonneg_threshold_step", x)(x, grad, step, step * tau)

    def elastic_threshold_step(
        self, x: Array, grad: Array, step: Array | float, tau: Array | float, l2: float
    ) -> Array:
        """Step, shrink and divide in one pass."""
        tau = step * tau
        return kernel("elastic_threshold_step", x)(x, grad, step, tau, 1 + tau * l2)

    def power_of_two(self, x: Array, exponent: Array) -> Array:
        """Add to exponents in one pass."""
        return kernel("power_of_two", x)(x, self.xp.astype(exponent, self.xp.int32))

    def extrapolate(self, x: Array, move: Array, factor: Array | float) -> Array:
        """Scale and add in one pass."""
        return kernel("extrapolate", x)(x, move, factor)

    def step_products(
        self, y: Array, slope: Array, new: Array, grad: Array, move: Array, factor: float
    ) -> list[float]:
        """All sums in one pass, in double precision, and wait for the device once."""
        xp, run = self.xp, kernel("wide_step", y)
        flat = [xp.reshape(x, (-1,)) for x in (y, slope, new, grad, move)]
        n_parts = max(1, min(ENOUGH_BLOCKS, y.size // LEAST_SEGMENT))
        end = y.size // n_parts * n_parts
        sums = xp.empty((7, n_parts + (end < y.size)), dtype=xp.float64)
        parts = [xp.reshape(x[:end], (n_parts, -1)) for x in flat]
        run(*parts, factor, *(row[:n_parts] for row in sums), axis=1)
        if end < y.size:
            run(*(x[None, end:] for x in flat), factor, *(row[n_parts:] for row in sums), axis=1)
        return [float(total) for total in self.to_numpy(xp.sum(sums, axis=1))]

    def scaled_group_norm(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """Read ``x`` twice, once for the largest modulus."""
        peak = self._reduced("max_abs", axes, x)
        unit = kernel("unit", peak)(peak)
        return unit, self._reduced("norm", axes, x, unit)

    def group_threshold(self, x: Array, tau: Array | float, axes: tuple[int, ...]) -> Array:
        """Shorten in one pass, given the norms."""
        unit, norm = self.scaled_group_norm(x, axes)
        return kernel("group_threshold", x)(x, norm, tau / unit)

    def sum_abs(self, x: Array, axis: int | tuple[int, ...] | None) -> Array:
        """Add up moduli as they are read."""
        axes = tuple(range(x.ndim))
        if axis is not None:
            axes = tuple(axes[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
        total = self._reduced("sum_abs", axes, x)
        return self.xp.reshape(total, tuple(n for a, n in enumerate(x.shape) if a not in axes))

    def _reduced(
        self, name: str, axes: tuple[int, ...], x: Array, *others: Array, join: str | None = None
    ) -> Array:
        """Reduce along ``axes``, which are kept; in two steps where one would leave most of the device idle.

        What came of parts is combined by the kernel ``join``, or this one with ones in the place of ``others``.
        """
        run, n_parts = kernel(name, x), _parts(x, axes)
        if n_parts < 2:
            return run(x, *others, axis=axes, keepdims=True)
        axis = max(axes, key=lambda a: x.shape[a])
        step = x.shape[axis] // n_parts
        end = n_parts * step
        inner = (*(a + (a > axis) for a in axes if a != axis), axis + 1)
        parts = run(*(_split(a, axis, end, step) for a in (x, *others)), axis=inner, keepdims=True)
        parts = self.xp.squeeze(parts, axis=axis + 1)
        if end < x.shape[axis]:
            rest = run(*(_from(a, axis, end) for a in (x, *others)), axis=axes, keepdims=True)
            parts = self.xp.concat([parts, rest], axis=axis)
        if join is not None:
            return kernel(join, parts)(parts, axis=axes, keepdims=True)
        return kernel(name, parts)(parts, *(1.0 for _ in others), axis=axes, keepdims=True)

    # Large matrices: read as they are, whatever dtype sums are in

    def gram(self, x: Array, y: Array | None = None) -> Array:
        """Widen a slab at a time."""
        return self.gram_by_slabs(x, y)

    def norm_squared(self, x: Array) -> Array:
        """Widen as ``x`` is read."""
        axes = (x.ndim - 2, x.ndim - 1)
        return self._reduced("wide_squares", axes, x, join="sum_abs")[..., 0, 0]

    def max_abs(self, x: Array) -> Array:
        """Compare as ``x`` is read."""
        return self._reduced("max_part", (x.ndim - 2, x.ndim - 1), x)[..., 0, 0]

    def column_means(self, x: Array) -> Array:
        """Widen as ``x`` is read."""
        return self._reduced("wide_sum", (x.ndim - 2,), x) / x.shape[-2]

    def centered(self, x: Array, mean: Array) -> Array:
        """Subtract in the wide dtype, and round once."""
        return kernel("wide_centered", x)(x, mean)

    def pivots(self, x: Array) -> Array:
        """Read ``x`` twice: for the largest moduli, and for the first row of those that tie."""
        xp, axes = self.xp, (x.ndim - 2,)
        peak = self._reduced("max_abs", axes, x)
        near = float(xp.finfo(peak.dtype).eps) ** 0.5
        n_rows = x.shape[-2]
        rows = xp.reshape(xp.arange(n_rows, dtype=xp.int32), (1,) * (x.ndim - 2) + (n_rows, 1))
        first = self._reduced("first", axes, x, rows, (1 - near) * peak, join="least")
        # Beside NaN there is none.
        first = xp.minimum(first, n_rows - 1)
        return xp.take_along_axis(x, first, axis=-2)[..., 0, :]

    def lifted(self, g: Array, shift: Array | float) -> Array:
        """Add where row and column are the same."""
        shift = shift if isinstance(shift, float) else self.real_part(shift)
        return kernel("lifted", g)(g, shift, g.shape[-1])

    def phases(self, x: Array) -> Array:
        """Divide in one pass."""
        return kernel("phase", x)(x, float(self.xp.finfo(x.dtype).smallest_normal))

    def unit_gram(self, gram: Array, least: float) -> tuple[Array, Array]:
        """Scale in one pass."""
        squares = self.real_part(self.xp.linalg.diagonal(gram))
        norms = kernel("column_norm", squares)(squares, least)
        unit = kernel("unit_gram", gram)(gram, norms[..., :, None], norms[..., None, :])
        return unit, self.xp.astype(norms, gram.dtype, copy=False)

    # Sparse rows

    def keep_largest(self, x: Array, k: int) -> Array:
        """Rank each entry in its row; of long rows, where that takes too long, sort."""
        n = x.shape[-1]
        if n > LONGEST_RANKED or k == 0 or 0 in x.shape:
            return super().keep_largest(x, k)
        return kernel("keep_largest", x)(x, x, n, k)

    def largest_in_rows(self, x: Array, k: int) -> tuple[Array, Array]:
        """Rank each entry in its row, then write those that are kept."""
        xp, n = self.xp, x.shape[-1]
        if n > LONGEST_RANKED or not 0 < k <= n or 0 in x.shape:
            return super().largest_in_rows(x, k)
        kept = kernel("mark_largest", x)(x, x, n, k)
        values = xp.empty((*x.shape[:-1], k), dtype=x.dtype)
        columns = xp.empty(values.shape, dtype=xp.int32)
        kernel("gather", x)(kept, x, n, k, values, columns)
        return values, xp.astype(columns, index_dtype(xp, n), copy=False)

    def scatter_rows(self, values: Array, indices: Array, n: int) -> Array:
        """Write entries where they belong."""
        *lead, k = values.shape
        dense = self.xp.zeros((*lead, n), dtype=values.dtype)
        if values.size:
            columns = self.xp.astype(indices, self.xp.int64, copy=False)
            kernel("scatter", values)(values, columns, n, k, dense)
        return dense

    # Attention: products by cuBLAS, and kernels for all that lies between

    def tile_shape(self, n_matrices: int, lengths: tuple[int, int], like: Array) -> tuple[int, int]:
        """Fill the device with each launch, in memory that does not grow with the lengths."""
        # Scores of half precision are in single.
        area = max(1, TILE_BYTES // (max(1, n_matrices) * max(4, like.dtype.itemsize)))
        side = math.isqrt(area)
        height = min(max(1, lengths[0]), 1 << (side.bit_length() - 1))
        width = min(max(1, lengths[1]), area // height)
        # What short keys leave of the room goes to more queries.
        return max(height, min(lengths[0], area // width)), width

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply operands as they lie in memory."""
        return product(a, b)

    def tile_rows(self, x: Array, rows: slice) -> Array:
        """Bring rows of heads that share keys together, to be rows of one matrix."""
        part = x[..., rows, :]
        return part.copy("C") if part.ndim > 2 and part.shape[-3] > 1 else part

    def sum_over_rows(self, a: Array, b: Array, shape: tuple[int, ...]) -> Array:
        """Sum over heads that share keys as over rows, in one product."""
        xp = self.xp
        if a.ndim > 2 and len(shape) > 2 and shape[-3] == 1 < a.shape[-3]:
            lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            if lead == a.shape[:-2] == b.shape[:-2]:
                a, b = (xp.reshape(x, (*lead[:-1], 1, -1, x.shape[-1])) for x in (a, b))
        return super().sum_over_rows(a, b, shape)

    def _attention_rows(
        self, q: Array, k: Array, v: Array, mask: Array | None, tiling: Tiling, queries: slice
    ) -> tuple[Array, Array]:
        """Start from the first tile rather than from nothing, and end in two kernels."""
        scale = tiling.options.scale
        if q.dtype == self.xp.float16:
            # Rounded once more, queries would lose half a digit, and large ones leave the range.
            q_rows, factor = self.tile_rows(q, queries), scale
        else:
            q_rows, factor = q[..., queries, :] * scale, 1.0
        shape = (*scores_batch_shape(q, k, v, mask), q_rows.shape[-2])
        state = None
        for tile in tiling.seen_row(queries):
            keys = slice(tile.left, tile.right)
            products = product(q_rows, self.xp.matrix_transpose(k[..., keys, :]), factor)
            scores = self.tile_scores(products, tiling.bounds(mask, tile))
            if scores.shape[:-1] != shape:
                # Values have an axis of the batch that scores have not.
                scores = self.xp.broadcast_to(scores, (*shape, scores.shape[-1]))
            if state is None:
                state = self._first_step(scores, v[..., keys, :])
            else:
                state = self.softmax_step(state, scores, v[..., keys, :])
        if state is None:
            return super()._attention_rows(q, k, v, mask, tiling, queries)
        out, lse = self.softmax_result(state)
        return self.xp.astype(out, q.dtype, copy=False), lse

    def _first_step(self, scores: Array, v: Array) -> SoftmaxState:
        peak, total = self._row_sums(scores)
        weights = kernel("weights", v)(scores, peak[..., None])
        return SoftmaxState(peak, total, self.matmul(weights, v))

    def _row_sums(self, scores: Array) -> tuple[Array, Array]:
        """Largest score of each row, and its sum of exponentials; of few long rows by segments."""
        xp = self.xp
        *lead, width = scores.shape
        peak = xp.empty(tuple(lead), dtype=scores.dtype)
        total = xp.empty_like(peak)
        n_parts = min(ENOUGH_BLOCKS // max(1, math.prod(lead)), width // LEAST_SEGMENT)
        if n_parts < 2:
            kernel("row_sums", scores)(scores, peak, total, axis=-1)
            return peak, total
        length = width // n_parts
        end = n_parts * length
        has_rest = end < width
        peaks = xp.empty((*lead, n_parts + has_rest), dtype=scores.dtype)
        totals = xp.empty_like(peaks)
        parts = xp.reshape(scores[..., :end], (*lead, n_parts, length))
        kernel("row_sums", scores)(parts, peaks[..., :n_parts], totals[..., :n_parts], axis=-1)
        if has_rest:
            rest = peaks[..., n_parts], totals[..., n_parts]
            kernel("row_sums", scores)(scores[..., end:], *rest, axis=-1)
        kernel("row_joins", scores)(peaks, totals, peak, total, axis=-1)
        return peak, total

    def tile_scores(self, products: Array, bounds: TileBounds) -> Array:
        """Softcap, mask and causal bound in one pass, or none where there is nothing to do."""
        options = bounds.options
        is_plain = bounds.mask is None and options.softcap is None and options.alibi is None
        if is_plain and not bounds.is_cut:
            return products
        if bounds.tile.is_left_of(options.first):  # the kernels know no left end of a window
            return super().tile_scores(products, bounds)
        prefix, arguments = self._bounds(products, bounds)
        return kernel(f"{prefix}scores", products)(products, *arguments)

    def softmax_step(self, state: SoftmaxState, scores: Array, v: Array) -> SoftmaxState:
        """Read the scores once for maxima and sums, once to exponentiate; rescale and add in one pass."""
        tile_peak, tile_total = self._row_sums(scores)
        peak, total, decay = kernel("join", scores)(state.peak, state.total, tile_peak, tile_total)
        weights = kernel("weights", v)(scores, peak[..., None])
        part = self.matmul(weights, v)
        return SoftmaxState(
            peak, total, kernel("rescale", scores)(state.out, decay[..., None], part)
        )

    def softmax_result(self, state: SoftmaxState) -> tuple[Array, Array]:
        """Divide and take the logarithm in a pass each."""
        out = kernel("mean", state.out)(state.out, state.total[..., None])
        return out, kernel("log_sum", state.peak)(state.peak, state.total)

    def tile_gradients(
        self, products: Array, grad_weights: Array, bounds: TileBounds, lse: Array, delta: Array
    ) -> tuple[Array, Array]:
        """Weights and gradient in one pass over the two products."""
        if bounds.tile.is_left_of(bounds.options.first):
            return super().tile_gradients(products, grad_weights, bounds, lse, delta)
        prefix, arguments = self._bounds(products, bounds)
        weights, gradient = kernel(f"{prefix}gradients", products)(
            products, grad_weights, *arguments, lse, delta
        )
        return weights, gradient

    def _bounds(
        self, products: Array, bounds: TileBounds
    ) -> tuple[str, tuple[Any, Any, Any, float]]:
        """Prefix of a kernel's name, and what it is told: mask, column, last column of the row, softcap."""
        xp = self.xp
        _, options, tile, diagonal = bounds
        prefix, column, limit = "", 0, 0
        part = bounds.additive(xp, products.dtype, None)
        if options.is_causal and tile.crosses(diagonal):
            column = xp.arange(tile.left, tile.right, dtype=xp.int32)
            limit = xp.arange(tile.top + diagonal, tile.bottom + diagonal, dtype=xp.int32)[:, None]
        if part is None:
            part = True
        elif not xp.isdtype(part.dtype, "bool"):
            prefix, part = "biased_", xp.astype(part, products.dtype)
        return prefix, (part, column, limit, options.softcap or 0.0)

    def unpack_blocks(self, heap: Array, widths: np.ndarray[Any, Any], dtype: Any) -> Array:
        """Read the planes of each integer where they are, straight into the result."""
        xp, (n_blocks, n_heads, d) = self.xp, widths.shape
        if not widths.size:
            return super().unpack_blocks(heap, widths, dtype)
        narrow = np.where(widths < WHOLE, widths, 0)
        width = self.from_numpy(narrow[:, None, :, :], heap, xp.int32)
        starts = PLANE * (np.cumsum(narrow, dtype=np.int64).reshape(widths.shape) - narrow)
        start = self.from_numpy(starts[:, None, :, :], heap, xp.int64)
        token = xp.arange(TOKENS, dtype=xp.int32)[:, None, None]
        out = KERNELS["unpack", np.dtype(dtype).name](heap, width, start, token)
        out = xp.permute_dims(out, (2, 0, 1, 3))
        return xp.reshape(out, (n_heads, n_blocks * TOKENS, d))

    def unpack_tokens(
        self, heap: Array, starts: Array, widths: Array, tokens: Array, dtype: Any
    ) -> Array:
        """Gather and decode in one kernel, that of whole blocks."""
        xp = self.xp
        if not widths.size:
            return super().unpack_tokens(heap, starts, widths, tokens, dtype)
        width = xp.where(widths < WHOLE, widths, 0).astype(xp.int32)
        start = PLANE * (starts[:, None] + xp.cumsum(width, axis=-1, dtype=xp.int64) - width)
        token = tokens.astype(xp.int32)[:, None]
        return KERNELS["unpack", np.dtype(dtype).name](heap, width, start, token)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Fetch the values from the device."""
        values: np.ndarray[Any, Any] = cupy.asnumpy(x)
        return values


def _parts(x: Array, axes: tuple[int, ...]) -> int:
    """In how many parts to cut the longest of ``axes``, for a reduction along them to fill the device."""
    kept = [a for a in range(x.ndim) if a not in axes]
    n_results, length = (math.prod(x.shape[a] for a in which) for which in (kept, axes))
    if n_results == 0 or length < 2 * LEAST_SEGMENT:
        return 1
    run = 1
    for axis in reversed(kept):
        if x.strides[axis] != run * x.itemsize or run >= SIDE_BY_SIDE:
            break
        run *= x.shape[axis]
    together = max(min(run, SIDE_BY_SIDE), BLOCK // length)
    n_blocks = -(-n_results // together)
    longest = max(x.shape[a] for a in axes)
    return int(min(-(-ENOUGH_BLOCKS // n_blocks), length // LEAST_SEGMENT, longest))


def _split(x: Array, axis: int, end: int, step: int) -> Array:
    """Part of an axis up to ``end`` as two, the second of length ``step``; both of length 1 where that was one."""
    shape = x.shape
    if shape[axis] > 1:
        x = x[(slice(None),) * axis + (slice(end),)]
    pair = (1, 1) if shape[axis] == 1 else (end // step, step)
    return x.reshape(*shape[:axis], *pair, *shape[axis + 1 :])


def _from(x: Array, axis: int, start: int) -> Array:
    """Rest of an axis, unless that has length 1."""
    return x if x.shape[axis] == 1 else x[(slice(None),) * axis + (slice(start, None),)]
