"""Sparse matrices and linear operators of SciPy and CuPy: which library their products belong to.

Needs: nothing. SciPy's and CuPy's modules are recognised once the caller has imported them, never imported here.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from slra._typing import Array, Namespace

__all__ = ["SparseProducts", "gram_on_short_side", "multiplications_of_gram", "sparse_products"]


class SparseProducts(NamedTuple):
    """What a matrix that is not an array can do."""

    xp: Namespace
    like: Array
    matmat: Callable[[Array], Array]
    rmatmat: Callable[[Array], Array]
    values: Array | None


def sparse_products(x: Any) -> SparseProducts | None:
    """Describe a sparse matrix or linear operator of scipy or cupyx; None for anything else."""
    for package, xp in (("scipy", _numpy), ("cupyx.scipy", _cupy)):
        sparse: Any = sys.modules.get(f"{package}.sparse")
        if sparse is not None and sparse.issparse(x):
            return _of_sparse(x, xp())
        linalg: Any = sys.modules.get(f"{package}.sparse.linalg")
        if linalg is not None and isinstance(x, linalg.LinearOperator):
            like = xp().empty(0, dtype=x.dtype)
            return SparseProducts(xp(), like, x.matmat, x.rmatmat, None)
    return None


def _of_sparse(x: Any, xp: Namespace) -> SparseProducts:
    rows = _canonical(x)
    columns = rows.T

    def rmatmat(u: Array) -> Array:
        return (columns @ u.conj()).conj() if u.dtype.kind == "c" else columns @ u

    return SparseProducts(xp, rows.data[:0], lambda v: rows @ v, rmatmat, rows.data)


def _canonical(x: Any) -> Any:
    rows = x.tocsr()
    if not rows.has_canonical_format:
        # The sum of squares of the stored values is the norm only where no entry is stored twice.
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def multiplications_of_gram(x: Any) -> tuple[int, int] | None:
    """Return how many entries a sparse matrix has, and how many products `gram_on_short_side` adds; None of others."""
    sparse: Any = sys.modules.get("scipy.sparse")
    if sparse is None or not sparse.issparse(x):
        return None
    xp, rows = _numpy(), _canonical(x)
    is_tall = rows.shape[0] >= rows.shape[1]
    counts = xp.diff(rows.indptr) if is_tall else xp.bincount(rows.indices)
    return int(rows.nnz), int(xp.sum(xp.astype(counts, xp.float64) ** 2))


def gram_on_short_side(x: Any) -> Array:
    """``x^H x`` of a tall sparse matrix, ``x x^H`` of a wide one, as an array in double precision."""
    rows = _canonical(x)
    wide = rows.astype("complex128" if rows.dtype.kind == "c" else "float64")
    adjoint = wide.conj().T
    product = adjoint @ wide if rows.shape[0] >= rows.shape[1] else wide @ adjoint
    return product.toarray()


def _numpy() -> Namespace:
    # Not at the top: it imports a good part of NumPy that nothing else needs.
    import array_api_compat.numpy as xp

    return xp


def _cupy() -> Namespace:
    import array_api_compat.cupy as xp

    return xp
