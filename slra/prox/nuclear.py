"""The nuclear norm: soft thresholding of singular values, by as few of them as it takes."""

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.cholesky_qr import orthonormal, tall_qr
from slra._backends.standard import matrix_h
from slra._typing import RNG, Array
from slra._validate import (
    check_draws,
    check_flag,
    check_matrix,
    check_tau,
    promote,
    resolve,
)
from slra.prox.rank import filtered, masked_svd
from slra.svd import SVDResult
from slra.svd._inputs import near_one
from slra.svd._linear_map import brought_in_range, power_of_two, scaled_back, scaling_exponent

__all__ = ["norm_nuclear", "prox_nuclear", "shrink_singular_values"]

# Below this length of the short side a full SVD is as fast as a partial one.
MIN_PARTIAL = 100
# Columns beyond the rank of the last call: they find what is new.
N_FRESH = 8


@isolated
def prox_nuclear(
    x: Array,
    tau: float | Array,
    *,
    warm_start: Array | None = None,
    return_factors: bool = False,
    rng: RNG = None,
) -> Array | SVDResult:
    r"""Soft-threshold the singular values: the proximal operator of ``tau * ||x||_*``.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating.
    tau : float or array
        Threshold, 0 or more; an array broadcasts to ``x`` and has length one along the last two axes.
    warm_start : array, shape (k, n), optional
        ``Vh`` of an earlier call on a similar matrix, to start from. Any ``k``, 0 too. Changes the time, not the
        result. Used where values can be looked at and ``x`` is one matrix.
    return_factors : bool
        Return the factors of the result instead of their product.
    rng : int, numpy.random.Generator or None
        Where the start of a partial SVD is drawn from.

    Returns
    -------
    array or SVDResult
        The shape, dtype and device of ``x``. With ``return_factors`` an `SVDResult` with the shrunk singular values:
        those that are positive (in a batch as many as the largest rank; all, the rest zero, where values cannot be
        looked at). A matrix with NaN or infinity gives one full of NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, ``warm_start`` not an array
        of the same library, or ``rng`` of a wrong type.
    ValueError
        If ``x`` has fewer than two axes or an empty one; if ``tau`` is negative or not finite, or does not fit ``x``;
        if ``warm_start`` has another number of columns than ``x``, or NaN or infinity.

    Notes
    -----
    .. math:: \operatorname{prox}(x) = \sum_i \max(\sigma_i - \tau, 0)\, u_i v_i^H

    One large matrix whose values can be looked at is decomposed only as far as ``tau``: block subspace iteration with
    Rayleigh-Ritz, from ``warm_start`` and a few random vectors, more of them while the smallest Ritz value exceeds
    ``tau``. With ``R = x V - U S`` over the kept triplets, whose left equation holds exactly, the result is the exact
    operator of ``x - R V^H``, so its error is at most ``||R||_F`` because the operator is non-expansive. The iteration
    ends when ``||R||_F <= 10 eps sqrt(max(m, n)) sigma_1`` and the residuals of the triplets below ``tau`` leave them
    below it; where it would cost more than a full SVD, that is taken. Everything else is a full SVD too.

    References
    ----------
    J.-F. Cai, E. J. Candes, Z. Shen, A singular value thresholding algorithm for matrix completion,
    SIAM Journal on Optimization 20 (2010), 1956-1982, Theorem 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_nuclear(np.diag([3.0, 2.0, 1.0]), 1.5).tolist()
    [[1.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    backend = resolve(x=x, optional={"warm_start": warm_start})
    check_matrix(x, "x")
    promoted = promote(backend, x=x, warm_start=warm_start)
    work, basis = promoted.arrays
    tau = check_tau(backend, work, tau, axes=(x.ndim - 2, x.ndim - 1))
    source = check_draws(backend, work, rng)
    check_flag(return_factors, "return_factors")
    if basis is not None and (basis.ndim != 2 or basis.shape[1] != x.shape[-1]):
        raise ValueError(
            f"warm_start must have shape (k, {x.shape[-1]}) for x of shape {tuple(x.shape)}, "
            f"got {tuple(basis.shape)}"
        )
    if basis is not None:
        basis = near_one(basis, "warm_start", backend)
    if not return_factors and not backend.is_eager(work):
        return promoted.cast_back(
            backend, filtered(work, lambda S: _shrinkage(S, tau, backend), backend)
        )[0]
    work, exponent = brought_in_range(work, backend)
    if exponent is not None:
        tau = power_of_two(tau * backend.xp.ones_like(exponent), exponent, backend)
    U, S, Vh = shrink_singular_values(work, tau, basis, source, backend)
    if return_factors:
        S = scaled_back(S[..., None, :], exponent, backend)[..., 0, :]
        return SVDResult(*promoted.cast_back(backend, U, S, Vh))
    low_rank = scaled_back((U * S[..., None, :]) @ Vh, exponent, backend)
    return promoted.cast_back(backend, low_rank)[0]


@isolated
def norm_nuclear(x: Array) -> Array:
    r"""Sum of singular values, the function behind `prox_nuclear`.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating.

    Returns
    -------
    array, shape (...)
        Real; float32 for half precision; NaN for a matrix with NaN or infinity.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array.
    ValueError
        If ``x`` has fewer than two axes or an empty one.

    Notes
    -----
    .. math:: \|x\|_* = \sum_i \sigma_i

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> round(float(prox.norm_nuclear(np.diag([3.0, -2.0, 1.0]))), 12)
    6.0
    """
    backend = resolve(x=x)
    check_matrix(x, "x")
    (x,) = promote(backend, x=x).arrays
    x, exponent = brought_in_range(x, backend)
    total = backend.xp.sum(masked_svd(x, backend).S, axis=-1)[..., None, None]
    return scaled_back(total, exponent, backend)[..., 0, 0]


def shrink_singular_values(
    x: Array,
    tau: float | Array,
    basis: Array | None,
    rng: np.random.Generator | int | None,
    backend: Backend,
    *,
    tol: float | None = None,
) -> SVDResult:
    """Singular triplets of ``x`` above ``tau``, less ``tau``; ``tol`` is the residual allowed over sigma_1."""
    xp = backend.xp
    eager = backend.is_eager(x)
    if eager and x.ndim == 2 and min(x.shape) >= MIN_PARTIAL and _is_harmless(x, backend):
        if tol is None:
            tol = 10 * float(xp.finfo(x.dtype).eps) * max(x.shape) ** 0.5
        assert isinstance(rng, np.random.Generator)
        found = _partial_svd(x, _number(tau, backend), basis, rng, tol, backend)
    else:
        found = None
    U, S, Vh = masked_svd(x, backend) if found is None else found
    S = backend.nonneg_threshold(S, _level(tau))
    if eager:
        rank = int(xp.max(xp.count_nonzero(S, axis=-1)))
        U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    return SVDResult(U, S, Vh)


def _number(tau: float | Array, backend: Backend) -> float:
    """Threshold of one matrix."""
    return tau if isinstance(tau, float) else float(backend.xp.reshape(tau, ()))


def _level(tau: float | Array) -> float | Array:
    """Threshold for singular values, (..., k), from one for matrices."""
    return tau if isinstance(tau, float) or tau.ndim == 0 else tau[..., 0]


def _shrinkage(S: Array, tau: float | Array, backend: Backend) -> Array:
    """Part of each singular value that the threshold leaves."""
    positive = backend.xp.where(S > 0, S, backend.xp.ones_like(S))
    return backend.nonneg_threshold(S, _level(tau)) / positive


def _is_harmless(x: Array, backend: Backend) -> bool:
    """Whether ``x`` is finite and squares of its entries stay in range."""
    largest = backend.max_abs(x)
    return bool(backend.xp.isfinite(largest)) and scaling_exponent(largest, backend) is None


def _partial_svd(
    x: Array,
    tau: float,
    basis: Array | None,
    rng: np.random.Generator,
    tol: float,
    backend: Backend,
) -> SVDResult | None:
    """Singular triplets down to below ``tau``, or None where finding them costs more than a full SVD."""
    xp = backend.xp
    xh, shortest = matrix_h(x, xp), min(x.shape)
    known = 0 if basis is None else basis.shape[0]
    V = backend.test_matrix((x.shape[1], N_FRESH if known else 2 * N_FRESH), rng, x)
    if known:
        V = xp.concat([matrix_h(basis, xp), V], axis=1)
    last: SVDResult | None = None
    spent = 0.0
    while spent < 1:
        width = V.shape[1]
        if 4 * width > shortest:
            return None
        spent += width / shortest
        image = x @ V
        if last is not None and _is_found(image, last, tau, tol, backend):
            return last
        Q = orthonormal(image, backend)
        Z, R = tall_qr(xh @ Q, backend)
        W, S, Th = backend.small_svd(R)
        V = Z @ W
        last = SVDResult(Q @ matrix_h(Th, xp), S, matrix_h(V, xp))
        if float(S[-1]) > tau:
            more = backend.test_matrix((x.shape[1], width), rng, x)
            V, last = xp.concat([V, more], axis=1), None
    return None


def _is_found(image: Array, found: SVDResult, tau: float, tol: float, backend: Backend) -> bool:
    """Whether the triplets above ``tau`` are accurate and the others certain to lie below it."""
    xp = backend.xp
    U, S, _ = found
    scale = float(S[0])
    if scale == 0:
        return True
    errors = xp.linalg.vector_norm((image - U * S) / scale, axis=0)
    is_kept = xp.astype(tau < S, S.dtype)
    accurate = float(xp.sum(is_kept * errors * errors)) <= tol * tol
    return accurate and bool(xp.all((errors <= tol) | (S + errors * scale <= tau)))
