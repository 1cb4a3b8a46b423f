"""Soft thresholding, the proximal operator of the l1 norm."""

from slra._typing import Array
from slra._validate import check_tau, promote, resolve

__all__ = ["prox_l1"]


def prox_l1(x: Array, tau: float | Array) -> Array:
    r"""Soft-threshold ``x``: the proximal operator of ``tau * ||x||_1``.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Threshold, 0 or more; an array broadcasts to ``x``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``tau`` neither a real number nor such an array.
    ValueError
        If ``tau`` is negative or not finite, or does not broadcast to ``x``.

    Notes
    -----
    .. math:: \operatorname{prox}(x)_i = \operatorname{sign}(x_i) \max(|x_i| - \tau, 0)

    with ``sign(x) = x / |x|`` for complex ``x``: the modulus shrinks, the phase stays.

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
    table = resolve(x=x)
    promoted = promote(table, x=x)
    tau = check_tau(table, promoted.arrays[0], tau)
    return promoted.answer(table, table.soft_threshold(promoted.arrays[0], tau))[0]
