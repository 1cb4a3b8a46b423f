"""Principal component pursuit: a low-rank matrix and a sparse one out of their sum."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import RNG, Array
from slra._validate import (
    check_count,
    check_finite,
    check_matrix,
    check_positive,
    check_rng,
    is_kind,
    promote,
    resolve,
)
from slra.prox.nuclear import shrink_singular_values
from slra.svd import randomized_svd
from slra.svd._linear_map import brought_in_range, scaled_back

__all__ = ["RobustPCAResult", "robust_pca"]

# The dual residual may be this many times the primal one: it is a number of order one, not of x's accuracy.
DUAL_SLACK = 10.0
PENALTY_GROWTH = 1.5


class RobustPCAResult(NamedTuple):
    """A matrix taken apart, ``x ~ low_rank + sparse``.

    Attributes
    ----------
    low_rank, sparse : array, shape (m, n)
        The two parts; ``sparse`` is zero where nothing was observed.
    n_iter : int
        Number of iterations made.
    residual : float
        What ``tol`` is compared with: the larger of the relative primal residual and a tenth of the dual one.
    converged : bool
        Whether ``residual`` is at most ``tol``.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.ones((20, 20))
    >>> x[3, 4] = 9.0
    >>> result = slra.robust_pca(x)
    >>> result.converged, float(result.sparse[3, 4].round(3)), float(result.low_rank[3, 4].round(3))
    (True, 8.0, 1.0)
    """

    low_rank: Array
    sparse: Array
    n_iter: int
    residual: float
    converged: bool


class _State(NamedTuple):
    sparse: Array
    multiplier: Array
    penalty: float
    basis: Array | None
    low_rank: Array
    primal: float
    dual: float

    @property
    def residual(self) -> float:
        return max(self.primal, self.dual / DUAL_SLACK)


@isolated
def robust_pca(
    x: Array,
    l1: float | None = None,
    *,
    mask: Array | None = None,
    tol: float = 1e-7,
    max_iter: int = 500,
    rng: RNG = None,
) -> RobustPCAResult:
    r"""Split a matrix into a low-rank and a sparse part (principal component pursuit).

    Parameters
    ----------
    x : array, shape (m, n)
        Real or complex floating; half precision is computed in float32. Values must be there to be looked at: the
        number of iterations and the ranks depend on them, so traced and Dask arrays are refused.
    l1 : float, optional
        Weight of the sparse part; ``1 / sqrt(max(m, n))`` by default, over the root of the observed fraction.
    mask : boolean array, shape (m, n), optional
        True where ``x`` was observed; anything may stand elsewhere, NaN too.
    tol : float
        Relative residual to stop at; taken to be at least 30 times the spacing of numbers at 1 (3.6e-6 in float32).
    max_iter : int
        Largest number of iterations.
    rng : int, numpy.random.Generator or None
        Where the starts of the partial SVDs are drawn from.

    Returns
    -------
    RobustPCAResult
        In the dtype and on the device of ``x``. ``converged`` is False where ``max_iter`` came first.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``mask`` not a boolean array of the same library, or an option of a wrong
        type.
    ValueError
        If ``x`` is not one matrix, is empty, has NaN or infinity where observed, or has values that cannot be looked
        at; if ``mask`` has another shape or is False everywhere; if an option is out of range.

    Notes
    -----
    .. math:: \min_{L, S} \|L\|_* + \ell_1 \|S\|_1 \quad \text{subject to} \quad L + S = x \text{ where observed}

    by inexact augmented Lagrangian: singular values of ``x - S + Y/mu`` shrink by ``1/mu`` (partial SVD from the last
    basis, its accuracy tied to the residual), entries of ``x - L + Y/mu`` by ``l1/mu``, then ``Y += mu (x - L - S)``.
    After each iteration ``Y`` is in ``l1`` times the subdifferential of ``||S||_1`` exactly, and misses that of
    ``||L||_*`` by ``mu (S - S_old)``, the dual residual, here relative to ``||Y||_F``. The usual penalty grows
    geometrically and stops on the primal residual alone; with dense noise it then stops short of a minimiser. Here
    the penalty grows while the primal residual is behind, falls where the dual one is far behind, and both are asked
    for. The problem is convex: what converged is a solution, up to the residual.

    References
    ----------
    E. J. Candes, X. Li, Y. Ma, J. Wright, Robust principal component analysis?, Journal of the ACM 58 (2011), 11;
    Z. Lin, M. Chen, Y. Ma, The augmented Lagrange multiplier method for exact recovery of corrupted low-rank matrices,
    arXiv:1009.5055 (2010), Algorithm 5.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.arange(1.0, 31.0), np.ones(20))
    >>> x[3, 4] += 100
    >>> result = slra.robust_pca(x, rng=0)
    >>> result.converged, round(float(result.sparse[3, 4]), 3)
    (True, 100.0)
    """
    backend = resolve(x=x, optional={"mask": mask})
    check_matrix(x, "x")
    if x.ndim != 2:
        raise ValueError(f"x must be one matrix, (m, n), got shape {tuple(x.shape)}")
    if not backend.is_eager(x):
        raise ValueError(
            "x must have values that can be looked at: robust_pca iterates until they say so, "
            "which neither a traced function nor a lazy array can follow"
        )
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    observed = _observed(mask, x, backend)
    if mask is not None:
        work = backend.xp.where(mask, work, 0.0)
    check_finite(backend, work, "x")
    if l1 is None:
        l1 = 1 / math.sqrt(observed * max(x.shape))
    weight = check_positive(l1, "l1", limits=backend.xp.finfo(work.dtype))
    tol = max(check_positive(tol, "tol"), 30 * float(backend.xp.finfo(work.dtype).eps))
    generator = check_rng(rng)
    if (limit := check_count(max_iter, "max_iter")) == 0:
        raise ValueError("max_iter must be 1 or more, got 0")
    work, exponent = brought_in_range(work, backend)
    result = _pursue(work, weight, mask, tol, limit, generator, backend)
    parts = [scaled_back(x, exponent, backend) for x in (result.low_rank, result.sparse)]
    low_rank, sparse = promoted.cast_back(backend, *parts)
    return result._replace(low_rank=low_rank, sparse=sparse)


def _observed(mask: Array | None, x: Array, backend: Backend) -> float:
    """Fraction of entries that a mask lets through."""
    if mask is None:
        return 1.0
    if not is_kind(backend.xp, mask.dtype, "bool"):
        raise TypeError(f"mask must be boolean, True where x was observed, got {mask.dtype}")
    if tuple(mask.shape) != tuple(x.shape):
        raise ValueError(
            f"mask must have the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
    n_observed = int(backend.xp.count_nonzero(mask))
    if n_observed == 0:
        raise ValueError("mask must be True somewhere")
    return float(n_observed / math.prod(x.shape))


def _pursue(
    x: Array,
    l1: float,
    mask: Array | None,
    tol: float,
    max_iter: int,
    rng: np.random.Generator,
    backend: Backend,
) -> RobustPCAResult:
    xp = backend.xp
    zero = xp.zeros_like(x)
    peak = float(xp.max(xp.abs(x)))
    if peak == 0:
        return RobustPCAResult(zero, zero, 0, 0.0, True)
    x = x / peak
    largest = float(randomized_svd(x, 1, rng=rng).S[0])
    # Where nothing was observed the sparse part costs nothing and takes up what is left over.
    weight = l1 if mask is None else xp.where(mask, xp.full_like(xp.abs(x), l1), 0.0)
    start = x / max(largest, 1 / l1)
    state = _State(zero, start, 1.25 / largest, None, zero, 1.0, 1.0)
    for n_iter in itertools.count(1):
        state = _step(x, weight, state, tol, rng, backend)
        if state.residual <= tol or n_iter == max_iter:
            break
    sparse = state.sparse if mask is None else xp.where(mask, state.sparse, 0.0)
    return RobustPCAResult(
        state.low_rank * peak, sparse * peak, n_iter, state.residual, state.residual <= tol
    )


def _step(
    x: Array,
    weight: float | Array,
    state: _State,
    tol: float,
    rng: np.random.Generator,
    backend: Backend,
) -> _State:
    xp = backend.xp
    mu = state.penalty
    svd_tol = max(min(1e-3, state.primal / 10), tol / 100)
    shifted = x + state.multiplier / mu
    U, S, Vh = shrink_singular_values(
        shifted - state.sparse, 1 / mu, state.basis, rng, backend, tol=svd_tol
    )
    low_rank = (U * S) @ Vh
    rest = shifted - low_rank
    sparse = backend.soft_threshold(rest, weight / mu)
    # Y + mu (x - L - S), whose entries are those that the threshold has taken off.
    multiplier = mu * (rest - sparse)

    def norm(a: Array) -> float:
        return float(xp.linalg.vector_norm(a))

    primal = norm(multiplier - state.multiplier) / mu / norm(x)
    dual = mu * norm(sparse - state.sparse) / (norm(multiplier) or 1.0)
    lead = primal * DUAL_SLACK / dual if dual > 0 else math.inf
    # Rounding ends the fall of the dual residual sooner where the penalty is large.
    if lead < 0.01 or primal < tol / 4:
        mu /= PENALTY_GROWTH
    elif lead > 0.1:
        mu *= PENALTY_GROWTH
    return _State(sparse, multiplier, mu, Vh, low_rank, primal, dual)
