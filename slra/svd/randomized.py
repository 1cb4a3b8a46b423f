"""Randomized SVD: read the input, choose a method, run it, put the answer in order."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from slra._backends.ambient import isolated
from slra._backends.sparse import SparseEntries
from slra._backends.standard import matrix_h
from slra._typing import RNG, Array, DeviceGenerator
from slra._validate import (
    check_choice,
    check_count,
    check_flag,
    check_rank,
    check_rtol,
    check_tol,
)
from slra.svd import krylov, subspace
from slra.svd._costs import gram_is_faster, sparse_gram_is_faster
from slra.svd._inputs import Problem, check_source, draw, read
from slra.svd._linear_map import LinearMap
from slra.svd._result import CenteredSVDResult, SVDResult, fix_signs
from slra.svd.converged import converged_svd
from slra.svd.gram import exact_svd, map_svd
from slra.svd.tolerance import tolerance_svd

__all__ = ["check_test_matrix", "randomized_svd"]


@isolated
def randomized_svd(
    x: Any,
    rank: int | None = None,
    *,
    rtol: float | None = None,
    tol: float | None = None,
    n_oversamples: int = 8,
    n_iter: int | Literal["auto"] = "auto",
    method: Literal["auto", "krylov", "subspace", "gram"] = "auto",
    center: bool = False,
    rng: RNG | DeviceGenerator = None,
    test_matrix: Array | None = None,
) -> SVDResult:
    """Leading singular triplets of a matrix or a batch of them, by random projection.

    Parameters
    ----------
    x : array, shape (..., m, n), or a matrix of shape (m, n)
        Real or complex floating array; half precision is computed in float32. Or a scipy or cupyx sparse matrix, a
        ``LinearOperator`` of theirs, or a `MatrixOperator`: of these only products are taken.
    rank : int, optional
        Number of triplets, between 1 and ``min(m, n)``; with ``rtol`` a cap on it, ``min(m, n)`` by default.
    rtol : float, optional
        Take about the smallest rank with ``||x - U S Vh||_F <= rtol * ||x||_F`` for each matrix. The residual is
        verified before the result is returned. A batch gets the largest of the ranks, with exact zeros in ``S`` beyond
        the rank of each matrix. Not under jit or on Dask.
    tol : float, optional
        Iterate until each triplet has converged, ``||x v - s u||`` and ``||x^H u - s v||`` at most ``tol`` times the
        largest singular value, as ``scipy.sparse.linalg.svds`` does; needs ``rank``. Not under jit or on Dask.
    n_oversamples : int
        Columns sampled beyond ``rank``; not used with ``rtol``.
    n_iter : int or "auto"
        Number of iterations; each costs two products with ``x``. "auto" stops once the Ritz values have settled where
        values can be looked at, and is 3 ("krylov") or 4 ("subspace") where not.
    method : {"auto", "krylov", "subspace", "gram"}
        "krylov" keeps every block of the iteration: the most accurate for its products. "subspace" keeps one: the
        least memory. "gram" is exact and fast where one side is short. "auto" takes
        the one that a model of their times says is faster, "gram" where they are near.
    center : bool
        Subtract the mean of each column first (principal components of the rows). Of a matrix that is not an array
        the products are corrected instead.
    rng : int, numpy.random.Generator or None; cupy.random.Generator, torch.Generator
        Where the test matrix is drawn from: by NumPy, so that the same seed gives the same numbers on every backend. A
        generator of the library of ``x`` draws other numbers, on its device.
    test_matrix : array, shape (..., n, rank + n_oversamples), optional
        Used instead of drawing one; the number of its columns then replaces ``rank + n_oversamples``. Needed inside
        a traced function unless ``rng`` is an int: anything else drawn there would freeze into a constant.

    Returns
    -------
    SVDResult
        ``U`` (..., m, k), ``S`` (..., k) and ``Vh`` (..., k, n), in the dtype of ``x`` (``S`` real), on its device.
        ``U`` and ``Vh`` are orthonormal to rounding, whatever ``x``. The entry of largest modulus in each column of
        ``U`` is real and positive, the one of lowest index among those that tie within rounding. Of half precision
        ``S`` is float32. With ``center`` the result has the means of the columns (..., n), too, as ``result.mean``.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array; if an option is of a wrong type; if ``x`` and ``test_matrix`` come from
        different libraries; if an operator has no adjoint, or returns another dtype than it says.
    ValueError
        If ``x`` has fewer than two axes, an empty axis, or NaN or infinity where values can be looked at; if a number
        is out of range; if neither ``rank`` nor ``rtol`` is given; if ``rtol`` comes with an option that it decides
        itself, with values that cannot be looked at, or with an operator whose norm is not known or is contradicted by
        its products; if the adjoint of an operator is not one, as a random product tells; if ``test_matrix``
        has the wrong shape, or ``x`` is traced and the draw would not be repeatable.

    Notes
    -----
    "krylov" takes the best approximation in the span of ``x^H x W, (x^H x)^2 W, ...`` for a test matrix ``W``,
    "subspace" in the last block alone. Blocks are orthonormalised by Cholesky-QR, and by Householder's QR for each
    matrix of a batch where that fails. Where the blocks would fill the matrix, its exact decomposition is taken.

    References
    ----------
    N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, SIAM Review 53 (2011), 217-288.
    C. Musco, C. Musco, Randomized block Krylov methods for stronger and faster approximate singular value
    decomposition, NeurIPS 2015.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 4.0))
    >>> U, S, Vh = slra.randomized_svd(x, 1, rng=0)
    >>> bool(np.allclose((U * S) @ Vh, x))
    True
    >>> slra.randomized_svd(np.diag([1.0, 0.1, 0.001]), rtol=0.01, rng=0).S.shape
    (2,)
    """
    check_choice(method, ("auto", "krylov", "subspace", "gram"), "method")
    problem = read(x, test_matrix, center=check_flag(center, "center"))
    A = problem.A
    limit = min(A.shape[-2:])
    if rank is None and rtol is None:
        raise ValueError("rank or rtol must be given, got neither")
    if rank is not None:
        rank = check_rank(rank, limit, limit_is="min of the last two axes of x")
    width = (rank or 1) + check_count(n_oversamples, "n_oversamples")
    depth = check_depth(n_iter)
    source = check_source(A, rng) if test_matrix is None else None
    if test_matrix is not None:
        width = check_test_matrix(A, test_matrix, rank or 1)

    def omega(n_columns: int) -> Array:
        given = problem.test_matrix
        return draw(A, n_columns, source) if given is None else given

    width = min(width, limit)
    if tol is not None:
        tol = _check_convergence(problem, tol, rank, rtol, method, depth, test_matrix)
        assert rank is not None
        U, S, V = converged_svd(A, omega, rank, width, tol)
    elif rtol is None and rank is not None:
        found = None
        if method == "auto" and depth is None and problem.mean is None and problem.exponent is None:
            found = _by_sparse_gram(A, problem.entries, rank, width)
        if found is not None:
            U, S, V = found
        elif _is_narrow(A, rank, width, depth, method, test_matrix):
            # A generator, as more than one test matrix may be drawn from it.
            source = np.random.default_rng(source) if isinstance(source, int) else source
            U, S, V = krylov.narrow_krylov_svd(A, lambda n: A.matmat(omega(n)), rank, width)
        else:
            U, S, V = _fixed_rank(A, omega, rank, width, depth, method)
    else:
        rtol = _check_tolerance(problem, rtol, method, depth, test_matrix)
        U, S, V = tolerance_svd(A, lambda width: A.matmat(omega(width)), rtol, rank or limit)
    return _finished(problem, U, S, V)


def _fixed_rank(
    A: LinearMap,
    omega: Callable[[int], Array],
    rank: int,
    width: int,
    depth: int | None,
    method: str,
) -> tuple[Array, Array, Array]:
    if method == "auto":
        method = _cheapest(A, rank, width, depth)
    basis = width * (krylov.MIN_ITER if depth is None else depth)
    limit = min(A.shape[-2:])
    if method == "gram" or width == limit or (method == "krylov" and basis >= limit):
        return exact_svd(A, rank)
    if method == "krylov" and depth != 0:
        return krylov.krylov_svd(A, omega(width), rank, depth)
    depth = subspace.DEFAULT_ITER if depth is None else depth
    return subspace.subspace_svd(A, omega(width), rank, depth)


def _by_sparse_gram(
    A: LinearMap, entries: SparseEntries | None, rank: int, width: int
) -> tuple[Array, Array, Array] | None:
    """Decompose a sparse matrix by its Gram matrix, where that is faster and loses nothing."""
    if entries is None:
        return None
    counts = entries.values.shape[0], entries.n_gram_products()
    if not sparse_gram_is_faster(A.shape, *counts, rank, width, krylov.MIN_ITER):
        return None
    return map_svd(A, entries.gram_on_short_side(), rank)


def _is_narrow(
    A: LinearMap,
    rank: int,
    width: int,
    depth: int | None,
    method: str,
    test_matrix: Array | None,
) -> bool:
    """Whether to take a Krylov space of narrow blocks: where products do not run faster the wider they are."""
    is_default = depth is None and test_matrix is None and method in ("auto", "krylov")
    pays = rank >= krylov.BLOCK and width >= 2 * krylov.BLOCK
    fits = krylov.MIN_ITER * width < min(A.shape[-2:])
    return A.dense is None and A.is_eager and is_default and pays and fits


def _cheapest(A: LinearMap, rank: int, width: int, depth: int | None) -> str:
    """Choose by the model of `slra.svd._costs`."""
    if A.dense is None:
        return "krylov"
    depth = max(1, krylov.MIN_ITER if depth is None else depth)
    is_gram = gram_is_faster(A.shape, rank, width, depth, is_eager=A.is_eager)
    return "gram" if is_gram else "krylov"


def _finished(problem: Problem, U: Array, S: Array, V: Array) -> SVDResult:
    """Fix signs, undo the scaling, and answer in the caller's dtype."""
    backend = problem.A.backend
    U, S, Vh = fix_signs(U, problem.unscaled(S), matrix_h(V, backend.xp), backend)
    U, Vh = problem.promoted.cast_back(backend, U, Vh)
    return CenteredSVDResult.of(SVDResult(U, S, Vh), problem.mean, backend)


def _check_tolerance(
    problem: Problem, rtol: Any, method: str, depth: int | None, test_matrix: Array | None
) -> float:
    """Check what goes together with ``rtol``."""
    A = problem.A
    if depth is not None:
        raise ValueError(f"n_iter must be 'auto' where rtol is given, got {depth}")
    if method not in ("auto", "krylov"):
        raise ValueError(
            f"method must be 'auto' or 'krylov' where rtol is given, got {method!r}; "
            "for a deterministic answer use truncated_svd"
        )
    if test_matrix is not None:
        raise ValueError("test_matrix must be None where rtol is given: the width is not known")
    if A.norm is None:
        raise ValueError(
            "rtol needs the Frobenius norm of x, which products do not tell; "
            "pass a slra.MatrixOperator with frobenius_norm"
        )
    return check_rtol(
        A.backend,
        A.like,
        rtol,
        narrow=problem.promoted.narrow,
        by_products=A.dense is None,
        lost=1.0 if A.lost is None else float(A.lost()),
    )


def _check_convergence(
    problem: Problem,
    tol: Any,
    rank: int | None,
    rtol: Any,
    method: str,
    depth: int | None,
    test_matrix: Array | None,
) -> float:
    """Check what goes together with ``tol``."""
    if rank is None or rtol is not None:
        raise ValueError(
            "tol needs rank, and rtol to be None: it is for singular triplets, rtol for their sum"
        )
    if depth is not None or test_matrix is not None or method not in ("auto", "krylov"):
        raise ValueError(
            "n_iter must be 'auto', method 'auto' or 'krylov' and test_matrix None where tol is given, "
            f"got n_iter={'auto' if depth is None else depth!r}, method={method!r}"
        )
    return check_tol(problem.A.backend, problem.A.like, tol, problem.promoted.narrow)


def check_depth(n_iter: Any) -> int | None:
    """Return a number of iterations, None for "auto"."""
    if isinstance(n_iter, str) and n_iter == "auto":
        return None
    return check_count(n_iter, "n_iter")


def check_test_matrix(A: LinearMap, test_matrix: Array, rank: int) -> int:
    """Return the number of columns of a test matrix that fits ``A``."""
    shape = tuple(test_matrix.shape)
    n_columns = shape[-1] if shape else 0
    fits = shape[:-1] in {(A.shape[-1],), (*A.shape[:-2], A.shape[-1])}
    if not fits or n_columns < rank:
        raise ValueError(
            f"test_matrix must have shape (..., {A.shape[-1]}, {rank} or more) for x of shape "
            f"{A.shape} and rank {rank}, got {shape}"
        )
    return n_columns
