"""Projection on a box."""

from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_bound, promote, resolve

__all__ = ["project_box"]


@isolated
def project_box(x: Array, lo: float | Array, hi: float | Array) -> Array:
    r"""Nearest point with every entry between ``lo`` and ``hi``.

    Parameters
    ----------
    x : array
        Real floating, any shape.
    lo, hi : float or array
        Bounds, ``lo <= hi``; they may be infinite; an array broadcasts to ``x``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a real floating array, or a bound neither a real number nor such an array.
    ValueError
        If a bound does not broadcast to ``x`` or is NaN, or ``lo`` exceeds ``hi`` (looked at where values can be).

    Notes
    -----
    .. math:: P(x)_i = \min(\max(x_i, \mathrm{lo}_i), \mathrm{hi}_i)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.2.4.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_box(np.asarray([-3.0, 0.5, 2.0]), 0.0, 1.0).tolist()
    [0.0, 0.5, 1.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, allow_complex=False, x=x)
    (x,) = promoted.arrays
    lo, hi = check_bound(backend, x, lo, "lo"), check_bound(backend, x, hi, "hi")
    in_order = lo <= hi
    if not isinstance(in_order, bool):
        in_order = bool(backend.xp.all(in_order)) if backend.is_eager(in_order) else True
    if not in_order:
        raise ValueError("lo must be at most hi everywhere, and neither may be NaN")
    return promoted.cast_back(backend, backend.at_most(backend.at_least(x, lo), hi))[0]
