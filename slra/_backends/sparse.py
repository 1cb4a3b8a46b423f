"""Sparse matrices and linear operators of SciPy, CuPy and pydata: which library their products belong to.

Needs: nothing. Their modules are recognised once the caller has imported them, never imported here.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._typing import Array, Namespace

__all__ = ["SparseEntries", "SparseProducts", "products_of", "sparse_products"]


class SparseEntries(NamedTuple):
    """Stored entries of a sparse matrix, each once: ``values[i]`` is in column ``columns[i]``."""

    xp: Namespace
    matrix: Any

    @property
    def values(self) -> Array:
        """The stored entries."""
        return self.matrix.data

    def widened(self) -> Any:
        """Return the matrix in double precision; the places of its entries are not copied."""
        is_complex = self.values.dtype.kind == "c"
        wide = self.values.astype("complex128" if is_complex else "float64", copy=False)
        parts = (wide, self.matrix.indices, self.matrix.indptr)
        return type(self.matrix)(parts, shape=self.matrix.shape)

    def n_gram_products(self) -> int:
        """Return how many products of two entries `gram_on_short_side` adds."""
        xp, (m, n) = self.xp, self.matrix.shape
        counts = xp.diff(self.matrix.indptr) if m >= n else xp.bincount(self.matrix.indices)
        return int(xp.sum(xp.astype(counts, xp.float64) ** 2))

    def gram_on_short_side(self) -> Array:
        """``x^H x`` of a tall matrix, ``x x^H`` of a wide one, as an array in double precision."""
        wide, (m, n) = self.widened(), self.matrix.shape
        adjoint = wide.conj().T
        return (adjoint @ wide if m >= n else wide @ adjoint).toarray()

    def moments(self, values: Array) -> tuple[Array, Array]:
        """Mean of each column, and the sum of squares about these, if these were the values; double precision.

        Of what is not stored only the number matters: each is a deviation of minus the mean.
        """
        (m, n), xp, columns = self.matrix.shape, self.xp, self.matrix.indices
        stored = xp.bincount(columns, minlength=n)
        mean = self._column_sums(values) / m
        # Once more about the mean that was found: what it misses is small, and so is the error of this sum.
        mean = mean + (self._column_sums(values - mean[columns]) - (m - stored) * mean) / m
        deviations = values - mean[columns]
        squares = xp.sum(xp.abs(deviations) ** 2) + xp.sum((m - stored) * xp.abs(mean) ** 2)
        return mean, squares

    def _column_sums(self, values: Array) -> Array:
        columns, n = self.matrix.indices, self.matrix.shape[1]
        if values.dtype.kind != "c":
            return self.xp.bincount(columns, weights=values, minlength=n)
        parts = (
            self.xp.bincount(columns, weights=x, minlength=n) for x in (values.real, values.imag)
        )
        real, imag = parts
        return real + 1j * imag

    def skewness(self) -> tuple[Array, Array]:
        """Largest moduli of the matrix less its conjugate transpose, and of the matrix."""
        difference = self.matrix - self.matrix.conj().T.tocsr()
        zero = self.xp.zeros(1, dtype=self.values.dtype)
        skew, largest = (
            self.xp.max(self.xp.abs(self.xp.concat([x, zero])))
            for x in (difference.data, self.values)
        )
        return skew, largest


class SparseProducts(NamedTuple):
    """What a matrix that is not an array can do; ``entries`` only where they can be looked at."""

    xp: Namespace
    like: Array
    matmat: Callable[[Array], Array]
    rmatmat: Callable[[Array], Array]
    entries: SparseEntries | None


def sparse_products(x: Any) -> SparseProducts | None:
    """Describe a sparse matrix or linear operator of scipy, cupyx or pydata's sparse; None for anything else."""
    for package, xp in (("scipy", _numpy), ("cupyx.scipy", _cupy)):
        sparse: Any = sys.modules.get(f"{package}.sparse")
        if sparse is not None and sparse.issparse(x):
            return _of_sparse(x, xp())
        linalg: Any = sys.modules.get(f"{package}.sparse.linalg")
        if linalg is not None and isinstance(x, linalg.LinearOperator):
            like = _like(x, xp)
            return SparseProducts(compat.array_namespace(like), like, x.matmat, x.rmatmat, None)
    pydata: Any = sys.modules.get("sparse")
    kind: Any = getattr(pydata, "SparseArray", None)
    if kind is not None and isinstance(x, kind) and (x.ndim, x.fill_value) == (2, 0):
        return _of_sparse(x.to_scipy_sparse(), _numpy())
    return None


def _like(x: Any, xp: Callable[[], Namespace]) -> Array:
    """Return an array such as a linear operator takes: from SciPy 1.18 on, it may be of any library."""
    matrix: Any = getattr(x, "A", None)
    if not isinstance(matrix, np.ndarray) and compat.is_array_api_obj(matrix):
        # Only this tells the device.
        return matrix[:0, ...]
    # Its own namespace, which SciPy has a copy of, is known by what it makes.
    own = getattr(x, "_xp", None)
    return (xp() if own is None else own).empty(0, dtype=x.dtype)


def _of_sparse(x: Any, xp: Namespace) -> SparseProducts:
    rows = x.tocsr()
    if not rows.has_canonical_format:
        # The sum of squares of the stored values is the norm only where no entry is stored twice.
        rows = rows.copy()
        rows.sum_duplicates()
    matmat, rmatmat = products_of(rows)
    return SparseProducts(xp, rows.data[:0], matmat, rmatmat, SparseEntries(xp, rows))


def products_of(rows: Any) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Products of compressed sparse rows, and of their conjugate transpose, with a dense block."""

    @functools.cache
    def columns() -> Any:
        # cupyx would sort the entries of a transpose anew for each product.
        is_cupy = type(rows).__module__.startswith("cupyx.")
        return rows.T.tocsr() if is_cupy else rows.T

    def rmatmat(u: Array) -> Array:
        return (columns() @ u.conj()).conj() if u.dtype.kind == "c" else columns() @ u

    return lambda v: rows @ v, rmatmat


def _numpy() -> Namespace:
    # Not at the top: it imports a good part of NumPy that nothing else needs.
    import array_api_compat.numpy as xp

    return xp


def _cupy() -> Namespace:
    import array_api_compat.cupy as xp

    return xp
