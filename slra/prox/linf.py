"""The largest modulus, and the three operators that sorting a vector makes exact."""

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_axis, check_tau, promote, resolve

__all__ = ["norm_linf", "project_l1_ball", "project_simplex", "prox_linf", "simplex_level"]


@isolated
def prox_linf(x: Array, tau: float | Array, *, axis: int | tuple[int, ...] = -1) -> Array:
    r"""Cut the peaks of a vector: the proximal operator of ``tau * max|x|``.

    Parameters
    ----------
    x : array
        Real or complex floating.
    tau : float or array
        Threshold, 0 or more; an array broadcasts to ``x`` and has length one along ``axis``.
    axis : int or tuple of int
        The axes that make up one vector; the others are a batch.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its vector.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or ``axis`` not an int.
    ValueError
        If ``tau`` is negative or not finite, or does not fit ``x``; if ``axis`` is out of range or empty.

    Notes
    -----
    By Moreau's identity, with ``P`` the projection on the l1 ball of radius ``tau`` (`project_l1_ball`),

    .. math:: \operatorname{prox}(x) = x - P(x)

    which clips the moduli at the one level that takes ``tau`` off their sum.

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.5.2.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_linf(np.asarray([-3.0, 0.5, 2.0]), 2.0).tolist()
    [-1.5, 0.5, 1.5]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    axes = check_axis(x, axis)
    tau = check_tau(backend, x, tau, axes=axes)
    with backend.ignore_overflow():
        return promoted.cast_back(backend, x - _onto_l1_ball(x, tau, axes, backend))[0]


@isolated
def norm_linf(x: Array, *, axis: int | tuple[int, ...] = -1) -> Array:
    r"""Largest modulus of each vector, the function behind `prox_linf`.

    Parameters
    ----------
    x : array
        Real or complex floating.
    axis : int or tuple of int
        The axes that make up one vector.

    Returns
    -------
    array
        Real, without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``axis`` not an int.
    ValueError
        If ``axis`` is out of range or empty.

    Notes
    -----
    .. math:: \|x\|_\infty = \max_i |x_i|

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_linf(np.asarray([-3.0, 0.5, 2.0])))
    3.0
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    return backend.xp.max(backend.modulus(x), axis=check_axis(x, axis))


@isolated
def project_l1_ball(
    x: Array, radius: float | Array = 1.0, *, axis: int | tuple[int, ...] = -1
) -> Array:
    r"""Nearest point of the l1 ball around zero.

    Parameters
    ----------
    x : array
        Real or complex floating.
    radius : float or array
        0 or more; an array broadcasts to ``x`` and has length one along ``axis``.
    axis : int or tuple of int
        The axes that make up one vector; the others are a batch.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its vector.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``radius`` neither a real number nor such an array, or ``axis`` not an int.
    ValueError
        If ``radius`` is negative or not finite, or does not fit ``x``; if ``axis`` is out of range or empty.

    Notes
    -----
    The soft threshold of ``x`` at the level that leaves moduli of sum ``radius``, or ``x`` where it is inside. With
    the moduli in descending order :math:`u_1 \ge u_2 \ge \dots` the level is

    .. math:: \theta = \max\Bigl(0, \max_j \frac{u_1 + \dots + u_j - r}{j}\Bigr)

    References
    ----------
    J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, Efficient projections onto the l1-ball for learning in high
    dimensions, ICML 2008, Figure 1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_l1_ball(np.asarray([-3.0, 0.5, 2.0]), 3.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    axes = check_axis(x, axis)
    radius = check_tau(backend, x, radius, "radius", axes=axes)
    with backend.ignore_overflow():
        return promoted.cast_back(backend, _onto_l1_ball(x, radius, axes, backend))[0]


@isolated
def project_simplex(
    x: Array, radius: float | Array = 1.0, *, axis: int | tuple[int, ...] = -1
) -> Array:
    r"""Nearest point of the simplex: entries of 0 or more whose sum is ``radius``.

    Parameters
    ----------
    x : array
        Real floating.
    radius : float or array
        0 or more; an array broadcasts to ``x`` and has length one along ``axis``.
    axis : int or tuple of int
        The axes that make up one vector; the others are a batch.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its vector.

    Raises
    ------
    TypeError
        If ``x`` is not a real floating array, ``radius`` neither a real number nor such an array, or ``axis`` not an
        int.
    ValueError
        If ``radius`` is negative or not finite, or does not fit ``x``; if ``axis`` is out of range or empty.

    Notes
    -----
    With the entries in descending order :math:`u_1 \ge u_2 \ge \dots`

    .. math:: P(x)_i = \max(x_i - \theta, 0), \quad \theta = \max_j \frac{u_1 + \dots + u_j - r}{j}

    References
    ----------
    J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, Efficient projections onto the l1-ball for learning in high
    dimensions, ICML 2008, Figure 1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_simplex(np.asarray([-3.0, 0.5, 1.0]), 1.0).tolist()
    [0.0, 0.25, 0.75]
    """
    backend = resolve(x=x)
    promoted = promote(backend, allow_complex=False, x=x)
    (x,) = promoted.arrays
    axes = check_axis(x, axis)
    radius = check_tau(backend, x, radius, "radius", axes=axes)
    with backend.ignore_overflow():
        # Sums of what lies below the largest entry stay in range, and so does the level.
        x = x - backend.xp.max(x, axis=axes, keepdims=True)
        theta = _level_over(x, radius, axes, backend)
        return promoted.cast_back(backend, backend.nonneg_threshold(x, theta))[0]


def simplex_level(x: Array, radius: float | Array, axis: int, backend: Backend) -> Array:
    """Level theta for which ``sum(max(x - theta, 0)) == radius`` along ``axis``, which is kept.

    The largest entry of ``x`` is 0. The mean excess of the j largest entries grows with j as long as the entries stay
    above the level and falls afterwards, so its maximum is the level: no index depends on data. No term of it is
    positive, so none cancels, and the level comes out below the largest entry.
    """
    xp = backend.xp
    n = x.shape[axis]
    counts = xp.arange(1, n + 1, dtype=x.dtype, device=backend.creation_device(x))
    counts = xp.reshape(counts, (n,) + (1,) * (x.ndim - 1 - axis))
    # What lies lower than the level can be does not count; its sum could overflow.
    x = backend.at_least(x, -radius)
    ordered = xp.sort(x, axis=axis, descending=True)
    sums = xp.cumulative_sum(ordered, axis=axis, dtype=backend.sum_dtype(x, axis))
    theta = xp.max((sums - radius) / counts, axis=axis, keepdims=True)
    theta = xp.astype(theta, x.dtype, copy=False)
    # One Newton step, which takes off the rounding of the running sum.
    excess = backend.at_least(x - theta, 0.0)
    n_above = backend.total(xp.astype(excess > 0, x.dtype), axis, keepdims=True)
    n_above = backend.at_least(n_above, 1.0)
    # Divided before they are summed, so that the sum stays in range.
    return theta + (backend.total(excess / n_above, axis, keepdims=True) - radius / n_above)


def _level_over(x: Array, radius: float | Array, axes: tuple[int, ...], backend: Backend) -> Array:
    """`simplex_level` of vectors that lie along several axes, which are kept."""
    if len(axes) == 1:
        return simplex_level(x, radius, axes[0], backend)
    xp = backend.xp
    flat, _ = backend.as_vectors(x, axes)
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    if not isinstance(radius, float):
        radius = xp.reshape(xp.broadcast_to(radius, kept), (*flat.shape[:-1], 1))
    return xp.reshape(simplex_level(flat, radius, flat.ndim - 1, backend), kept)


def _onto_l1_ball(
    x: Array, radius: float | Array, axes: tuple[int, ...], backend: Backend
) -> Array:
    modulus = backend.xp.abs(x)
    # Sums of what lies below the largest modulus stay in range.
    peak = backend.xp.max(modulus, axis=axes, keepdims=True)
    level = peak + _level_over(modulus - peak, radius, axes, backend)
    shrunk = backend.soft_threshold(x, backend.at_least(level, 0.0))
    # The same inside the ball, but for the derivative at 0.
    return backend.xp.where(level <= 0, x, shrunk)
