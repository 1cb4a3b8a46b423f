"""NumPy: results written in place.

Needs: numpy, scipy. Reads its input only, which may be read-only.
"""

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from slra._backends import numpy_attention, numpy_bits
from slra._backends.blas_threads import workers
from slra._backends.numpy_attention import at
from slra._backends.numpy_decode import (
    FEW_QUERIES,
    FEW_SCORES,
    few_queries_attention,
    few_scores_attention,
)
from slra._backends.standard import Backend, ScoreOptions
from slra._backends.standard.attention import broadcast_shapes
from slra._backends.standard.elementwise import FloatFormat
from slra._backends.standard.sparse import index_dtype
from slra._typing import Array, DType

__all__ = ["NumpyBackend"]

# Two blocks of this size, one read and one written, stay in a second-level cache of 1 MB.
BLOCK_BYTES = 1 << 19
# Scores of heads that go together: as many bytes, in single precision.
CACHED_SCORES = BLOCK_BYTES // 4
# Arrays for which the time of a call decides.
SMALL_BYTES = 1 << 16


class NumpyBackend(Backend):
    """Overrides for NumPy."""

    takes_every_ndarray = True

    def refusal(self, x: Array) -> str | None:
        """Refuse masked arrays: their arithmetic is not an array's."""
        if isinstance(x, np.ma.MaskedArray):
            return (
                "must be a dense array, got a masked array, whose mask would be lost; fill it first"
            )
        return None

    def device(self, x: Array) -> Any:
        """There is one."""
        return None

    def is_complex(self, x: Array) -> bool:
        """Look at the kind: a call of ``isdtype`` takes as long as a product of small matrices."""
        return bool(x.dtype.kind == "c")

    def float_format(self, dtype: DType) -> FloatFormat | None:
        """Look at the kind, for the same reason."""
        if dtype.kind == "f":
            return FloatFormat(False, 8 * dtype.itemsize)
        if dtype.kind == "c":
            return FloatFormat(True, 4 * dtype.itemsize)
        # Of ml_dtypes, which is not among NumPy's kinds.
        return FloatFormat(False, 16) if dtype.name == "bfloat16" else super().float_format(dtype)

    def same_bits(self) -> contextlib.AbstractContextManager[Any]:
        """Limit BLAS as attention does, all the time: elsewhere it would be limited only while others attend."""
        return workers()

    def gram(self, x: Array, y: Array | None = None) -> Array:
        """Widen a slab at a time, which stays in the cache."""
        return self.gram_by_slabs(x, y)

    def centered(self, x: Array, mean: Array) -> Array:
        """Subtract the rest of the mean in place."""
        near = mean.astype(x.dtype)
        out = x - near
        if mean.dtype != x.dtype:
            out -= (mean - near).astype(x.dtype)
        return out

    def max_abs(self, x: Array) -> Array:
        """Take extremes, not moduli, of slabs that stay in the cache: nothing as large as ``x`` is allocated."""
        n_bytes = x.nbytes if x.ndim == 2 else 0
        step = max(1, BLOCK_BYTES * x.shape[-2] // n_bytes) if n_bytes else max(1, x.shape[-2])
        slabs = [x[..., i : i + step, :] for i in range(0, x.shape[-2], step)]
        if self.is_complex(x):
            slabs = [part for slab in slabs for part in (slab.real, slab.imag)]
        extremes = [f(slab, axis=(-2, -1)) for slab in slabs for f in (np.max, np.min)]
        return np.max(np.abs(extremes), axis=0)

    def pivots(self, x: Array) -> Array:
        """Read ``x`` once, slab by slab, and then of each column the slab that has the entry."""
        step = BLOCK_BYTES // max(1, x.itemsize * x.shape[-1])
        if x.ndim != 2 or x.shape[0] <= step or step == 0:
            return super().pivots(x)
        slabs = range(0, x.shape[0], step)
        largest = np.stack([np.max(np.abs(x[top : top + step]), axis=0) for top in slabs])
        near = float(np.finfo(largest.dtype).eps) ** 0.5
        first = np.argmax(largest >= (1 - near) * np.max(largest, axis=0), axis=0)
        out = np.empty_like(x, shape=x.shape[1])
        for j, slab in enumerate(first):
            column = x[slab * step : (slab + 1) * step, j]
            size = np.abs(column)
            out[j] = column[np.argmax(size >= (1 - near) * np.max(largest[:, j]))]
        return out

    def soft_threshold(self, x: Array, tau: Array | float) -> Array:
        """Clip and subtract, block by block, so that the second step finds the first in the cache."""
        if self.is_complex(x):
            return super().soft_threshold(x, tau)
        out = np.empty_like(x)
        if x.nbytes <= SMALL_BYTES:
            # np.clip is written in Python, and takes as long as three of these.
            np.maximum(x, -tau, out=out)
            np.minimum(out, tau, out=out)
            return np.subtract(x, out, out=out)
        if isinstance(tau, float) and x.flags.forc:
            # Both views: a copy, where these arrays are dense, is never made.
            flat, shrunk = x.ravel(order="K"), out.ravel(order="K")
            step = BLOCK_BYTES // x.itemsize
            blocks = [(flat[i : i + step], shrunk[i : i + step]) for i in range(0, x.size, step)]
        else:
            blocks = [(x, out)]
        for source, target in blocks:
            np.clip(source, -tau, tau, out=target)
            np.subtract(source, target, out=target)
        return out

    def inner(self, x: Array, y: Array, axes: tuple[int, ...] | None = None) -> Array:
        """Leave the sum over all axes to BLAS, which makes no array of products."""
        if axes is not None:
            return super().inner(x, y, axes)
        return np.vdot(x, y).real

    def inner_numbers(self, pairs: list[tuple[Array, Array]]) -> list[float]:
        """One call of BLAS each."""
        is_plain = pairs[0][0].ndim == 1 and not self.is_complex(pairs[0][0])
        dot = np.ndarray.dot if is_plain else lambda x, y: np.vdot(x, y).real
        return [float(dot(x, y)) for x, y in pairs]

    def attention(
        self, q: Array, k: Array, v: Array, mask: Array | None, options: ScoreOptions
    ) -> tuple[Array, Array]:
        """Tiles in place, on several threads; none where a few queries decode, or there are few scores."""
        heads = [math.prod(x.shape[:-2]) for x in (q, k, v, mask) if x is not None]
        if max(heads) * q.shape[-2] * k.shape[-2] <= FEW_SCORES:
            return few_scores_attention(q, k, v, mask, options)
        if q.shape[-2] <= FEW_QUERIES:
            return few_queries_attention(q, k, v, mask, options)
        return numpy_attention.attention(q, k, v, mask, options)

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
        """Tiles in place, on several threads."""
        return numpy_attention.attention_vjp(q, k, v, mask, options, lse, delta, grad_out)

    def gather_rows(self, x: Array, indices: Array) -> Array:
        """Copy row by row, not number by number."""
        lead, places = broadcast_shapes(x.shape[:-2], indices.shape[:-1]), indices[..., None]
        out = np.empty((*lead, indices.shape[-1], x.shape[-1]), x.dtype)
        for index in np.ndindex(*lead):
            out[index] = np.take(at(x, index), at(places, index)[:, 0], axis=0)
        return out

    def exp_of_difference(self, x: Array, y: Array) -> Array:
        """Make one new array, not two."""
        out = x - y
        return np.exp(out, out=out)

    def few_features(self, q: Array, k: Array, places: Array) -> Array:
        """Copy as many tokens at once as stay in the cache; features are contiguous."""
        n, step = k.shape[-2], CACHED_SCORES // max(1, places.shape[-1])
        out = np.empty((*q.shape[:-1], n), q.dtype)
        for index in np.ndindex(*places.shape[:-1]):
            by_feature, which = k[index].T, places[index]
            for first in range(0, n, step):
                few = by_feature[which, first : first + step].astype(q.dtype, copy=False)
                np.matmul(q[index], few, out=out[index][..., first : first + step])
        return out

    def by_head(
        self,
        function: Callable[[slice, slice], tuple[Array, ...]],
        shape: tuple[int, int],
        n_scores: int,
        width: int,
    ) -> tuple[Array, ...]:
        """As many heads at once as their scores stay in the cache of a core; on several threads."""
        n_batch, n_heads = shape
        size = max(1, min(n_heads, CACHED_SCORES // max(1, n_scores)))
        groups = [slice(h, min(h + size, n_heads)) for h in range(0, n_heads, size)]
        tasks = list(itertools.product(range(n_batch), range(len(groups))))
        found: dict[Any, tuple[Array, ...]] = {}

        def run(task: tuple[int, int], buffers: numpy_attention.Buffers) -> None:
            found[task] = function(slice(task[0], task[0] + 1), groups[task[1]])

        n_products = n_batch * n_heads * n_scores * width
        numpy_attention.in_threads(tasks, run, np.dtype(np.float32), n_products)
        parts = zip(*(found[task] for task in tasks), strict=True)
        # Heads of one element of the batch follow one another.
        joined = (np.concatenate(x, axis=1) for x in parts)
        return tuple(x.reshape(*shape, *x.shape[2:]) for x in joined)

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """By the array's own method: the function takes four times as long."""
        return x.reshape(shape)

    def key_buffer(self, shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
        """Keep each feature of all rows together: BLAS reads long columns a fifth faster than short rows."""
        *lead, n, d = shape
        return np.zeros((*lead, d, n), dtype=dtype).swapaxes(-1, -2)

    def rows_like(self, buffer: Array, n: int) -> Array:
        """See which axis is the contiguous one."""
        is_by_feature = buffer.strides[-2] < buffer.strides[-1]
        make = self.key_buffer if is_by_feature else super().key_buffer
        return make((*buffer.shape[:-2], n, buffer.shape[-1]), buffer.dtype, buffer)

    def largest_in_rows(self, x: Array, k: int) -> tuple[Array, Array]:
        """Partition instead of sorting."""
        n = x.shape[-1]
        if k == 0:
            return super().largest_in_rows(x, k)
        indices = np.argpartition(np.abs(x), n - k, axis=-1)[..., n - k :]
        indices = np.sort(indices, axis=-1)
        return np.take_along_axis(x, indices, axis=-1), indices.astype(index_dtype(np, n))

    def keep_largest(self, x: Array, k: int) -> Array:
        """Partition the moduli, not their indices, which takes a quarter of the time; not where several are equal."""
        n = x.shape[-1]
        if 0 < k < n:
            modulus = np.abs(x)
            is_kept = modulus >= np.partition(modulus, n - k, axis=-1)[..., n - k, None]
            if np.count_nonzero(is_kept) * n == k * x.size:
                return x * is_kept
        return super().keep_largest(x, k)

    def pack_tiles(self, x: Array, widths: Array) -> Array:
        """Pack tiles of one width together."""
        return numpy_bits.pack_tiles(x, widths)

    def unpack_blocks(self, heap: Array, widths: Array, dtype: DType) -> Array:
        """Look up 8 integers for each byte."""
        return numpy_bits.unpack_blocks(heap, widths, dtype)

    def from_bytes(self, codes: Array, exponents: Array, dtype: DType) -> Array:
        """Multiply those rows that have an exponent."""
        return numpy_bits.from_bytes(codes, exponents, dtype)

    def unpack_tokens(
        self, heap: Array, starts: Array, widths: Array, tokens: Array, dtype: DType
    ) -> Array:
        """Read bits of tiles of one width together."""
        return numpy_bits.unpack_tokens(heap, starts, widths, tokens, dtype)

    def scatter_rows(self, values: Array, indices: Array, n: int) -> Array:
        """Write the entries where they belong."""
        dense = np.zeros((*values.shape[:-1], n), dtype=values.dtype)
        np.put_along_axis(dense, indices.astype(np.intp), values, axis=-1)
        return dense

    def largest_places(self, x: Array, k: int) -> Array:
        """Partition instead of sorting."""
        n = x.shape[-1]
        if not 0 < k < n:
            return np.broadcast_to(np.arange(k), (*x.shape[:-1], k))
        return np.sort(np.argpartition(x, n - k, axis=-1)[..., n - k :], axis=-1)

    def at_places(self, x: Array, places: Array) -> Array:
        """Take from one long row: NumPy's own function takes as long as a product of small matrices to start."""
        return np.take(x, self._flat(x, places))

    def add_in_rows(self, x: Array, indices: Array, values: Array) -> Array:
        """Add where the entries belong."""
        flat, at = x.reshape(-1), self._flat(x, indices)
        flat[at] += values
        return flat.reshape(x.shape)

    def _flat(self, x: Array, places: Array) -> Array:
        """Places counted over all rows."""
        starts = x.shape[-1] * np.arange(math.prod(x.shape[:-1]))
        return places + starts.reshape(*x.shape[:-1], 1)

    def sparse_matmul(self, values: Array, indices: Array, y: Array) -> Array:
        """SciPy's compressed sparse rows, where there is one matrix."""
        if values.ndim != 2 or y.ndim != 2:
            return super().sparse_matmul(values, indices, y)
        import scipy.sparse

        m, k = values.shape
        starts = np.arange(0, m * k + 1, k) if k else np.zeros(m + 1, dtype=np.intp)
        rows = (values.ravel(), indices.ravel().astype(starts.dtype), starts)
        return scipy.sparse.csr_array(rows, shape=(m, y.shape[0])) @ y
