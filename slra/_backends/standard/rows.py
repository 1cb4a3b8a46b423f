"""Backend that read and write rows of matrices at given places, in the array API standard alone."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from slra._typing import Array, DType

__all__ = ["Rows", "runs"]


class Rows:
    """What a library's backend can do better with rows."""

    xp: Any

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Split an axis in two, join two, or add one of length one."""
        return self.xp.reshape(x, shape)

    def gather_rows(self, x: Array, indices: Array) -> Array:
        """Rows of ``x`` (..., n, d) at ``indices`` (..., m), whose leading axes broadcast; (..., m, d)."""
        return self.xp.take_along_axis(x, indices[..., None], axis=-2)

    def exp_of_difference(self, x: Array, y: Array) -> Array:
        """Exponential of ``x - y``."""
        return self.xp.exp(x - y)

    def few_features(self, q: Array, k: Array, places: Array) -> Array:
        """Products of queries (B, H, m, r) with so many features of keys (B, H, n, d), at places (B, H, r)."""
        xp = self.xp
        few = self.gather_rows(xp.matrix_transpose(k), places)
        return q @ xp.astype(few, q.dtype, copy=False)

    def by_head(
        self,
        function: Callable[[slice, slice], tuple[Array, ...]],
        shape: tuple[int, int],
        n_scores: int,
        width: int,
    ) -> tuple[Array, ...]:
        """Call a function of elements of the batch and of heads, of which there are (B, H), for all of them.

        What it returns, (B, H, ...), takes so many scores for each head, of ``width`` multiplications each.
        """
        return function(slice(0, shape[0]), slice(0, shape[1]))

    def creation_device(self, like: Array) -> Any:
        """Device to create an array on that is to meet ``like``."""
        raise NotImplementedError

    def key_buffer(self, shape: tuple[int, ...], dtype: DType, like: Array) -> Array:
        """Zeros (..., n, d) beside ``like``, for rows that are multiplied by a few vectors again and again."""
        return self.xp.zeros(shape, dtype=dtype, device=self.creation_device(like))

    def rows_like(self, buffer: Array, n: int) -> Array:
        """Zeros (..., n, d) that lie in memory as ``buffer`` does."""
        shape = (*buffer.shape[:-2], n, buffer.shape[-1])
        return self.xp.zeros(shape, dtype=buffer.dtype, device=self.creation_device(buffer))

    def matmul(self, a: Array, b: Array) -> Array:
        """Multiply operands that may be views: ``a @ b``."""
        raise NotImplementedError

    def put_mapped(
        self, buffer: Array, rows: Array, shift: Array, w: Array, places: Array
    ) -> Array:
        """Write ``(rows - shift) w`` as `put_rows` does; ``shift`` (1 or B, H, 1, d), ``w`` likewise (., H, d, r)."""
        mapped = self.matmul(rows, w) - self.matmul(shift, w)
        return self.put_rows(buffer, mapped, places)

    def put_both(
        self, buffers: tuple[Array, Array], rows: tuple[Array, Array], places: Array
    ) -> tuple[Array, Array]:
        """Write to two buffers, of keys and of values, as `put_rows` does."""
        first, second = (
            self.put_rows(buffer, x, places) for buffer, x in zip(buffers, rows, strict=True)
        )
        return first, second

    def rotated(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate the leading 2 F features of ``x`` (..., n, d), in pairs (i, i + F), by tables (..., n, F)."""
        n = cos.shape[-1]
        first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
        turned = [first * cos - second * sin, second * cos + first * sin, rest]
        return self.xp.concat(turned, axis=-1)

    def put_rows(self, buffer: Array, rows: Array, places: Array) -> Array:
        """Write ``rows`` (B, H, m, d) to a buffer (B, H, n, d) at places (B, m), in place where the library can.

        Rows with a negative place are left out; the other places of an element of B differ, and are below n. A
        library whose arrays cannot be written to leaves out those that are not. ``places`` is a NumPy array unless
        it is traced.
        """
        rows = self.xp.astype(rows, buffer.dtype, copy=False)
        together = len(places) == 1 or bool(np.all(places == places[:1]))
        for b in [slice(None)] if together else range(len(places)):
            for source, target in runs(places[0] if together else places[b]):
                buffer[b, :, target, :] = rows[b, :, source, :]
        return buffer


def runs(places: np.ndarray[Any, Any]) -> list[tuple[slice, slice]]:
    """Pairs of slices, of the source and of the target, that take row i to ``places[i]`` unless that is negative."""
    if len(places) == 1:
        # A step of a decoder. By the general case below, four buffers took a third of the time of an append.
        first = int(places[0])
        return [(slice(0, 1), slice(first, first + 1))] if first >= 0 else []
    (kept,) = np.nonzero(places >= 0)
    targets = places[kept]
    (cuts,) = np.nonzero((np.diff(kept) != 1) | (np.diff(targets) != 1))
    bounds = [0, *(int(cut) + 1 for cut in cuts), len(kept)]
    return [
        (
            slice(int(kept[first]), int(kept[end - 1]) + 1),
            slice(int(targets[first]), int(targets[end - 1]) + 1),
        )
        for first, end in itertools.pairwise(bounds)
        if first < end
    ]
