"""Deterministic truncated SVD: QR to a small square, LAPACK's SVD of that."""

import math
from collections.abc import Callable
from typing import Any

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.sparse import sparse_products
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra._validate import (
    check_finite,
    check_flag,
    check_matrix,
    check_rank,
    check_rtol,
    promote,
    resolve,
)
from slra.svd._costs import direct_is_faster
from slra.svd._cut import cut_values
from slra.svd._linear_map import brought_in_range, scaled_back
from slra.svd._result import CenteredSVDResult, SVDResult, fix_signs
from slra.svd.operator import MatrixOperator

__all__ = ["by_triangle", "thin_svd", "truncated_svd"]

# 128 MB in double precision.
_DENSE_ENTRIES = 1 << 24


@isolated
def truncated_svd(
    x: Any, rank: int | None = None, *, rtol: float | None = None, center: bool = False
) -> SVDResult:
    """Leading singular triplets, by a deterministic method.

    Parameters
    ----------
    x : array, shape (..., m, n), or a sparse matrix of shape (m, n)
        Real or complex floating; half precision is computed in float32. A scipy or cupyx sparse matrix is made dense,
        up to 2**24 entries.
    rank : int, optional
        Number of triplets, at most ``min(m, n)``, which is the default; with ``rtol`` a cap on it.
    rtol : float, optional
        Take the smallest rank with ``||x - U S Vh||_F <= rtol * ||x||_F`` for each matrix. A batch gets the largest of
        these, with exact zeros in ``S`` beyond the rank of each matrix. Needs values: not under jit or on Dask.
    center : bool
        Subtract the mean of each column first, as in `randomized_svd`.

    Returns
    -------
    SVDResult
        ``U`` (..., m, rank), ``S`` (..., rank), ``Vh`` (..., rank, n), in the dtype of ``x`` (``S`` real, and float32
        for half precision). With ``center`` also ``mean`` (..., n), beside the three that it unpacks to.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``rank`` not an int, or ``rtol`` not a number.
    ValueError
        If ``x`` has fewer than two axes, an empty axis, or NaN or infinity where values can be looked at, or is sparse
        and too large; if ``rank`` or ``rtol`` is out of range, or ``rtol`` is given where values cannot be looked at.

    Notes
    -----
    ``x = Q R`` on the long side, then ``R = U' S Vh``; the sign rule is that of `randomized_svd`.

    References
    ----------
    T. F. Chan, An improved algorithm for computing the singular value decomposition,
    ACM Transactions on Mathematical Software 8 (1982), 72-83.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> U, S, Vh = slra.truncated_svd(np.diag([3.0, 2.0, 1.0]), 2)
    >>> S.tolist()
    [3.0, 2.0]
    """
    x = _dense(x)
    backend = resolve(x=x)
    check_matrix(x, "x")
    center = check_flag(center, "center")
    limit = min(x.shape[-2:])
    if rank is None:
        rank = limit
    rank = check_rank(rank, limit, limit_is="min of the last two axes of x")
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    check_finite(backend, work, "x")
    if rtol is not None:
        rtol = check_rtol(backend, work, rtol, narrow=promoted.narrow)
    work, exponent = brought_in_range(work, backend)
    mean = None
    if center:
        mean = backend.column_means(work)
        work = backend.centered(work, mean)
        mean = scaled_back(backend.xp.astype(mean, work.dtype, copy=False), exponent, backend)[
            ..., 0, :
        ]
    U, S, Vh = thin_svd(work, backend, rank)
    if rtol is not None:
        S, rank = cut_values(S, rtol, rank, backend)
    S = scaled_back(S[..., None, :], exponent, backend)[..., 0, :]
    U, S, Vh = fix_signs(U[..., :rank], S[..., :rank], Vh[..., :rank, :], backend)
    U, Vh = promoted.cast_back(backend, U, Vh)
    return CenteredSVDResult.of(SVDResult(U, S, Vh), mean, backend)


def _dense(x: Any) -> Array:
    """Make a sparse matrix dense, if that is small; leave arrays as they are."""
    if isinstance(x, MatrixOperator):
        raise TypeError("x must be an array, got MatrixOperator; use randomized_svd")
    found = sparse_products(x)
    if found is None:
        return x
    if found.entries is None:
        raise TypeError(f"x must be an array, got {type(x).__name__}; use randomized_svd")
    if math.prod(x.shape) > _DENSE_ENTRIES:
        raise ValueError(
            f"x must have at most {_DENSE_ENTRIES} entries where it is sparse, as it is made dense, "
            f"got shape {tuple(x.shape)}; use randomized_svd"
        )
    return found.entries.matrix.toarray()


def thin_svd(x: Array, backend: Backend, rank: int | None = None) -> tuple[Array, Array, Array]:
    """Singular triplets of a validated ``x``, all ``min(m, n)`` or at least ``rank``; signs as they come."""
    xp = backend.xp
    if x.shape[-2] < x.shape[-1]:
        V, S, Uh = thin_svd(matrix_h(x, xp), backend, rank)
        return matrix_h(Uh, xp), S, matrix_h(V, xp)
    if not backend.is_eager(x):
        U, S, V = by_triangle(x, lambda v: backend.product(x, v), rank or x.shape[-1], backend)
        return U, S, matrix_h(V, xp)
    if direct_is_faster(x.shape, rank or x.shape[-1]):
        # LAPACK's own reduction, without a detour through three products in the interpreter.
        return backend.small_svd(x)
    Q, R = backend.qr(x)
    U, S, Vh = backend.small_svd(R)
    return Q @ U[..., :rank], S, Vh


def by_triangle(
    x: Array, product: Callable[[Array], Array], rank: int, backend: Backend
) -> tuple[Array, Array, Array]:
    """Leading triplets ``U, S, V`` of a tall ``x``, of which nothing larger than ``U`` is kept: for lazy arrays.

    The triangular factor tells ``V``, and ``product(V)``, which is ``x V``, the rest.
    """
    V = matrix_h(backend.small_svd(backend.triangular_factor(x))[2][..., :rank, :], backend.xp)
    Q, R = backend.qr(product(V))
    U, S, Vh = backend.small_svd(R)
    return Q @ U, S, V @ matrix_h(Vh, backend.xp)
