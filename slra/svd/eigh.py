"""Leading eigenpairs of a Hermitian matrix: Krylov and Rayleigh-Ritz, or Nystrom where no eigenvalue is negative."""

from typing import Any, Literal, NamedTuple

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.cholesky_qr import orthonormal
from slra._backends.standard import matrix_h
from slra._typing import RNG, Array, DeviceGenerator
from slra._validate import (
    check_choice,
    check_count,
    check_hermitian,
    check_positive_semidefinite,
    check_rank,
    check_square,
)
from slra.svd._inputs import Problem, check_source, draw, read
from slra.svd._linear_map import LinearMap, dense_map
from slra.svd._result import fix_signs
from slra.svd.gram import combine, spectrum, tall_svd
from slra.svd.krylov import LAZY_ITER, MAX_ITER, MIN_ITER, RITZ_TOLERANCE, KrylovSpace
from slra.svd.randomized import check_depth, check_test_matrix
from slra.svd.subspace import DEFAULT_ITER
from slra.svd.truncated import by_triangle

__all__ = ["EighResult", "randomized_eigh"]


class EighResult(NamedTuple):
    """Leading eigenpairs, ``x ~ (V * w) @ V^H``.

    Attributes
    ----------
    w : array, shape (..., k)
        Eigenvalues, real, by descending modulus.
    V : array, shape (..., n, k)
        Eigenvectors, orthonormal columns.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> w, V = slra.randomized_eigh(np.diag([1.0, -3.0, 2.0]), 2, rng=0)
    >>> w.round(6).tolist(), V.shape
    ([-3.0, 2.0], (3, 2))
    """

    w: Array
    V: Array


@isolated
def randomized_eigh(
    x: Any,
    rank: int,
    *,
    which: Literal["LM", "LA", "SA"] = "LM",
    n_oversamples: int = 8,
    n_iter: int | Literal["auto"] = "auto",
    method: Literal["krylov", "nystrom"] = "krylov",
    rng: RNG | DeviceGenerator = None,
    test_matrix: Array | None = None,
) -> EighResult:
    """Eigenpairs at the ends of the spectrum of a Hermitian matrix or a batch of them.

    Parameters
    ----------
    x : array, shape (..., n, n), or a matrix of shape (n, n)
        Hermitian, real or complex floating; or a sparse matrix, linear operator or `MatrixOperator`, as in
        `randomized_svd`. Symmetry is checked where entries can be looked at.
    rank : int
        Number of pairs, between 1 and ``n``.
    which : {"LM", "LA", "SA"}
        Those of largest modulus, the algebraically largest, or the algebraically smallest; in this order in the
        result. Values that are small beside others of ``x`` are found to less of their digits.
    n_oversamples : int
        Columns sampled beyond ``rank``.
    n_iter : int or "auto"
        Number of iterations, of two products ("krylov") or one ("nystrom"). "auto" stops once the Ritz values have
        settled where values can be looked at ("krylov"), and is 3 or 4 otherwise.
    method : {"krylov", "nystrom"}
        "nystrom" needs ``x`` positive semidefinite and takes less memory.
    rng : int, numpy.random.Generator or None; cupy.random.Generator, torch.Generator
        Where the test matrix is drawn from, as in `randomized_svd`.
    test_matrix : array, shape (..., n, rank + n_oversamples), optional
        Used instead of drawing one.

    Returns
    -------
    EighResult
        ``w`` (..., rank) and ``V`` (..., n, rank). The entry of largest modulus in each column of ``V`` is real and
        positive.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or an option is of a wrong type.
    ValueError
        If ``x`` is not square, Hermitian and finite; if with "nystrom" it has a negative eigenvalue on the sample; if a
        number is out of range, or ``x`` is traced and the draw would not be repeatable.

    References
    ----------
    J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher, Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data, NeurIPS 2017, Algorithm 3.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> w, V = slra.randomized_eigh(np.diag([1.0, -3.0, 2.0]), 2, rng=0)
    >>> w.tolist()
    [-3.0, 2.0]
    """
    check_choice(method, ("krylov", "nystrom"), "method")
    _check_which(which, method)
    problem = _read_hermitian(x, test_matrix)
    A, backend = problem.A, problem.A.backend
    rank = check_rank(rank, A.shape[-1], limit_is="the last axis of x")
    width = min(rank + check_count(n_oversamples, "n_oversamples"), A.shape[-1])
    depth = check_depth(n_iter)
    source = check_source(A, rng) if test_matrix is None else None
    if test_matrix is not None:
        width = check_test_matrix(A, test_matrix, rank)
    if width * 2 * (MIN_ITER if depth is None else max(1, depth)) >= A.shape[-1]:
        w, V = _leading(*backend.small_eigh(A.materialize()), rank, which, backend)
    else:
        omega = problem.test_matrix
        sample = A.matmat(draw(A, width, source) if omega is None else omega)
        if method == "nystrom":
            w, V = _nystrom(A, sample, rank, depth)
        else:
            w, V = _krylov(A, sample, rank, depth, which)
    w = problem.unscaled(backend.xp.astype(w, backend.real_dtype(V.dtype), copy=False))
    V = fix_signs(V, w, matrix_h(V, backend.xp), backend).U
    return EighResult(w, *problem.promoted.cast_back(backend, V))


def _check_which(which: str, method: str) -> None:
    if which == "SM":
        raise ValueError(
            "which must be 'LM', 'LA' or 'SA', got 'SM': products with x hardly tell the eigenvalues nearest zero; "
            "pass an operator that solves with x, whose largest eigenvalues are their inverses"
        )
    check_choice(which, ("LM", "LA", "SA"), "which")
    if which == "SA" and method == "nystrom":
        raise ValueError("which must be 'LM' or 'LA' for method='nystrom', got 'SA'")


def _read_hermitian(x: Any, test_matrix: Array | None) -> Problem:
    """Read ``x``, which must be square and, as far as can be seen, Hermitian to the rounding of its dtype."""
    problem = read(x, test_matrix, adjoint="own")
    A, backend, narrow = problem.A, problem.A.backend, problem.promoted.narrow
    check_square(A.shape)
    if problem.entries is not None:
        check_hermitian(backend, *problem.entries.skewness(), A.like.dtype)
    if A.dense is None:
        return problem
    adjoint = matrix_h(A.dense, backend.xp)
    if A.is_eager:
        sizes = backend.max_abs(A.dense - adjoint), backend.max_abs(A.dense)
        check_hermitian(backend, *sizes, narrow or A.like.dtype)
    if narrow is None:
        return problem
    # Half precision may be off by what single precision would show.
    return problem._replace(A=dense_map((A.dense + adjoint) / 2, backend))


def _leading(w: Array, V: Array, rank: int, which: str, backend: Backend) -> tuple[Array, Array]:
    """Pick the pairs of largest modulus, or at one end."""
    xp = backend.xp
    key = {"LM": -xp.abs(w), "LA": -w, "SA": w}[which]
    order = xp.argsort(key, axis=-1, stable=True)[..., :rank]
    # A product with columns of the identity gathers along the last axis, batch or not, in any library.
    index = xp.arange(w.shape[-1], device=backend.creation_device(w))
    pick = xp.astype(index[:, None] == order[..., None, :], w.dtype)
    return (w[..., None, :] @ pick)[..., 0, :], V @ xp.astype(pick, V.dtype, copy=False)


def _krylov(
    A: LinearMap, sample: Array, rank: int, n_iter: int | None, which: str
) -> tuple[Array, Array]:
    """Rayleigh-Ritz on the span of ``A W, A^2 W, ...``, two blocks an iteration."""
    space = KrylovSpace(A)
    space.append(sample)
    fixed = n_iter if n_iter is not None or A.is_eager else LAZY_ITER
    # Wanted values may lie close together, seen from the other end of the spectrum.
    patience = MAX_ITER if which == "LM" else 4 * MAX_ITER
    deepest = 2 * max(1, patience if fixed is None else fixed)
    before = None
    for depth in range(2, min(deepest, A.shape[-1] // space.dimension) + 1):
        space.append(space.W[-1])
        if fixed is not None or depth < 2 * MIN_ITER - 1:
            continue
        values = _leading(*_ritz_pairs(space), rank, which, A.backend)[0]
        if before is not None and _settled(before, values, A.backend):
            break
        before = values
    w, E = _leading(*_ritz_pairs(space), rank, which, A.backend)
    return w, combine(space.V, A.backend.xp.astype(E, sample.dtype, copy=False), A.backend)


def _ritz_pairs(space: KrylovSpace) -> tuple[Array, Array]:
    """Eigenpairs of ``V^H A V``, in the wide dtype."""
    backend = space.A.backend
    xp = backend.xp
    V, W = xp.concat(space.V, axis=-1), xp.concat(space.W, axis=-1)
    H = backend.gram(V, W)
    return backend.small_eigh((H + matrix_h(H, xp)) / 2)


def _settled(before: Array, after: Array, backend: Backend) -> bool:
    xp = backend.xp
    moved = xp.abs(xp.abs(after) - xp.abs(before))
    return bool(xp.all(moved <= RITZ_TOLERANCE * xp.abs(after)))


def _nystrom(A: LinearMap, sample: Array, rank: int, n_iter: int | None) -> tuple[Array, Array]:
    """Decompose ``A Q (Q^H A Q)^-1 Q^H A`` by Cholesky of a slightly shifted core; take the shift off again."""
    backend = A.backend
    xp = backend.xp
    Q = orthonormal(sample, backend)
    for _ in range(DEFAULT_ITER if n_iter is None else n_iter):
        Q = orthonormal(A.matmat(Q), backend)
    Y = A.matmat(Q)
    eps = xp.finfo(Y.dtype).eps
    norm = xp.sqrt(backend.norm_squared(Y))[..., None, None]
    shift = eps * xp.where(norm > 0, norm, xp.ones_like(norm))
    Y = Y + xp.astype(shift, Y.dtype) * Q
    core = backend.gram(Q, Y)
    L = backend.cholesky((core + matrix_h(core, xp)) / 2)
    check_positive_semidefinite(backend, L)
    B = Y @ xp.astype(matrix_h(backend.small_inverse(L), xp), Y.dtype, copy=False)
    if A.is_eager:
        V, S, _ = tall_svd([B], spectrum(backend.gram(B), backend), rank, backend)
    else:
        V, S, _ = by_triangle(B, lambda E: B @ E, rank, backend)
    w = S**2 - xp.astype(shift[..., 0], S.dtype)
    return xp.maximum(w, xp.zeros_like(w)), V
