"""The nearest matrix of a given rank."""

import math

from slra._backends import Primitives
from slra._typing import Array
from slra._validate import check_matrix, check_rank, promote, resolve
from slra.svd import SVDResult
from slra.svd.truncated import thin_svd

__all__ = ["masked_svd", "project_rank"]


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
    table = resolve(x=x)
    check_matrix(x, "x")
    rank = check_rank(rank, min(x.shape[-2:]), limit_is="min of the last two axes of x")
    promoted = promote(table, x=x)
    U, S, Vh = masked_svd(promoted.arrays[0], table)
    low_rank = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
    return promoted.answer(table, low_rank)[0]


def masked_svd(x: Array, table: Primitives) -> SVDResult:
    """Thin SVD whose singular values are NaN where the matrix is not finite: LAPACK would raise or hang."""
    xp = table.xp
    bad = xp.any(~xp.isfinite(x), axis=(-2, -1))
    U, S, Vh = thin_svd(xp.where(bad[..., None, None], 0.0, x), table)
    return SVDResult(U, xp.where(bad[..., None], math.nan, S), Vh)
