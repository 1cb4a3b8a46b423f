"""The l1 norm and two relatives: with a sign constraint, and with a square beside it."""

from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_sum_axis, check_tau, check_weight, promote, resolve

__all__ = [
    "norm_elastic_net",
    "norm_l1",
    "norm_nonneg_l1",
    "prox_elastic_net",
    "prox_l1",
    "prox_nonneg_l1",
]

Axis = int | tuple[int, ...] | None


@isolated
def prox_l1(x: Array, tau: float | Array) -> Array:
    r"""Soft-threshold ``x``: the proximal operator of ``tau * ||x||_1``.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Threshold, 0 or more, infinity to keep an entry at zero; an array broadcasts to ``x``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``tau`` neither a real number nor such an array.
    ValueError
        If ``tau`` is negative or NaN, or does not broadcast to ``x``.

    Notes
    -----
    .. math:: \operatorname{prox}(x)_i = \operatorname{sign}(x_i) \max(|x_i| - \tau, 0)

    with ``sign(x) = x / |x|`` for complex ``x``: the modulus shrinks, the phase stays. For real ``x`` this is computed
    as ``x - clip(x, -tau, tau)``, which is the same number; no zero of the result has a sign.

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.5.2.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> slra.soft_threshold(np.asarray([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, keep_half=backend.takes_half, x=x)
    tau = check_tau(backend, promoted.arrays[0], tau, allow_inf=True)
    return promoted.cast_back(backend, backend.soft_threshold(promoted.arrays[0], tau))[0]


@isolated
def norm_l1(x: Array, *, axis: Axis = None) -> Array:
    r"""Sum of moduli, the function behind `prox_l1`.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    axis : int, tuple of int or None
        Axes to sum over; None means all of them.

    Returns
    -------
    array
        Real, without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array.

    Notes
    -----
    .. math:: \|x\|_1 = \sum_i |x_i|

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_l1(np.asarray([-3.0, 0.5, 2.0])))
    5.5
    """
    backend = resolve(x=x)
    (x,) = promote(backend, keep_half=backend.takes_half, x=x).arrays
    axis = check_sum_axis(x, axis)
    with backend.ignore_overflow():
        return backend.sum_abs(x, axis)


@isolated
def prox_nonneg_l1(x: Array, tau: float | Array) -> Array:
    r"""Shrink and cut off at zero: the proximal operator of ``tau * sum(x)`` over ``x >= 0``.

    Parameters
    ----------
    x : array
        Real floating, any shape.
    tau : float or array
        Threshold, 0 or more, infinity to keep an entry at zero; an array broadcasts to ``x``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``; no entry is negative. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a real floating array, or ``tau`` neither a real number nor such an array.
    ValueError
        If ``tau`` is negative or NaN, or does not broadcast to ``x``.

    Notes
    -----
    .. math:: \operatorname{prox}(x)_i = \max(x_i - \tau, 0)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.5.2.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_nonneg_l1(np.asarray([-3.0, 0.5, 2.0]), 1.0).tolist()
    [0.0, 0.0, 1.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, allow_complex=False, keep_half=backend.takes_half, x=x)
    tau = check_tau(backend, promoted.arrays[0], tau, allow_inf=True)
    with backend.ignore_overflow():
        return promoted.cast_back(backend, backend.nonneg_threshold(promoted.arrays[0], tau))[0]


@isolated
def norm_nonneg_l1(x: Array, *, axis: Axis = None) -> Array:
    r"""Sum of entries where none is negative, infinity elsewhere: the function behind `prox_nonneg_l1`.

    Parameters
    ----------
    x : array
        Real floating, any shape.
    axis : int, tuple of int or None
        Axes to sum over; None means all of them.

    Returns
    -------
    array
        Without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a real floating array.

    Notes
    -----
    .. math:: f(x) = \sum_i x_i \text{ if all } x_i \ge 0, \quad \infty \text{ otherwise}

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.norm_nonneg_l1(np.asarray([[1.0, 2.0], [-1.0, 2.0]]), axis=-1).tolist()
    [3.0, inf]
    """
    backend = resolve(x=x)
    (x,) = promote(backend, allow_complex=False, x=x).arrays
    axis, xp = check_sum_axis(x, axis), backend.xp
    with backend.ignore_overflow():
        return backend.total(xp.where(x < 0, xp.full_like(x, float("inf")), x), axis)


@isolated
def prox_elastic_net(x: Array, tau: float | Array, *, l2: float | Array) -> Array:
    r"""Shrink and scale: the proximal operator of ``tau * (||x||_1 + l2/2 * ||x||_2^2)``.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Step, 0 or more, infinity to keep an entry at zero; an array broadcasts to ``x``.
    l2 : float or 0-d array
        Weight of the square, 0 or more. An array may be traced or learned; it is checked where it can be looked at.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or ``l2`` not a real number.
    ValueError
        If ``tau`` is negative or NaN or ``l2`` negative or not finite, or ``tau`` does not broadcast to ``x``.

    Notes
    -----
    .. math:: \operatorname{prox}(x) = \frac{\operatorname{prox}_{\tau \|\cdot\|_1}(x)}{1 + \tau \ell_2}

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.5.3.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_elastic_net(np.asarray([-3.0, 0.5, 2.0]), 1.0, l2=1.0).tolist()
    [-1.0, 0.0, 0.5]
    """
    backend = resolve(x=x)
    promoted = promote(backend, keep_half=backend.takes_half, x=x)
    tau = check_tau(backend, promoted.arrays[0], tau, allow_inf=True)
    limits = backend.xp.finfo(promote(backend, x=x).arrays[0].dtype)
    l2 = check_weight(backend, x, l2, "l2", allow_zero=True)
    # Infinity times an l2 of 0 would be NaN; this is as large as any modulus.
    tau = (
        backend.at_most(tau, float(limits.max))
        if not isinstance(tau, float)
        else min(tau, float(limits.max))
    )
    with backend.ignore_overflow():
        return promoted.cast_back(backend, backend.elastic_threshold(promoted.arrays[0], tau, l2))[
            0
        ]


@isolated
def norm_elastic_net(x: Array, *, l2: float | Array, axis: Axis = None) -> Array:
    r"""Sum of moduli and halved squares, the function behind `prox_elastic_net`.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    l2 : float or 0-d array
        Weight of the square, 0 or more. An array may be traced or learned; it is checked where it can be looked at.
    axis : int, tuple of int or None
        Axes to sum over; None means all of them.

    Returns
    -------
    array
        Real, without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``l2`` not a real number.
    ValueError
        If ``l2`` is negative or not finite.

    Notes
    -----
    .. math:: f(x) = \|x\|_1 + \tfrac{\ell_2}{2} \|x\|_2^2

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_elastic_net(np.asarray([-3.0, 1.0]), l2=2.0))
    14.0
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    l2 = check_weight(backend, x, l2, "l2", allow_zero=True)
    axis = check_sum_axis(x, axis)
    with backend.ignore_overflow():
        modulus = backend.modulus(x)
        # Without a weight the square is nothing, even where it is infinite.
        if isinstance(l2, float):
            square = l2 / 2 * modulus * modulus if l2 else 0.0
        else:
            xp = backend.xp
            is_nothing = (l2 == 0) & ~xp.isfinite(modulus * modulus)
            finite = xp.where(is_nothing, xp.zeros_like(modulus), modulus)
            square = l2 / 2 * finite * finite
        return backend.total(modulus + square, axis)
