"""The Huber function: a square near zero, a modulus further out."""

from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_sum_axis, check_tau, check_weight, promote, resolve

__all__ = ["norm_huber", "prox_huber"]


@isolated
def prox_huber(x: Array, tau: float | Array, *, delta: float | Array) -> Array:
    r"""Proximal operator of ``tau`` times the sum of Huber's function of the moduli.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Step, 0 or more; an array broadcasts to ``x``.
    delta : float or 0-d array
        Modulus at which the square turns into a straight line, greater than 0. An array may be traced or learned.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or ``delta`` not a real
        number.
    ValueError
        If ``tau`` is negative or not finite, or does not broadcast to ``x``; if ``delta`` is not positive and finite.

    Notes
    -----
    With ``h(x) = |x|^2 / 2`` up to ``|x| = delta`` and ``delta * (|x| - delta / 2)`` from there on,

    .. math:: \operatorname{prox}(x)_i = x_i - \tau \frac{x_i}{|x_i|} \min\Bigl(\frac{|x_i|}{1 + \tau}, \delta\Bigr)

    that is, ``x / (1 + tau)`` for moduli up to ``(1 + tau) * delta`` and a soft threshold at ``tau * delta`` beyond.

    References
    ----------
    P. J. Huber, Robust estimation of a location parameter, Annals of Mathematical Statistics 35 (1964), 73-101;
    A. Beck, First-Order Methods in Optimization, SIAM 2017, Example 6.66.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_huber(np.asarray([-3.0, 0.5, 2.0]), 1.0, delta=1.0).tolist()
    [-2.0, 0.25, 1.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    tau = check_tau(backend, x, tau)
    delta = check_weight(backend, x, delta, "delta")
    with backend.ignore_overflow():
        shrunk = x / (1 + tau)
        # What lies beyond delta is the soft threshold of the shrunk x; it moves by tau * delta instead.
        return promoted.cast_back(backend, shrunk + tau * backend.soft_threshold(shrunk, delta))[0]


@isolated
def norm_huber(
    x: Array, *, delta: float | Array, axis: int | tuple[int, ...] | None = None
) -> Array:
    r"""Sum of Huber's function of the moduli, the function behind `prox_huber`; not a norm.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    delta : float or 0-d array
        Modulus at which the square turns into a straight line, greater than 0. An array may be traced or learned.
    axis : int, tuple of int or None
        Axes to sum over; None means all of them.

    Returns
    -------
    array
        Real, without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``delta`` not a real number.
    ValueError
        If ``delta`` is not positive and finite.

    Notes
    -----
    .. math:: h(x) = \sum_i m_i \bigl(|x_i| - m_i / 2\bigr), \quad m_i = \min(|x_i|, \delta)

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_huber(np.asarray([-3.0, 1.0]), delta=2.0))
    4.5
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    delta = check_weight(backend, x, delta, "delta")
    axis = check_sum_axis(x, axis)
    with backend.ignore_overflow():
        modulus = backend.xp.abs(x)
        square = backend.at_most(modulus, delta)
        return backend.total(square * (modulus - square / 2), axis)
