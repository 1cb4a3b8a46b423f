"""Nearest matrix that is of low rank and sparse at once."""

import math
from typing import Any, NamedTuple

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra._validate import (
    check_choice,
    check_count,
    check_finite,
    check_known_weight,
    check_matrix,
    check_positive,
    check_rank,
    promote,
    resolve,
)
from slra.solvers._loop import inner
from slra.svd._linear_map import brought_in_range, scaled_back
from slra.svd.truncated import thin_svd

__all__ = ["SparseLowRankResult", "sparse_low_rank"]

MAX_INNER = 300
# A step is taken if it lowers the objective by this much times its squared length.
SUFFICIENT = 0.1
SHORTEST_STEP = 1e-10


class SparseLowRankResult(NamedTuple):
    """A stationary point of the sparse low-rank problem.

    Attributes
    ----------
    x : array, shape (m, n)
        ``left @ right``.
    left : array, shape (m, rank)
        Left singular vectors times singular values.
    right : array, shape (rank, n)
        Orthonormal rows.
    objective : array, shape (n_iter + 1,)
        Objective at the start and after each iteration; it never rises.
    stationarity : float
        Upper bound on the norm of the step that the exact tangent problem would take, over ``||x||_F``.
    converged : bool
        Whether ``stationarity`` is at most ``tol``.
    lower_bound : float
        No matrix of this rank has a smaller objective: where ``objective[-1]`` equals it, the result is the global
        minimiser.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> result = slra.sparse_low_rank(np.diag([3.0, 2.0, 0.5]), 2, 1.0)
    >>> np.diag(result.x).round(6).tolist(), result.left.shape, result.right.shape
    ([2.0, 1.0, 0.0], (3, 2), (2, 3))
    >>> bool(result.objective[-1] - result.lower_bound < 1e-9)
    True
    """

    x: Array
    left: Array
    right: Array
    objective: Array
    stationarity: float
    converged: bool
    lower_bound: float


class _Point(NamedTuple):
    """A matrix of fixed rank by its singular triplets, and its objective."""

    U: Array
    Vh: Array
    left: Array
    x: Array
    objective: float


class _Tangent(NamedTuple):
    """Solution of the tangent problem, the dual matrix that proves it, and how well."""

    x: Array
    dual: Array
    error: float


@isolated
def sparse_low_rank(
    x: Array,
    rank: int,
    l1: float,
    *,
    start: str = "best",
    tol: float = 1e-5,
    max_iter: int = 200,
) -> SparseLowRankResult:
    r"""Approximate a matrix by one of low rank whose entries pay an l1 penalty.

    Parameters
    ----------
    x : array, shape (m, n)
        Real or complex floating; half precision is computed in float32. Values must be there to be looked at, so
        traced and Dask arrays are refused.
    rank : int
        Between 1 and ``min(m, n)``.
    l1 : float or 0-d array
        Weight of the l1 norm, 0 or more.
    start : {"best", "soft", "svd"}
        Where to start: from the truncated SVD of the soft-thresholded ``x`` or of ``x``; "best" runs both and returns
        the lower.
    tol : float
        Stop when the stationarity is at most this. A gap is known to half the digits of the dtype: a tolerance below
        four times the root of their spacing at 1 (1.4e-3 in float32, 6e-8 in float64) is raised to that.
    max_iter : int
        Largest number of iterations from a start.

    Returns
    -------
    SparseLowRankResult
        In the dtype and on the device of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or an option is of a wrong type.
    ValueError
        If ``x`` is not one matrix, is empty, has NaN or infinity, or has values that cannot be looked at; if an option
        is out of range.

    Notes
    -----
    .. math:: \min_X \tfrac12 \|x - X\|_F^2 + \ell_1 \|X\|_1 \quad \text{subject to} \quad \operatorname{rank}(X) \le r

    The problem is not convex, and different starts can end in different points. Manifold proximal gradient: with T
    the tangent space of the matrices of rank r at X, the convex problem

    .. math:: Z = \arg\min_{Z \in T} \tfrac12 \|x - Z\|_F^2 + \ell_1 \|Z\|_1

    is solved through its dual (``|W| <= l1``, ``Z = P_T(x - W)``) to a duality gap, and ``X + a (Z - X)`` is truncated
    to rank r with the step halved until the objective falls by ``a/10 ||Z - X||^2``. The objective therefore never
    rises, and limit points of full rank r are stationary: ``Z = X``. What the result does not promise is the global
    minimum; ``lower_bound = 1/2 ||x||^2 - 1/2 sum_{i<=r} sigma_i(x - W)^2`` tells how far it can be.

    References
    ----------
    S. Chen, S. Ma, A. M.-C. So, T. Zhang, Proximal gradient method for nonsmooth optimization over the Stiefel
    manifold, SIAM Journal on Optimization 30 (2020), 210-239; the bound: C. Grussler, A. Rantzer, P. Giselsson,
    Low-rank optimization with convex constraints, IEEE Transactions on Automatic Control 63 (2018), 4000-4007.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.zeros((6, 5))
    >>> x[:3, :2] = 4.0
    >>> x[5, 4] = 0.5
    >>> result = slra.sparse_low_rank(x, 1, 1.0)
    >>> bool(np.allclose(result.x[:3, :2], 3.0)), float(result.x[5, 4])
    (True, 0.0)
    """
    backend = resolve(x=x)
    check_matrix(x, "x")
    if x.ndim != 2:
        raise ValueError(f"x must be one matrix, (m, n), got shape {tuple(x.shape)}")
    rank = check_rank(rank, min(x.shape), limit_is="min of the last two axes of x")
    l1 = check_known_weight(backend, l1, "l1")
    check_choice(start, ("best", "soft", "svd"), "start")
    n_max = check_count(max_iter, "max_iter")
    if not backend.can_iterate(x):
        raise ValueError(
            "x must have values that can be looked at: sparse_low_rank iterates until they say so, "
            "which neither a traced function nor a lazy array can follow"
        )
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    check_finite(backend, work, "x")
    tol = max(check_positive(tol, "tol"), 4 * float(backend.xp.finfo(work.dtype).eps) ** 0.5)
    work, exponent = brought_in_range(work, backend)
    peak = float(backend.xp.max(backend.xp.abs(work))) or 1.0
    starts = ("soft", "svd") if start == "best" else (start,)
    # Beyond 1 the solution is zero, whatever the weight, which may be infinite here.
    weight = min(l1 / _scaled_back(peak, exponent), 2.0)
    results = [_descend(work / peak, rank, weight, s, tol, n_max, backend) for s in starts]
    best = min(results, key=lambda result: float(result.objective[-1]))
    parts = [scaled_back(x * peak, exponent, backend) for x in (best.x, best.left)]
    values = scaled_back(best.objective[:, None] * peak * peak, exponent, backend)
    values = scaled_back(values, exponent, backend)[:, 0]
    approx, left, right, values = promoted.cast_back(backend, *parts, best.right, values)
    bound = _scaled_back(_scaled_back(best.lower_bound * peak * peak, exponent), exponent)
    return SparseLowRankResult(
        approx, left, right, values, best.stationarity, best.converged, bound
    )


def _scaled_back(number: float, exponent: Array | None) -> float:
    """Undo the scaling on a number, which may become infinite."""
    if exponent is None:
        return number
    back = -int(exponent[0, 0])
    return number * 2.0 ** (back // 2) * 2.0 ** (back - back // 2)


def _descend(
    x: Array, rank: int, l1: float, start: str, tol: float, max_iter: int, backend: Backend
) -> SparseLowRankResult:
    xp = backend.xp
    size = _norm(x, backend) or 1.0
    begin = x if start == "svd" else backend.soft_threshold(x, l1)
    point = _truncate(x, begin, rank, l1, backend)
    history = [point.objective]
    tangent = _Tangent(point.x, xp.zeros_like(x), math.inf)
    for iteration in range(max_iter + 1):
        tangent = _solve_tangent(x, point, tangent.dual, l1, tol * size, backend)
        stationarity = (_norm(tangent.x - point.x, backend) + tangent.error) / size
        if stationarity <= tol or iteration == max_iter:
            break
        following = _line_search(x, point, tangent.x, rank, l1, backend)
        if following is None:
            break
        point = following
        history.append(point.objective)
    # Any dual matrix gives a bound; the second one is the better where the result is close to zero.
    duals = (tangent.dual, x - backend.soft_threshold(x, l1))
    bound = max(_lower_bound(x, dual, rank, backend) for dual in duals)
    objective = xp.asarray(
        history, dtype=backend.real_dtype(x.dtype), device=backend.creation_device(x)
    )
    return SparseLowRankResult(
        point.x, point.left, point.Vh, objective, stationarity, stationarity <= tol, bound
    )


def _lower_bound(x: Array, dual: Array, rank: int, backend: Backend) -> float:
    """Minimum over all matrices of the rank of ``1/2 ||x - X||^2 + <dual, X>``."""
    S = thin_svd(x - dual, backend)[1]
    return (_norm(x, backend) ** 2 - _norm(S[:rank], backend) ** 2) / 2


def _objective(x: Array, approx: Array, l1: float, backend: Backend) -> float:
    return _norm(x - approx, backend) ** 2 / 2 + l1 * float(backend.xp.sum(backend.xp.abs(approx)))


def _norm(x: Array, backend: Backend) -> float:
    return float(backend.xp.linalg.vector_norm(x))


def _truncate(x: Array, whole: Array, rank: int, l1: float, backend: Backend) -> _Point:
    return _as_point(x, *(thin_svd(whole, backend)), rank, l1, backend)


def _as_point(
    x: Array, U: Array, S: Array, Vh: Array, rank: int, l1: float, backend: Backend
) -> _Point:
    U, Vh = U[:, :rank], Vh[:rank, :]
    left = U * S[:rank]
    approx = left @ Vh
    return _Point(U, Vh, left, approx, _objective(x, approx, l1, backend))


def _line_search(
    x: Array, point: _Point, target: Array, rank: int, l1: float, backend: Backend
) -> _Point | None:
    """Truncate ``X + a (Z - X)`` to the rank, halving a until the objective falls enough."""
    direction = target - point.x
    square = _norm(direction, backend) ** 2
    step = 1.0
    while step > SHORTEST_STEP:
        candidate = _retract(x, point, point.x + step * direction, rank, l1, backend)
        if candidate.objective <= point.objective - SUFFICIENT * step * square:
            return candidate
        step /= 2
    return None


def _retract(
    x: Array, point: _Point, whole: Array, rank: int, l1: float, backend: Backend
) -> _Point:
    """Nearest matrix of the rank to one in the tangent space, through its factors of twice the rank."""
    xp = backend.xp
    if 2 * rank >= min(x.shape):
        return _truncate(x, whole, rank, l1, backend)
    U, Vh = point.U, point.Vh
    rows = matrix_h(U, xp) @ whole
    columns = (whole - U @ rows) @ matrix_h(Vh, xp)
    Q, R = backend.qr(xp.concat([U, columns], axis=1))
    P, L = backend.qr(matrix_h(xp.concat([rows, Vh], axis=0), xp))
    W, S, Th = backend.small_svd(R @ matrix_h(L, xp))
    return _as_point(x, Q @ W, S, Th @ matrix_h(P, xp), rank, l1, backend)


def _project_tangent(whole: Array, point: _Point, xp: Any) -> Array:
    """Project on the tangent space: the part in the range of U or the row space of Vh."""
    rows = matrix_h(point.U, xp) @ whole
    columns = (whole - point.U @ rows) @ matrix_h(point.Vh, xp)
    return point.U @ rows + columns @ point.Vh


def _solve_tangent(
    x: Array, point: _Point, dual: Array, l1: float, tol: float, backend: Backend
) -> _Tangent:
    """Accelerated projected gradient on the dual, whose gradient ``Z`` is 1-Lipschitz, with restart.

    The gap is ``l1 ||Z||_1 - <W, Z>``, and ``||Z - Z*||^2 <= 2 gap`` because the primal is strongly convex.
    """
    xp = backend.xp
    last, t = dual, 1.0
    for _ in range(MAX_INNER):
        Z = _project_tangent(x - dual, point, xp)
        # Entry by entry, each 0 or more: a difference of two sums would cancel.
        inside = xp.real(xp.conj(dual) * Z) if backend.is_complex(x) else dual * Z
        gap = max(0.0, float(xp.sum(l1 * xp.abs(Z) - inside)))
        # Half of the step that it decides, or of the step that would end the descent.
        if math.sqrt(2 * gap) <= 0.5 * max(tol, _norm(Z - point.x, backend)):
            break
        ascended = dual + Z
        following = ascended - backend.soft_threshold(ascended, l1)
        move = following - last
        # Momentum that points away from the gradient is dropped.
        if float(inner(dual - following, move, backend)) > 0:
            t, dual = 1.0, following
        else:
            t, old = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            dual = following + (old - 1) / t * move
            dual = dual - backend.soft_threshold(dual, l1)
        last = following
    return _Tangent(Z, dual, math.sqrt(2 * gap))
