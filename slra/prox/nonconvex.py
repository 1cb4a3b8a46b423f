"""Two penalties that stop growing, so that large entries are not shrunk: MCP and SCAD."""

from typing import Any

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_sum_axis, check_tau, check_weight, promote, resolve

__all__ = ["norm_mcp", "norm_scad", "prox_mcp", "prox_scad"]

Axis = int | tuple[int, ...] | None


@isolated
def prox_mcp(
    x: Array, tau: float | Array, *, l1: float | Array = 1.0, gamma: float | Array = 3.0
) -> Array:
    r"""Proximal operator of ``tau`` times the minimax concave penalty (MCP).

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Step, 0 or more; an array broadcasts to ``x``.
    l1 : float or 0-d array
        Slope at 0, greater than 0.
    gamma : float or 0-d array
        The penalty is constant from ``gamma * l1`` on; greater than 1. Arrays may be traced or learned.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or an option not a real
        number.
    ValueError
        If ``tau`` is negative or not finite, or does not broadcast to ``x``; if ``l1`` is not positive, or ``gamma``
        not greater than 1.

    Notes
    -----
    Of the minimiser on each piece of the penalty, the best: for ``tau < gamma``

    .. math:: \operatorname{prox}(x) = \frac{\operatorname{soft}(x, \tau \ell_1)}{1 - \tau / \gamma}
        \text{ up to } |x| = \gamma \ell_1, \quad x \text{ beyond}

    and for larger ``tau``, where the objective is concave below ``gamma * l1``, a hard threshold.

    References
    ----------
    C.-H. Zhang, Nearly unbiased variable selection under minimax concave penalty, Annals of Statistics 38 (2010),
    894-942.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_mcp(np.asarray([-4.0, 0.5, 2.0]), 1.0).round(12).tolist()
    [-4.0, 0.0, 1.5]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    tau = check_tau(backend, x, tau)
    l1, gamma = _check_shape(l1, gamma, 1.0, backend, x)
    xp = backend.xp
    with backend.ignore_overflow():
        modulus = xp.abs(x)
        flat = backend.at_least(modulus, gamma * l1)
        curved = _ratio(modulus - tau * l1, 1 - tau / gamma, backend)
        curved = backend.at_most(backend.at_least(curved, 0.0), gamma * l1)
        candidates = [xp.zeros_like(modulus), curved, flat]
        best = _best(modulus, tau, candidates, lambda y: _mcp(y, l1, gamma, backend), backend)
        return promoted.cast_back(backend, _resized(x, modulus, best, backend))[0]


@isolated
def norm_mcp(
    x: Array, *, l1: float | Array = 1.0, gamma: float | Array = 3.0, axis: Axis = None
) -> Array:
    r"""Sum of minimax concave penalties, the function behind `prox_mcp`; not a norm.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    l1 : float or 0-d array
        Slope at 0, greater than 0.
    gamma : float or 0-d array
        The penalty is constant from ``gamma * l1`` on; greater than 1. Arrays may be traced or learned.
    axis : int, tuple of int or None
        Axes to sum over; None means all of them.

    Returns
    -------
    array
        Real, without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or an option not a real number.
    ValueError
        If ``l1`` is not positive, or ``gamma`` not greater than 1.

    Notes
    -----
    .. math:: f(x) = \sum_i \ell_1 m_i - \frac{m_i^2}{2 \gamma}, \quad m_i = \min(|x_i|, \gamma \ell_1)

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_mcp(np.asarray([-30.0, 0.0])))
    1.5
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    l1, gamma = _check_shape(l1, gamma, 1.0, backend, x)
    axis = check_sum_axis(x, axis)
    with backend.ignore_overflow():
        return backend.total(_mcp(backend.modulus(x), l1, gamma, backend), axis)


@isolated
def prox_scad(
    x: Array, tau: float | Array, *, l1: float | Array = 1.0, gamma: float | Array = 3.7
) -> Array:
    r"""Proximal operator of ``tau`` times the smoothly clipped absolute deviation (SCAD).

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Step, 0 or more; an array broadcasts to ``x``.
    l1 : float or 0-d array
        Slope up to ``l1``, greater than 0.
    gamma : float or 0-d array
        The penalty is constant from ``gamma * l1`` on; greater than 2. Arrays may be traced or learned.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or an option not a real
        number.
    ValueError
        If ``tau`` is negative or not finite, or does not broadcast to ``x``; if ``l1`` is not positive, or ``gamma``
        not greater than 2.

    Notes
    -----
    Of the minimiser on each of the three pieces of the penalty, the best: a soft threshold at ``tau * l1`` up to
    ``l1``, the identity from ``gamma * l1`` on, and between them

    .. math:: \frac{(\gamma - 1) |x| - \tau \gamma \ell_1}{\gamma - 1 - \tau} \text{ where } \tau < \gamma - 1

    References
    ----------
    J. Fan, R. Li, Variable selection via nonconcave penalized likelihood and its oracle properties, Journal of the
    American Statistical Association 96 (2001), 1348-1360.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_scad(np.asarray([-4.0, 0.5, 1.5]), 1.0).tolist()
    [-4.0, 0.0, 0.5]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    tau = check_tau(backend, x, tau)
    l1, gamma = _check_shape(l1, gamma, 2.0, backend, x)
    xp = backend.xp
    with backend.ignore_overflow():
        modulus = xp.abs(x)
        shrunk = backend.at_most(backend.at_least(modulus - tau * l1, 0.0), l1)
        between = _ratio((gamma - 1) * modulus - tau * (gamma * l1), gamma - 1 - tau, backend)
        between = backend.at_most(backend.at_least(between, l1), gamma * l1)
        candidates = [shrunk, between, backend.at_least(modulus, gamma * l1)]
        best = _best(modulus, tau, candidates, lambda y: _scad(y, l1, gamma, backend), backend)
        return promoted.cast_back(backend, _resized(x, modulus, best, backend))[0]


@isolated
def norm_scad(
    x: Array, *, l1: float | Array = 1.0, gamma: float | Array = 3.7, axis: Axis = None
) -> Array:
    r"""Sum of smoothly clipped absolute deviations, the function behind `prox_scad`; not a norm.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    l1 : float or 0-d array
        Slope up to ``l1``, greater than 0.
    gamma : float or 0-d array
        The penalty is constant from ``gamma * l1`` on; greater than 2. Arrays may be traced or learned.
    axis : int, tuple of int or None
        Axes to sum over; None means all of them.

    Returns
    -------
    array
        Real, without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or an option not a real number.
    ValueError
        If ``l1`` is not positive, or ``gamma`` not greater than 2.

    Notes
    -----
    With ``m = min(|x|, gamma l1)`` and ``e = max(m - l1, 0)``,

    .. math:: f(x) = \sum_i \ell_1 m_i - \frac{e_i^2}{2 (\gamma - 1)}

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> round(float(prox.norm_scad(np.asarray([-30.0, 0.0]))), 6)
    2.35
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    l1, gamma = _check_shape(l1, gamma, 2.0, backend, x)
    axis = check_sum_axis(x, axis)
    with backend.ignore_overflow():
        return backend.total(_scad(backend.modulus(x), l1, gamma, backend), axis)


def _check_shape(l1: Any, gamma: Any, least: float, backend: Backend, x: Array) -> tuple[Any, Any]:
    l1 = check_weight(backend, x, l1, "l1")
    gamma = check_weight(backend, x, gamma, "gamma")
    can_look = isinstance(gamma, float) or backend.is_eager(gamma)
    if can_look and float(gamma if isinstance(gamma, float) else backend.to_numpy(gamma)) <= least:
        raise ValueError(f"gamma must be greater than {least:g}, got {gamma!r}")
    return l1, gamma


def _mcp(modulus: Array, l1: Any, gamma: Any, backend: Backend) -> Array:
    m = backend.at_most(modulus, gamma * l1)
    return m * (l1 - m / (2 * gamma))


def _scad(modulus: Array, l1: Any, gamma: Any, backend: Backend) -> Array:
    m = backend.at_most(modulus, gamma * l1)
    excess = backend.at_least(m - l1, 0.0)
    return l1 * m - excess * excess / (2 * (gamma - 1))


def _ratio(above: Array, below: float | Array, backend: Backend) -> Array:
    """Quotient where the divisor is positive; elsewhere there is no minimum between, and any number does."""
    xp = backend.xp
    divisor = below * xp.ones_like(above)
    return above / xp.where(divisor > 0, divisor, xp.ones_like(divisor))


def _best(
    modulus: Array, tau: float | Array, candidates: list[Array], value: Any, backend: Backend
) -> Array:
    """Candidate of the smallest objective; the first of several."""
    best = candidates[0]
    least = tau * value(best) + (best - modulus) ** 2 / 2
    for candidate in candidates[1:]:
        objective = tau * value(candidate) + (candidate - modulus) ** 2 / 2
        best = backend.xp.where(objective < least, candidate, best)
        least = backend.xp.where(objective < least, objective, least)
    return best


def _resized(x: Array, modulus: Array, target: Array, backend: Backend) -> Array:
    """``x`` with another modulus; as it is, to the bit, where that is its own."""
    xp = backend.xp
    gain = target / xp.where(modulus == 0, xp.ones_like(modulus), modulus)
    return xp.where((target == modulus) | xp.isnan(x), x, x * gain)
