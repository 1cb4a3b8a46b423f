"""The nearest matrix of a given rank."""

import math
from collections.abc import Callable

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra._validate import check_matrix, check_rank, promote, resolve
from slra.svd import SVDResult
from slra.svd._linear_map import brought_in_range, scaled_back
from slra.svd.truncated import thin_svd

__all__ = ["filtered", "masked_svd", "project_rank"]


@isolated
def project_rank(x: Array, rank: int) -> Array:
    r"""Nearest matrix of rank ``rank`` or less, in the Frobenius norm (and the spectral norm).

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating.
    rank : int
        Between 1 and ``min(m, n)``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. A matrix with NaN or infinity gives one full of NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``rank`` not an int.
    ValueError
        If ``x`` has fewer than two axes or an empty one, or ``rank`` is out of range.

    Notes
    -----
    .. math:: P(x) = \sum_{i \le r} \sigma_i u_i v_i^H

    The set is not convex: where ``sigma_r = sigma_{r+1}`` there are several nearest matrices and this is one.

    References
    ----------
    C. Eckart, G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1 (1936), 211-218.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_rank(np.diag([3.0, 2.0, 1.0]), 2).tolist()
    [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """
    backend = resolve(x=x)
    check_matrix(x, "x")
    rank = check_rank(rank, min(x.shape[-2:]), limit_is="min of the last two axes of x")
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    if backend.is_eager(work):
        work, exponent = brought_in_range(work, backend)
        U, S, Vh = masked_svd(work, backend)
        low_rank = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
        low_rank = scaled_back(low_rank, exponent, backend)
    else:
        low_rank = filtered(work, lambda S: _is_leading(S, rank, backend), backend)
    return promoted.cast_back(backend, low_rank)[0]


def _is_leading(S: Array, rank: int, backend: Backend) -> Array:
    """One for the first ``rank`` singular values, zero for the others."""
    xp = backend.xp
    index = xp.arange(S.shape[-1], device=backend.creation_device(S))
    return xp.where(index < rank, xp.ones_like(S), xp.zeros_like(S))


def filtered(x: Array, gain: Callable[[Array], Array], backend: Backend) -> Array:
    """Multiply the singular values of ``x`` by ``gain(S)``, at most 1, by one product with ``x``: for lazy arrays.

    A tall ``x`` is read twice and no left vectors are kept. With ``x = Q R`` and the computed ``R + E = U S V^H``, the
    result ``x V diag(gain) V^H`` is the exact one of ``Q (R + E)``, less ``Q E V diag(gain) V^H``.
    """
    xp = backend.xp
    if x.shape[-2] < x.shape[-1]:
        return matrix_h(filtered(matrix_h(x, xp), gain, backend), xp)
    is_finite = xp.isfinite(x)
    bad = xp.any(~is_finite, axis=(-2, -1))
    x = xp.where(is_finite, x, 0.0)
    _, S, Vh = backend.small_svd(backend.triangular_factor(x))
    right = (matrix_h(Vh, xp) * xp.astype(gain(S), x.dtype)[..., None, :]) @ Vh
    return backend.product(x, xp.where(bad[..., None, None], math.nan, right))


def masked_svd(x: Array, backend: Backend) -> SVDResult:
    """Thin SVD whose singular values are NaN where the matrix is not finite: LAPACK would raise or hang."""
    xp = backend.xp
    bad = xp.any(~xp.isfinite(x), axis=(-2, -1))
    U, S, Vh = thin_svd(xp.where(xp.isfinite(x), x, 0.0), backend)
    return SVDResult(U, xp.where(bad[..., None], math.nan, S), Vh)
