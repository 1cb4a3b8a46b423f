"""Randomized SVD: a range finder, then the exact SVD of what it found."""

import numpy as np

from slra._backends import Primitives
from slra._backends.agnostic import matrix_h
from slra._typing import RNG, Array
from slra._validate import (
    check_count,
    check_finite,
    check_matrix,
    check_rank,
    check_rng,
    promote,
    resolve,
)
from slra.svd._result import SVDResult, fix_signs
from slra.svd.truncated import thin_svd

__all__ = ["randomized_svd"]


def randomized_svd(
    x: Array,
    rank: int,
    *,
    n_oversamples: int = 8,
    n_iter: int = 4,
    rng: RNG = None,
    test_matrix: Array | None = None,
) -> SVDResult:
    """Leading singular triplets of a matrix or a batch of them, by random projection.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating; half precision is computed in float32.
    rank : int
        Number of triplets, between 1 and ``min(m, n)``.
    n_oversamples : int
        Columns sampled beyond ``rank``.
    n_iter : int
        Subspace iterations; each costs two products with ``x``.
    rng : int, numpy.random.Generator or None
        Where the test matrix is drawn from. The same seed gives the same numbers on every backend.
    test_matrix : array, shape (..., n, rank + n_oversamples), optional
        Used instead of drawing one; the number of its columns then replaces ``rank + n_oversamples``. Needed inside
        a traced function unless ``rng`` is an int: anything else drawn there would freeze into a constant.

    Returns
    -------
    SVDResult
        ``U`` (..., m, rank), ``S`` (..., rank) and ``Vh`` (..., rank, n), in the dtype of ``x`` (``S`` real), on its
        device. The entry of largest modulus in each column of ``U`` is real and positive.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array; if ``rank``, ``n_oversamples``, ``n_iter`` or ``rng`` is of a wrong type;
        if ``x`` and ``test_matrix`` come from different libraries.
    ValueError
        If ``x`` has fewer than two axes, an empty axis, or NaN or infinity where values can be looked at; if a number
        is out of range, ``test_matrix`` has the wrong shape, or ``x`` is traced and the draw would not be repeatable.

    Notes
    -----
    With ``Y = x @ test_matrix``, ``Q = orth(Y)`` and ``n_iter`` times ``Q = orth(x @ orth(x^H @ Q))``, the SVD of the
    short matrix ``Q^H x`` gives the answer. Where the sample would be as wide as the matrix, the exact SVD is taken.

    References
    ----------
    N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, SIAM Review 53 (2011), 217-288,
    Algorithms 4.4 and 5.1.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 4.0))
    >>> U, S, Vh = slra.randomized_svd(x, 1, rng=0)
    >>> bool(np.allclose((U * S) @ Vh, x))
    True
    """
    table = resolve(x=x, optional={"test_matrix": test_matrix})
    check_matrix(x, "x")
    limit = min(x.shape[-2:])
    rank = check_rank(rank, limit, limit_is="min of the last two axes of x")
    n_sampled = min(rank + check_count(n_oversamples, "n_oversamples"), limit)
    n_iter = check_count(n_iter, "n_iter")
    generator = check_rng(rng)
    if test_matrix is not None:
        n_sampled = _check_test_matrix(x, test_matrix, rank)
    promoted = promote(table, x=x, test_matrix=test_matrix)
    work, sketch = promoted.arrays
    check_finite(table, work, "x")
    if n_sampled >= limit:
        U, S, Vh = thin_svd(work, table)
    else:
        if sketch is None:
            sketch = _draw(work, n_sampled, rng, generator, table)
        Q = subspace_iteration(work, sketch, n_iter, table)
        U, S, Vh = thin_svd(matrix_h(Q, table.xp) @ work, table)
        U = Q @ U
    factors = fix_signs(U[..., :rank], S[..., :rank], Vh[..., :rank, :], table)
    return SVDResult(*promoted.answer(table, *factors))


def _check_test_matrix(x: Array, test_matrix: Array, rank: int) -> int:
    """Return the number of columns of a test matrix that fits ``x``."""
    shape = tuple(test_matrix.shape)
    n_columns = shape[-1] if shape else 0
    fits = shape[:-1] in {(x.shape[-1],), (*x.shape[:-2], x.shape[-1])}
    if not fits or n_columns < rank:
        raise ValueError(
            f"test_matrix must have shape (..., {x.shape[-1]}, {rank} or more) for x of shape "
            f"{tuple(x.shape)} and rank {rank}, got {shape}"
        )
    return n_columns


def _draw(
    x: Array, n_columns: int, rng: RNG, generator: np.random.Generator, table: Primitives
) -> Array:
    """Draw a test matrix for each element of the batch."""
    if table.freezes_draws(x) and not isinstance(rng, (int, np.integer)):
        raise ValueError(
            "test_matrix must be given, or rng be an int, inside a traced function: "
            "anything else drawn there would become a constant of the compiled code"
        )
    return table.test_matrix((*x.shape[:-2], x.shape[-1], n_columns), generator, x)


def subspace_iteration(x: Array, test_matrix: Array, n_iter: int, table: Primitives) -> Array:
    """Orthonormal basis of the leading part of the range of ``x``."""
    xh = matrix_h(x, table.xp)
    Q = table.orthonormalize(x @ test_matrix)
    for _ in range(n_iter):
        Q = table.orthonormalize(x @ table.orthonormalize(xh @ Q))
    return Q
