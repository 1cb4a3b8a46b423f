"""How far an approximation is from its matrix, by a few products with both."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from slra._backends.ambient import isolated
from slra._typing import RNG, Array, DeviceGenerator
from slra._validate import check_factors, check_flag, check_rank
from slra.svd._inputs import Problem, check_source, draw, read
from slra.svd._linear_map import brought_in_range, power_of_two, scaled_back
from slra.svd._result import CenteredSVDResult

__all__ = ["ErrorEstimate", "estimate_error"]

_CONFIDENCE = 0.99


class ErrorEstimate(NamedTuple):
    """Estimated norms of ``x - approx``, one for each matrix of a batch, real.

    Attributes
    ----------
    frobenius : array, shape (...,)
        Estimate of the Frobenius norm; the mean of its square is exact.
    spectral : array, shape (...,)
        Upper bound of the spectral norm, with probability 0.99 or more.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.diag([3.0, 2.0, 1.0])
    >>> error = slra.estimate_error(x, slra.truncated_svd(x, 2), rng=0)
    >>> bool(error.frobenius < error.spectral)
    True
    """

    frobenius: Array
    spectral: Array


@isolated
def estimate_error(
    x: Any,
    approx: Sequence[Array],
    *,
    center: bool = False,
    n_probes: int = 10,
    rng: RNG | DeviceGenerator = None,
) -> ErrorEstimate:
    """Estimate the norms of ``x - approx`` from products with Gaussian vectors.

    Parameters
    ----------
    x : array of shape (..., m, n), sparse matrix, linear operator or MatrixOperator
        As in `randomized_svd`.
    approx : SVDResult, or a pair of arrays
        ``(U, S, Vh)``, or ``(left, right)`` of shapes (..., m, k) and (..., k, n), in the dtype of ``x``.
    center : bool
        Subtract the mean of each column of ``x`` first. It is in any case where ``approx`` comes with ``mean``, from a
        decomposition with ``center=True``.
    n_probes : int
        Number of Gaussian vectors, each multiplied by ``x`` and by the approximation.
    rng : int, numpy.random.Generator or None; cupy.random.Generator, torch.Generator
        Where they are drawn from, as in `randomized_svd`; not the seed of the approximation, whose error is small on
        its own test matrix.

    Returns
    -------
    ErrorEstimate
        ``frobenius`` and ``spectral``, each of the batch's shape, in the real dtype of ``x`` (float32 for half).

    Raises
    ------
    TypeError
        If ``x`` or a factor is not a floating array, or the two come from different libraries or in different dtypes.
    ValueError
        If shapes do not match, ``x`` is not finite, or ``n_probes`` is less than 1; inside a traced function, unless
        ``rng`` is an int.

    Notes
    -----
    With ``E = x - approx`` and ``p`` probes ``w``: ``frobenius = sqrt(mean ||E w||^2)``. In the worst case, an error of
    rank one, its square is ``||E||_F^2`` times a chi-squared variable with ``p`` degrees of freedom over ``p``: for
    p = 10, between 0.46 and 1.6 times the norm with probability 0.99; an error of high rank is estimated far better.
    ``spectral = a * sqrt(2/pi) * max ||E w||`` with ``a = 100**(1/p)`` is too small with probability ``a**-p = 0.01``.

    References
    ----------
    N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, SIAM Review 53 (2011), 217-288,
    Lemma 4.1. H. Avron, S. Toledo, Randomized algorithms for estimating the trace of an implicit symmetric positive
    semi-definite matrix, J. ACM 58 (2011), 8.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.diag(1 / np.arange(1.0, 101))
    >>> found = slra.estimate_error(x, slra.truncated_svd(x, 10), rng=0)
    >>> exact = np.linalg.norm(1 / np.arange(11.0, 101))
    >>> bool(0.5 * exact < found.frobenius < 1.6 * exact), bool(found.spectral > 1 / 11)
    (True, True)
    """
    center = check_flag(center, "center") or isinstance(approx, CenteredSVDResult)
    problem = read(x, center=center, adjoint="other" if center else "unused")
    A, backend = problem.A, problem.A.backend
    xp = backend.xp
    n_probes = check_rank(n_probes, 1 << 30, "n_probes")
    source = check_source(A, rng)
    factors = check_factors(backend, A.shape, A.like, approx)
    with backend.ignore_overflow():
        omega = draw(A, n_probes, source)
        difference, exponent = _difference(problem, factors, omega)
        wide = xp.astype(difference, backend.accumulation_dtype(difference), copy=False)
        squares = xp.sum(backend.real_part(wide * backend.conj(wide)), axis=-2)
        factor = (1 / (1 - _CONFIDENCE)) ** (1 / n_probes) * math.sqrt(2 / math.pi)
        norms = xp.stack(
            [xp.sqrt(xp.mean(squares, axis=-1)), factor * xp.sqrt(xp.max(squares, axis=-1))],
            axis=-1,
        )
        norms = xp.astype(norms, backend.real_dtype(A.like.dtype))
        norms = scaled_back(norms[..., None, :], exponent, backend)[..., 0, :]
    return ErrorEstimate(norms[..., 0], norms[..., 1])


def _difference(problem: Problem, factors: list[Array], omega: Array) -> tuple[Array, Array | None]:
    """Return ``(x - left right) omega`` times ``2**exponent``, which keeps squares in range, and the exponent.

    It is that of the larger of the two: an approximation may be of quite another size than the matrix.
    """
    A, backend = problem.A, problem.A.backend
    xp = backend.xp
    left, *values, right = factors
    named = [left, *(S[..., None, :] for S in values), right]
    (left, *values, right), exponents = zip(
        *(brought_in_range(x, backend) for x in named), strict=True
    )
    image, product = A.matmat(omega), (left * values[0] if values else left) @ (right @ omega)
    known = [exponent for exponent in exponents if exponent is not None]
    if problem.exponent is None and not known:
        return image - product, None
    size = backend.max_abs(product)[..., None, None]
    zero = xp.zeros_like(size)
    of_x = zero if problem.exponent is None else problem.exponent[..., None, None]
    of_factors = sum(known, zero)
    logarithm = xp.floor(xp.log2(xp.where(size > 0, size, xp.ones_like(size))))
    exponent = xp.where(size > 0, xp.minimum(of_x, of_factors - logarithm), of_x)
    image = power_of_two(image, exponent - of_x, backend)
    change = xp.where(size > 0, exponent - of_factors, zero)
    return image - power_of_two(product, change, backend), exponent
