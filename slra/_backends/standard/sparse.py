"""Backend for matrices with the same number of sparse entries in every row, in the array API standard alone.

``values`` and ``indices`` have shape (..., m, k): entry j of row i is at column ``indices[i, j]``, and the columns of
a row ascend. No step makes an array of more than m n entries; where a library lacks ``take_along_axis`` there are loops
over k.
"""

import math
from typing import Any

from slra._typing import Array, DType

__all__ = ["SparseRows", "index_dtype"]


def index_dtype(xp: Any, n: int) -> DType:
    """Return the smallest signed integer dtype that counts to ``n``."""
    return next(
        dtype for dtype in (xp.int8, xp.int16, xp.int32, xp.int64) if n - 1 <= xp.iinfo(dtype).max
    )


class SparseRows:
    """What a library's backend can do better with sparse rows."""

    xp: Any

    def creation_device(self, like: Array) -> Any:
        """Device to create an array on that is to meet ``like``."""
        raise NotImplementedError

    def at_most(self, x: Array, high: Array | float) -> Array:
        """Minimum of ``x`` and an array or a number."""
        raise NotImplementedError

    def largest_in_rows(self, x: Array, k: int) -> tuple[Array, Array]:
        """Values and ascending columns of the ``k`` entries of largest modulus in each row."""
        xp = self.xp
        order = xp.argsort(xp.abs(x), axis=-1, descending=True, stable=True)
        indices = xp.sort(order[..., :k], axis=-1)
        if k == 0:
            values = x[..., :0]
        elif hasattr(xp, "take_along_axis"):
            values = xp.take_along_axis(x, indices, axis=-1)
        else:
            columns = [self._is_column(indices, j, x) for j in range(k)]
            values = xp.stack([xp.sum(xp.where(at, x, 0.0), axis=-1) for at in columns], axis=-1)
        return values, xp.astype(indices, index_dtype(xp, x.shape[-1]))

    def keep_largest(self, x: Array, k: int) -> Array:
        """``x`` with zeros in place of all but the ``k`` entries of largest modulus in each row; finite ``x``."""
        return self.scatter_rows(*self.largest_in_rows(x, k), x.shape[-1])

    def scatter_rows(self, values: Array, indices: Array, n: int) -> Array:
        """Dense matrix (..., m, n) of sparse rows."""
        xp = self.xp
        device = self.creation_device(values)
        *lead, k = values.shape
        dense = xp.zeros((*lead, n), dtype=values.dtype, device=device)
        n_rows = math.prod(lead)
        if k == 0 or n_rows == 0:
            return dense
        if not hasattr(xp, "take_along_axis"):
            for j in range(k):
                dense = xp.where(self._is_column(indices, j, dense), values[..., j, None], dense)
            return dense
        # Places ascend over all rows together, so that one binary search says which of them each entry is, if any.
        grid = xp.arange(n_rows * n, device=device)
        starts = xp.arange(0, n_rows * n, n, device=device)[:, None]
        places = xp.reshape(indices, (n_rows, k))
        places = xp.reshape(xp.astype(places, grid.dtype) + starts, (-1,))
        nearest = self.at_most(xp.searchsorted(places, grid), n_rows * k - 1)
        found = xp.take(xp.reshape(values, (-1,)), nearest, axis=0)
        is_place = xp.take(places, nearest, axis=0) == grid
        return xp.reshape(xp.where(is_place, found, xp.zeros_like(found)), (*lead, n))

    def largest_places(self, x: Array, k: int) -> Array:
        """Ascending places of the ``k`` largest entries of each row, not of the largest modulus."""
        xp = self.xp
        return xp.sort(xp.argsort(x, axis=-1, descending=True, stable=True)[..., :k], axis=-1)

    def at_places(self, x: Array, places: Array) -> Array:
        """Entries of each row of ``x`` (..., m, n) at places (..., m, k)."""
        return self.xp.take_along_axis(x, places, axis=-1)

    def add_in_rows(self, x: Array, indices: Array, values: Array) -> Array:
        """Add sparse rows to ``x`` (..., m, n), which may be written to."""
        return x + self.scatter_rows(values, indices, x.shape[-1])

    def sparse_matmul(self, values: Array, indices: Array, y: Array) -> Array:
        """Product of sparse rows (..., m, k) and a dense matrix (..., n, p)."""
        return self.scatter_rows(values, indices, y.shape[-2]) @ y

    def _is_column(self, indices: Array, j: int, like: Array) -> Array:
        columns = self.xp.arange(
            like.shape[-1], dtype=indices.dtype, device=self.creation_device(like)
        )
        return columns == indices[..., j, None]
