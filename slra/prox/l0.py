"""Hard thresholding, for the number of nonzero entries."""

from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_sum_axis, check_tau, promote, resolve

__all__ = ["norm_l0", "prox_l0"]


@isolated
def prox_l0(x: Array, tau: float | Array) -> Array:
    r"""Hard-threshold ``x``: a proximal operator of ``tau * (number of nonzero entries)``.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Price of an entry, 0 or more, infinity to keep it at zero; an array broadcasts to ``x``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``: entries are kept as they are or set to zero. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``tau`` neither a real number nor such an array.
    ValueError
        If ``tau`` is negative or NaN, or does not broadcast to ``x``.

    Notes
    -----
    .. math:: \operatorname{prox}(x)_i = x_i \text{ if } |x_i| > \sqrt{2 \tau}, \quad 0 \text{ otherwise}

    The function is not convex: at ``|x_i| = sqrt(2 tau)`` zero and ``x_i`` are equally good, and the operator jumps.

    References
    ----------
    T. Blumensath, M. E. Davies, Iterative thresholding for sparse approximations,
    Journal of Fourier Analysis and Applications 14 (2008), 629-654.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_l0(np.asarray([-3.0, 0.5, 2.0]), 2.5).tolist()
    [-3.0, 0.0, 0.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    tau = check_tau(backend, x, tau, allow_inf=True)
    # Not the root of 2 tau, which may be infinite.
    cut = 2 * (tau / 2) ** 0.5
    # Written with <= so that NaN is kept.
    return promoted.cast_back(backend, backend.xp.where(backend.xp.abs(x) <= cut, 0.0, x))[0]


@isolated
def norm_l0(x: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    r"""Count nonzero entries, the function behind `prox_l0`.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    axis : int, tuple of int or None
        Axes to count over; None means all of them.

    Returns
    -------
    array
        In the real dtype of ``x``, without those axes; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array.

    Notes
    -----
    .. math:: \|x\|_0 = \#\{i : x_i \ne 0\}

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_l0(np.asarray([-3.0, 0.0, 2.0])))
    2.0
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    axis = check_sum_axis(x, axis)
    return backend.total(backend.xp.astype(x != 0, backend.real_dtype(x.dtype)), axis)
