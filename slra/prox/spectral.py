"""Projections of matrices through their eigenvalues or singular values: the semidefinite cone, the nuclear ball."""

import math

from slra._backends.ambient import isolated
from slra._backends.standard import matrix_h
from slra._typing import Array
from slra._validate import check_matrix, check_tau, promote, resolve
from slra.prox.linf import simplex_level
from slra.prox.rank import masked_svd
from slra.svd._linear_map import brought_in_range, power_of_two, scaled_back

__all__ = ["project_nuclear_ball", "project_psd"]


@isolated
def project_psd(x: Array) -> Array:
    r"""Nearest Hermitian positive semidefinite matrix.

    Parameters
    ----------
    x : array, shape (..., n, n)
        Real or complex floating; of what is not Hermitian the Hermitian part is taken.

    Returns
    -------
    array
        The shape, dtype and device of ``x``, Hermitian. A matrix with NaN or infinity gives one full of NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array.
    ValueError
        If ``x`` has fewer than two axes or an empty one, or is not square in the last two.

    Notes
    -----
    .. math:: P(x) = \sum_i \max(\lambda_i, 0)\, v_i v_i^H

    References
    ----------
    N. J. Higham, Computing a nearest symmetric positive semidefinite matrix, Linear Algebra and its Applications 103
    (1988), 103-118.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_psd(np.diag([3.0, -2.0])).round(12).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    backend = resolve(x=x)
    check_matrix(x, "x")
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"x must be square in its last two axes, got shape {tuple(x.shape)}")
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    xp = backend.xp
    is_finite = xp.isfinite(work)
    work, exponent = brought_in_range(xp.where(is_finite, work, 0.0), backend)
    w, V = backend.small_eigh((work + matrix_h(work, xp)) / 2)
    root = V * xp.sqrt(backend.at_least(w, 0.0))[..., None, :]
    nearest = scaled_back(root @ matrix_h(root, xp), exponent, backend)
    nearest = xp.where(xp.all(is_finite, axis=(-2, -1), keepdims=True), nearest, math.nan)
    return promoted.cast_back(backend, nearest)[0]


@isolated
def project_nuclear_ball(x: Array, radius: float | Array = 1.0) -> Array:
    r"""Nearest matrix whose singular values have a sum of ``radius`` or less.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating.
    radius : float or array
        0 or more; an array broadcasts to ``x`` and has length one along the last two axes.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. A matrix with NaN or infinity gives one full of NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``radius`` neither a real number nor such an array.
    ValueError
        If ``x`` has fewer than two axes or an empty one; if ``radius`` is negative or not finite, or does not fit.

    Notes
    -----
    The singular values are projected on the l1 ball; where they are inside, ``x`` comes back as it is.

    References
    ----------
    M. Jaggi, M. Sulovsky, A simple algorithm for nuclear norm regularized problems, ICML 2010, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_nuclear_ball(np.diag([3.0, 1.0]), 2.0).tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    backend = resolve(x=x)
    check_matrix(x, "x")
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    xp = backend.xp
    radius = check_tau(backend, work, radius, "radius", axes=(x.ndim - 2, x.ndim - 1))
    scaled, exponent = brought_in_range(work, backend)
    level = radius * xp.ones_like(xp.abs(work[..., :1, :1]))
    if exponent is not None:
        level = power_of_two(level, exponent, backend)
    U, S, Vh = masked_svd(scaled, backend)
    peak = S[..., :1]
    theta = peak + simplex_level(S - peak, level[..., 0], S.ndim - 1, backend)
    is_inside = (theta <= 0)[..., None]
    shrunk = (U * backend.nonneg_threshold(S, theta)[..., None, :]) @ Vh
    nearest = xp.where(is_inside, work, scaled_back(shrunk, exponent, backend))
    return promoted.cast_back(backend, nearest)[0]
