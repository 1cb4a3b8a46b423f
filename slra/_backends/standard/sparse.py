"""Backend for matrices with the same number of sparse entries in every row, in the array API standard alone.

``values`` and ``indices`` have shape (..., m, k): entry j of row i is at column ``indices[i, j]``, and the columns of
a row ascend. k is small, so loops over k are short; no step makes an array of more than m n entries.
"""

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

    def largest_in_rows(self, x: Array, k: int) -> tuple[Array, Array]:
        """Values and ascending columns of the ``k`` entries of largest modulus in each row."""
        xp = self.xp
        order = xp.argsort(xp.abs(x), axis=-1, descending=True, stable=True)
        indices = xp.sort(order[..., :k], axis=-1)
        values = [
            xp.sum(xp.where(self._is_column(indices, j, x), x, 0.0), axis=-1) for j in range(k)
        ]
        values = xp.stack(values, axis=-1) if k else x[..., :0]
        return values, xp.astype(indices, index_dtype(xp, x.shape[-1]))

    def scatter_rows(self, values: Array, indices: Array, n: int) -> Array:
        """Dense matrix (..., m, n) of sparse rows."""
        xp = self.xp
        dense = xp.zeros(
            (*values.shape[:-1], n), dtype=values.dtype, device=self.creation_device(values)
        )
        for j in range(values.shape[-1]):
            dense = xp.where(self._is_column(indices, j, dense), values[..., j, None], dense)
        return dense

    def sparse_matmul(self, values: Array, indices: Array, y: Array) -> Array:
        """Product of sparse rows (..., m, k) and a dense matrix (..., n, p)."""
        return self.scatter_rows(values, indices, y.shape[-2]) @ y

    def _is_column(self, indices: Array, j: int, like: Array) -> Array:
        columns = self.xp.arange(
            like.shape[-1], dtype=indices.dtype, device=self.creation_device(like)
        )
        return columns == indices[..., j, None]
