"""CuPy: kernels that read and write each array once.

Needs: cupy (extra ``cupy``) and, to allocate anything, a CUDA device.
"""

import math
from collections.abc import Sequence
from typing import Any

import cupy
import cupyx
import numpy as np

from slra._backends.cholesky_qr import tall_qr
from slra._backends.cupy_kernels import DEFINITIONS, KERNELS, kernel
from slra._backends.cupy_products import product
from slra._backends.cupy_select import MOST_ENTRIES, largest
from slra._backends.elements import redo
from slra._backends.gram_svd import gram_svd
from slra._backends.standard import Backend, matrix_h
from slra._backends.standard.attention import (
    ScoreOptions,
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
# Longest sides of a tile that there must be room for: else, some matrices of the batch are taken at a time. Not tuned.
LEAST_SIDE = 64
# CuPy runs a reduction on a block of threads for each result, or for up to 32 that lie side by side, unless CUB spreads
# it: a single result, of one contiguous input (cupy/cupy#9720). So where there are fewer blocks than this, the entries
# that make a result are cut into segments, of no fewer than that. Not tuned either.
ENOUGH_BLOCKS, LEAST_SEGMENT = 1 << 10, 1 << 11
# Longest rows in which the place of each entry is found by comparing it with all others.
LONGEST_RANKED = 1 << 10
# Threads of a block, and results side by side that it takes at most.
BLOCK, SIDE_BY_SIDE = 512, 32
# Products that a smaller scale brings back into the range of their dtype might leave it first.
LEAST_FACTOR = 2.0**-10
# Up to so many rows of a matrix are multiplied by threads that add up a product each, which saves launches.
FEW_ROWS = 16
# Longest side of the matrices whose SVDs cuSOLVER computes in a batch, and for which its batched eigenvalue solver, a
# block of threads for each matrix, is made.
LARGEST_IN_BATCH = 32
# Entries of larger matrices for each that there is in a batch, up to which they are solved together. Not tuned: of 16
# matrices of 48 x 48 it took half as long as one by one (NVIDIA/cudaq-algorithms#18), and its time grows with n^3.
JACOBI_AREA = 1 << 8
# Rows to a column from which on Cholesky-QR is taken of a single matrix. Not tuned.
TALL = 4


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
        """Cholesky-QR of batches, of which CuPy would take the matrices one by one, and of tall matrices."""
        if not _by_products(y):
            return super().qr(y)
        return tall_qr(y, self, super().qr)

    def triangular_factor(self, x: Array) -> Array:
        """Leave out the other factor, which takes as long, where cuSOLVER is asked."""
        if not _by_products(x):
            return cupy.linalg.qr(x, mode="r")
        return self.qr(x)[1]

    def small_svd(self, b: Array) -> tuple[Array, Array, Array]:
        """Solve eigenvalue problems: those of a batch go together, and cuSOLVER's SVD takes many times as long."""
        if max(b.shape[-2:]) <= LARGEST_IN_BATCH or 0 in b.shape:
            return super().small_svd(b)
        return gram_svd(b, self, super().small_svd)

    def small_eigh(self, g: Array) -> tuple[Array, Array]:
        """Take matrices of a batch together by Jacobi's method where there are enough of them, and look at the result.

        What CuPy 14.2 binds are cuSOLVER's ``syevjBatched``, which it takes for every batch, even of one matrix, and
        ``Xsyevd`` for a matrix by itself (not ``XsyevBatched``). Whether Jacobi's method has converged CuPy does not
        ask by default, and eigenvectors that are not orthonormal have been reported (pytorch#192483).
        """
        n_matrices, n = math.prod(g.shape[:-2]), g.shape[-1]
        if g.ndim == 2 or not g.size:
            return super().small_eigh(g)
        if n_matrices == 1 or (n > LARGEST_IN_BATCH and n * n > JACOBI_AREA * n_matrices):
            return self._eigh_each(g)
        xp, (w, V) = self.xp, super().small_eigh(g)
        overlaps = self.matmul(matrix_h(V, xp), V)
        one = xp.broadcast_to(xp.eye(n, dtype=g.dtype), g.shape), xp.ones_like(w)[..., None, :]
        eps, largest = 16 * n * float(xp.finfo(g.dtype).eps), xp.max(xp.abs(w), axis=-1)
        ok = (self._misfit(self.matmul(g, V), V, w[..., None, :]) <= eps * largest) & (
            self._misfit(overlaps, *one) <= eps
        )
        w, V = redo(ok, (w, V), self._eigh_each, (g,), self)
        return w, V

    def _misfit(self, product: Array, vectors: Array, values: Array) -> Array:
        """Largest difference between a product and vectors times values, for each matrix."""
        axes = (product.ndim - 2, product.ndim - 1)
        off = self._reduced("eigen_misfit", axes, product, vectors, values, join="max_part")
        return off[..., 0, 0]

    def _eigh_each(self, g: Array) -> tuple[Array, Array]:
        """Take one matrix after the other, by divide and conquer."""
        xp, n = self.xp, g.shape[-1]
        each = xp.reshape(g, (-1, n, n))
        found = [super(CupyBackend, self).small_eigh(each[i, ...]) for i in range(len(each))]
        w, V = (xp.stack(x) if len(x) > 1 else x[0] for x in zip(*found, strict=True))
        return xp.reshape(w, g.shape[:-1]), xp.reshape(V, g.shape)

    def small_eigvalsh(self, g: Array) -> Array:
        """Take the vectors too, where they are what shows that the values are right."""
        return super().small_eigvalsh(g) if g.ndim == 2 else self.small_eigh(g)[0]

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

    # Random numbers

    def is_own_generator(self, rng: Any) -> bool:
        """Draw by CuPy's generators."""
        return isinstance(rng, cupy.random.Generator)

    def test_matrix(self, shape: tuple[int, ...], rng: Any, like: Array) -> Array:
        """Draw on the device, if that is what was given, in the precision that is asked for."""
        if not self.is_own_generator(rng):
            return super().test_matrix(shape, rng, like)
        real = self.real_dtype(like.dtype)
        if not self.is_complex(like):
            return rng.standard_normal(shape, dtype=real)
        parts = rng.standard_normal((*shape, 2), dtype=real)
        return (parts * 0.5**0.5).view(like.dtype)[..., 0]

    # Sparse rows

    def keep_largest(self, x: Array, k: int) -> Array:
        """Rank each entry in its row; of long rows, where that takes too long, write those that are kept."""
        n = x.shape[-1]
        if n > LONGEST_RANKED or k == 0 or 0 in x.shape:
            return super().keep_largest(x, k)
        return kernel("keep_largest", x)(x, x, n, k)

    def largest_in_rows(self, x: Array, k: int) -> tuple[Array, Array]:
        """Rank each entry in its row, or count the digits of long ones, then write those that are kept."""
        xp, n = self.xp, x.shape[-1]
        if not 0 < k <= n or 0 in x.shape or x.size > MOST_ENTRIES:
            return super().largest_in_rows(x, k)
        if n > LONGEST_RANKED:
            lead = x.shape[:-1]
            found, columns = largest(xp.reshape(x, (-1, n)), k)
            columns = xp.astype(columns, index_dtype(xp, n), copy=False)
            return xp.reshape(found, (*lead, k)), xp.reshape(columns, (*lead, k))
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

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Take some matrices of a batch at a time where there is no room for a tile of all of them."""
        cut = _cut(scores_batch_shape(q, k, v, mask), q, k)
        if cut is None:
            return super().attention(q, k, v, mask, options)
        axis, parts = cut
        found = []
        for part in parts:
            *given, mask_part, alibi = (
                _part(x, axis - 2, part) for x in (q, k, v, mask, options.alibi)
            )
            one = options._replace(alibi=alibi)
            found.append(self.attention(given[0], given[1], given[2], mask_part, one))
        outs, lses = zip(*found, strict=True)
        return self.xp.concat(outs, axis=axis - 2), self.xp.concat(lses, axis=axis - 1)

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
        """Take some matrices of a batch at a time, as `attention` does."""
        cut = _cut(scores_batch_shape(q, k, v, mask), q, k)
        if cut is None:
            return super().attention_vjp(q, k, v, mask, options, lse, delta, grad_out)
        axis, parts = cut
        found = []
        for part in parts:
            *given, mask_part, alibi = (
                _part(x, axis - 2, part) for x in (q, k, v, mask, options.alibi)
            )
            one = options._replace(alibi=alibi)
            sums = [_part(x, axis - 1, part) for x in (lse, delta)]
            grad = _part(grad_out, axis - 2, part)
            found.append(
                self.attention_vjp(
                    given[0], given[1], given[2], mask_part, one, sums[0], sums[1], grad
                )
            )
        dq, dk, dv = (
            self.xp.concat(grads, axis=axis - 2) if _has(x, axis - 2) else sum(grads)
            for x, grads in zip((q, k, v), zip(*found, strict=True), strict=True)
        )
        return dq, dk, dv

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply operands as they lie in memory."""
        return product(a, b)

    def tile_rows(self, x: Array, rows: slice) -> Array:
        """Bring rows of heads that share keys together, to be rows of one matrix."""
        part = x[..., rows, :]
        is_group = part.ndim > 2 and part.shape[-3] > 1
        return part.copy("C") if is_group and not part.flags.c_contiguous else part

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
        """Start from the first tile rather than from nothing, and end in one kernel."""
        state = self._softmax_state(q, k, v, mask, tiling, queries)
        if state is None:
            return super()._attention_rows(q, k, v, mask, tiling, queries)
        out, lse = self.softmax_result(state)
        return self.xp.astype(out, q.dtype, copy=False), lse

    def _softmax_state(
        self, q: Array, k: Array, v: Array, mask: Array | None, tiling: Tiling, queries: slice
    ) -> SoftmaxState | None:
        """Online softmax of these queries over all keys that they see; None if there are none."""
        scale = tiling.options.scale
        is_plain = isinstance(scale, float) and abs(scale) >= LEAST_FACTOR
        if q.dtype == self.xp.float16 or is_plain:
            # Rounded once more, half precision would lose half a digit, and large queries leave its range.
            is_shared = k.ndim > 2 and k.shape[-3] == 1
            q_rows = self.tile_rows(q, queries) if is_shared else q[..., queries, :]
            factor = scale
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
        return state

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
        """Divide, bring back, shift and take the logarithm in one kernel, where rows are few."""
        tiling = self._tiling(q, k, v, mask, options)
        given = (q, k, v, back, mean, q if shift is None else shift)
        is_one = len({x.dtype for x in given}) == 1 and len(back) == len(mean)
        state = None
        if is_one and q.shape[-2] <= FEW_ROWS and len(tiling.rows()) == 1 and back.size:
            state = self._softmax_state(q, k, v, mask, tiling, tiling.rows()[0])
        if state is None:
            return super().attention_through(q, k, v, mask, options, back, mean, shift)
        (depth, width), n_rows = back.shape[-2:], q.shape[-2]
        out, lse = self._empty((*state.peak.shape, width), q), self.xp.empty_like(state.peak)
        kernel("through", q)(
            state.out, state.peak, state.total, back, mean, state.peak if shift is None else shift,
            options.scale, shift is not None, depth, width, n_rows, math.prod(back.shape[:2]), out, lse,
        )  # fmt: skip
        return out, lse

    def mapped_queries(self, q: Array, wq: Array, c: Array) -> tuple[Array, Array]:
        """Take both products in one kernel, where rows are few."""
        n_heads, n_shared, depth, width = wq.shape[-4:]
        n_rows = q.shape[1] // n_heads * q.shape[2]
        is_same = q.dtype == wq.dtype == c.dtype and len(wq) == len(c)
        if not is_same or not 0 < n_rows <= FEW_ROWS or not wq.size:
            return super().mapped_queries(q, wq, c)
        lead = (q.shape[0], n_heads, n_rows)
        mapped, shift = self._empty((*lead, width), q), self._empty((*lead, 1), q)
        n_maps = wq.shape[0] * n_heads
        kernel("mapped_queries", q)(q, wq, c, depth, width, n_rows, n_maps, n_shared, mapped, shift)
        return mapped, shift

    def merged(self, outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
        """Join two parts by one kernel, and others to them one by one."""
        xp = self.xp
        if len({x.dtype for x in (*outs, *lses)}) > 1 or len(outs) == 1 or not outs[0].size:
            return super().merged(outs, lses)
        (out, *outs), (lse, *lses) = outs, lses
        for other, other_lse in zip(outs, lses, strict=True):
            new, new_lse = (
                xp.empty(out.shape, dtype=out.dtype),
                xp.empty(lse.shape, dtype=lse.dtype),
            )
            arguments = out, lse[..., None], other, other_lse[..., None], out.shape[-1]
            kernel("merged", out)(*arguments, new, new_lse)
            out, lse = new, new_lse
        return out, lse

    def _empty(self, shape: tuple[int, ...], like: Array) -> Array:
        return self.xp.empty(shape, dtype=like.dtype)

    # Rows of a cache

    def put_mapped(
        self, buffer: Array, rows: Array, shift: Array, w: Array, places: Array
    ) -> Array:
        """Project and round in one kernel, where rows are few, and write to where they belong."""
        dtypes, name = DEFINITIONS["put_mapped"].dtypes, rows.dtype.name
        is_known = dtypes.get(buffer.dtype.name) == name == shift.dtype.name == w.dtype.name
        n_rows, (depth, width) = rows.shape[-2], w.shape[-2:]
        if not is_known or len(w) != len(shift) or not 0 < n_rows <= FEW_ROWS or not w.size:
            return super().put_mapped(buffer, rows, shift, w, places)
        target = _one_run(buffer, places)
        mapped = self._empty((*rows.shape[:-1], width), buffer) if target is None else target
        n_maps = math.prod(w.shape[:2])
        kernel("put_mapped", buffer)(rows, shift, w, depth, width, n_rows, n_maps, mapped)
        return buffer if target is not None else self.put_rows(buffer, mapped, places)

    def put_both(
        self, buffers: tuple[Array, Array], rows: tuple[Array, Array], places: Array
    ) -> tuple[Array, Array]:
        """Write both by one kernel, where they are of one shape."""
        dtypes, (first, second) = DEFINITIONS["copy_both"].dtypes, (x.dtype.name for x in rows)
        targets = [_one_run(x, places) for x in buffers]
        is_known = all(dtypes.get(x.dtype.name) == first == second for x in buffers)
        is_same = rows[0].shape == rows[1].shape and buffers[0].dtype == buffers[1].dtype
        if any(x is None for x in targets) or not is_known or not is_same:
            return super().put_both(buffers, rows, places)
        kernel("copy_both", buffers[0])(*rows, *targets)
        return buffers

    def put_rows(self, buffer: Array, rows: Array, places: Array) -> Array:
        """Write rows to places that differ in the elements of the batch by one kernel."""
        is_known = buffer.dtype.name in DEFINITIONS["put_rows"].dtypes and buffer.flags.c_contiguous
        if np.all(places == places[:1]) or not is_known or not rows.size:
            return super().put_rows(buffer, rows, places)
        rows = self.xp.astype(rows, buffer.dtype, copy=False)
        at = self.from_numpy(np.asarray(places)[:, None, :, None], buffer, self.xp.int64)
        sizes = buffer.shape[-1], rows.shape[-2], buffer.shape[-2]
        kernel("put_rows", buffer)(rows, at, *sizes, buffer)
        return buffer

    def rotated(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate in one kernel, where axes are those of a cache: (B, H, n, d), by tables (1 or B, 1, n, F)."""
        if x.ndim != 4 or cos.ndim != 4 or not x.dtype == cos.dtype == sin.dtype or not x.size:
            return super().rotated(x, cos, sin)
        _, n_heads, n_rows, width = x.shape
        y = self._empty(x.shape, x)
        sizes = cos.shape[-1], width, n_rows, n_heads, cos.shape[0]
        kernel("rotated", x)(x, cos, sin, *sizes, y)
        return y

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
        """Divide, and take the logarithm, in one pass."""
        width = state.out.shape[-1]
        if not width:
            return super().softmax_result(state)
        out, lse = (
            self._empty(state.out.shape, state.out),
            self._empty(state.peak.shape, state.peak),
        )
        sums = state.peak[..., None], state.total[..., None]
        kernel("softmax_result", out)(state.out, *sums, width, out, lse)
        return out, lse

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

    def chosen_tokens(
        self,
        heap: Array,
        whole: Array,
        index: tuple[Array, Array, Array, Array],
        at: Array,
        d: int,
        dtype: Any,
    ) -> Array:
        """Gather, decode and subtract in one kernel: a thread for each number."""
        xp, (codes, exponents, pairs, starts) = self.xp, index
        if not at.size or not heap.size:
            return super().chosen_tokens(heap, whole, index, at, d, dtype)
        sizes = (*pairs.shape[2:], *codes.shape[2:], at.shape[1], heap.shape[2], whole.shape[2])
        held = heap, pairs, starts, whole.astype(dtype, copy=False), codes, exponents
        if not whole.size:
            held = (*held[:3], xp.zeros((1,), dtype=dtype), *held[4:])
        row = xp.arange(at.shape[0] * at.shape[1], dtype=xp.int64).reshape(*at.shape[:2], 1, 1)
        column = xp.arange(d, dtype=xp.int32)
        kernel = KERNELS["chosen_tokens", np.dtype(dtype).name]
        return kernel(*held, row, at[..., None].astype(xp.int64, copy=False), column, *sizes)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Fetch the values from the device."""
        values: np.ndarray[Any, Any] = cupy.asnumpy(x)
        return values


def _cut(lead: tuple[int, ...], q: Array, k: Array) -> tuple[int, list[slice]] | None:
    """Where to cut a batch for attention: an axis, counted from the last, and parts of it; None where there is room."""
    lengths = (min(q.shape[-2], LEAST_SIDE), min(k.shape[-2], LEAST_SIDE))
    n_at_once = max(1, TILE_BYTES // max(4, q.dtype.itemsize) // max(1, math.prod(lengths)))
    n_matrices = math.prod(lead)
    if n_matrices <= n_at_once:
        return None
    longest = max(lead)
    step = max(1, longest * n_at_once // n_matrices)
    axis = lead.index(longest) - len(lead)
    return axis, [slice(i, min(i + step, longest)) for i in range(0, longest, step)]


def _has(x: Array, axis: int) -> bool:
    """Whether an array has more than one element along an axis, counted from the last."""
    return bool(x.ndim >= -axis and x.shape[axis] > 1)


def _part(x: Array | None, axis: int, part: slice) -> Array | None:
    """Part of an axis, unless the array is broadcast along it."""
    if x is None or not _has(x, axis):
        return x
    return x[(..., part) + (slice(None),) * (-1 - axis)]


def _by_products(y: Array) -> bool:
    """Whether QR is made of products rather than by cuSOLVER."""
    is_batch = math.prod(y.shape[:-2]) > 1
    return 0 not in y.shape and (is_batch or y.shape[-2] >= TALL * y.shape[-1])


def _one_run(buffer: Array, places: np.ndarray[Any, Any]) -> Array | None:
    """Part of a buffer (B, H, n, d) that rows at these places are, where they follow each other; None elsewhere."""
    if not places.size:
        return None
    first = int(places[0, 0])
    ascending = np.arange(first, first + places.shape[1])
    if first < 0 or not np.all(places == ascending):
        return None
    return buffer[:, :, first : first + places.shape[1], :]


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
