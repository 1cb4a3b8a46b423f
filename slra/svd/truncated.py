"""Deterministic truncated SVD: QR to a small square, LAPACK's SVD of that."""

from collections.abc import Callable

from slra._backends import Backend
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra._validate import check_finite, check_matrix, check_rank, check_rtol, promote, resolve
from slra.svd._costs import direct_is_faster
from slra.svd._cut import cut_values
from slra.svd._linear_map import brought_in_range, scaled_back
from slra.svd._result import SVDResult, fix_signs

__all__ = ["by_triangle", "thin_svd", "truncated_svd"]


def truncated_svd(x: Array, rank: int | None = None, *, rtol: float | None = None) -> SVDResult:
    """Leading singular triplets, by a deterministic method.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating; half precision is computed in float32.
    rank : int, optional
        Number of triplets, at most ``min(m, n)``, which is the default; with ``rtol`` a cap on it.
    rtol : float, optional
        Take the smallest rank with ``||x - U S Vh||_F <= rtol * ||x||_F`` for each matrix. A batch gets the largest of
        these, with exact zeros in ``S`` beyond the rank of each matrix. Needs values: not under jit or on Dask.

    Returns
    -------
    SVDResult
        ``U`` (..., m, rank), ``S`` (..., rank), ``Vh`` (..., rank, n), in the dtype of ``x`` (``S`` real).

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``rank`` not an int, or ``rtol`` not a number.
    ValueError
        If ``x`` has fewer than two axes, an empty axis, or NaN or infinity where values can be looked at; if ``rank``
        or ``rtol`` is out of range, or ``rtol`` is given where values cannot be looked at.

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
    backend = resolve(x=x)
    check_matrix(x, "x")
    limit = min(x.shape[-2:])
    if rank is None:
        rank = limit
    rank = check_rank(rank, limit, limit_is="min of the last two axes of x")
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    check_finite(backend, work, "x")
    if rtol is not None:
        rtol = check_rtol(backend, x, rtol)
    work, exponent = brought_in_range(work, backend)
    U, S, Vh = thin_svd(work, backend, rank)
    if rtol is not None:
        S, rank = cut_values(S, rtol, rank, backend)
    S = scaled_back(S[..., None, :], exponent, backend)[..., 0, :]
    factors = fix_signs(U[..., :rank], S[..., :rank], Vh[..., :rank, :], backend)
    return SVDResult(*promoted.cast_back(backend, *factors))


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
