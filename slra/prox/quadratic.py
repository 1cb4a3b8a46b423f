"""Smooth losses: the square, a quadratic form, and the logistic loss."""

from slra._backends.ambient import isolated
from slra._typing import Array, Namespace
from slra._validate import check_sum_axis, check_tau, promote, resolve

__all__ = [
    "norm_logistic",
    "norm_quadratic",
    "norm_squared_l2",
    "prox_logistic",
    "prox_quadratic",
    "prox_squared_l2",
]

Axis = int | tuple[int, ...] | None
# From the starts below: to rounding in double precision for tau from 1e-12 to 1e12 and |x| up to 1e12.
NEWTON_STEPS = 9


@isolated
def prox_squared_l2(x: Array, tau: float | Array) -> Array:
    r"""Shrink by a factor: the proximal operator of ``tau/2 * ||x||_2^2``.

    Parameters
    ----------
    x : array
        Real or complex floating, any shape.
    tau : float or array
        Step, 0 or more; an array broadcasts to ``x``.

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
    .. math:: \operatorname{prox}(x) = x / (1 + \tau)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.1.1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_squared_l2(np.asarray([-3.0, 1.0]), 1.0).tolist()
    [-1.5, 0.5]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    tau = check_tau(backend, x, tau)
    with backend.ignore_overflow():
        return promoted.cast_back(backend, x / (1 + tau))[0]


@isolated
def norm_squared_l2(x: Array, *, axis: Axis = None) -> Array:
    r"""Half the sum of squared moduli, the function behind `prox_squared_l2`; not a norm.

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
    .. math:: f(x) = \tfrac12 \|x\|_2^2

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_squared_l2(np.asarray([-3.0, 1.0])))
    5.0
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    axis = check_sum_axis(x, axis)
    with backend.ignore_overflow():
        return backend.total(backend.real_part(x * backend.conj(x)), axis) / 2


@isolated
def prox_quadratic(x: Array, tau: float | Array, *, A: Array, b: Array | None = None) -> Array:
    r"""Solve a linear system: the proximal operator of ``tau * (1/2 <x, A x> - Re <b, x>)``.

    Parameters
    ----------
    x : array, shape (..., n)
        Real or complex floating.
    tau : float or array
        Step, 0 or more; an array broadcasts to ``x`` and has length one along the last axis.
    A : array, shape (n, n) or (..., n, n)
        Hermitian and positive semidefinite, which is not checked; real where ``x`` is.
    b : array, shape of x or (n,), optional
        0 by default. For least squares ``1/2 ||M x - y||^2`` take ``A = M^H M`` and ``b = M^H y``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its vector.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``A`` or ``b`` not arrays of the same library, or ``tau`` neither a real
        number nor such an array.
    ValueError
        If ``tau`` is negative or not finite, or does not fit ``x``; if ``A`` or ``b`` does not.

    Notes
    -----
    .. math:: \operatorname{prox}(x) = (I + \tau A)^{-1} (x + \tau b)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.1.1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_quadratic(np.asarray([2.0, 8.0]), 1.0, A=np.diag([1.0, 3.0])).tolist()
    [1.0, 2.0]
    """
    backend = resolve(x=x, A=A, optional={"b": b})
    promoted = promote(backend, x=x, A=A, b=b)
    work, A, b = promoted.arrays
    _check_form(x, A, b)
    tau = check_tau(backend, x, tau, axes=(x.ndim - 1,))
    xp = backend.xp
    with backend.ignore_overflow():
        level = tau * xp.ones_like(xp.abs(work[..., :1]))
        eye = xp.eye(x.shape[-1], dtype=A.dtype, device=backend.creation_device(A))
        system = eye + xp.astype(level, A.dtype)[..., None] * A
        shifted = work if b is None else work + tau * b
        solved = (backend.small_inverse(system) @ shifted[..., None])[..., 0]
        return promoted.cast_back(backend, solved)[0]


@isolated
def norm_quadratic(x: Array, *, A: Array, b: Array | None = None) -> Array:
    r"""Quadratic form, the function behind `prox_quadratic`; not a norm.

    Parameters
    ----------
    x : array, shape (..., n)
        Real or complex floating.
    A : array, shape (n, n) or (..., n, n)
        Hermitian and positive semidefinite, which is not checked.
    b : array, shape of x or (n,), optional
        0 by default.

    Returns
    -------
    array, shape (...)
        Real; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``A`` or ``b`` not arrays of the same library.
    ValueError
        If ``A`` or ``b`` does not fit ``x``.

    Notes
    -----
    .. math:: f(x) = \tfrac12 \langle x, A x \rangle - \operatorname{Re} \langle b, x \rangle

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_quadratic(np.asarray([1.0, 2.0]), A=np.diag([1.0, 3.0])))
    6.5
    """
    backend = resolve(x=x, A=A, optional={"b": b})
    x, A, b = promote(backend, x=x, A=A, b=b).arrays
    _check_form(x, A, b)
    xp = backend.xp
    with backend.ignore_overflow():
        image = (A @ x[..., None])[..., 0]
        image = image if b is None else image - 2 * b
        return xp.sum(backend.real_part(backend.conj(x) * image), axis=-1) / 2


def _check_form(x: Array, A: Array, b: Array | None) -> None:
    n = x.shape[-1] if x.ndim else 0
    if A.ndim < 2 or tuple(A.shape[-2:]) != (n, n) or A.shape[:-2] not in ((), x.shape[:-1]):
        raise ValueError(
            f"A must have shape ({n}, {n}), or one for each vector of x of shape {tuple(x.shape)}, "
            f"got {tuple(A.shape)}"
        )
    if b is not None and tuple(b.shape) not in ((n,), tuple(x.shape)):
        raise ValueError(f"b must have shape ({n},) or that of x, got {tuple(b.shape)}")


@isolated
def prox_logistic(x: Array, tau: float | Array) -> Array:
    r"""Proximal operator of ``tau`` times the sum of ``log(1 + exp(-x))``.

    Parameters
    ----------
    x : array
        Real floating, any shape. With labels of -1 and 1 the operator of ``log(1 + exp(-label x))`` is
        ``label * prox_logistic(label * x, tau)``.
    tau : float or array
        Step, 0 or more; an array broadcasts to ``x``.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN stays NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a real floating array, or ``tau`` neither a real number nor such an array.
    ValueError
        If ``tau`` is negative or not finite, or does not broadcast to ``x``.

    Notes
    -----
    The root of

    .. math:: y - x - \frac{\tau}{1 + e^y} = 0

    by Newton's method. The left side rises, is concave for ``y > 0`` and convex below, so that it converges without a
    search from a point that is on the outer side of the root; such points come from the two exponential bounds.

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> y = prox.prox_logistic(np.asarray([-3.0, 0.5]), 1.0)
    >>> (y - 1 / (1 + np.exp(y))).round(12).tolist()
    [-3.0, 0.5]
    """
    backend = resolve(x=x)
    promoted = promote(backend, allow_complex=False, x=x)
    (x,) = promoted.arrays
    tau = check_tau(backend, x, tau)
    xp = backend.xp
    tiny = float(xp.finfo(x.dtype).smallest_normal)
    with backend.ignore_overflow():
        tau = tau * xp.ones_like(x)
        floor = backend.at_least(tau, tiny)
        # Above 0: y - x >= tau exp(-y) / 2, and Lambert's W exceeds l - log l where l = log of its argument > 1.
        exponent = xp.log(floor) - 0.6931471805599453 - x
        above = x + exponent - xp.log(backend.at_least(exponent, 1.0))
        above = xp.where(exponent > 1, above, x)
        above = backend.at_least(xp.where(above > x, above, x), 0.0)
        # Below 0: tau exp(y) / 2 <= tau + x - y, in which y is bounded from below first.
        rest = backend.at_least(x + tau, tiny)
        lowest = xp.log(rest / floor)
        below = xp.log(2 * (rest - backend.at_most(lowest, 0.0)) / floor)
        below = xp.where(x + tau < below, x + tau, below)
        below = backend.at_most(below, 0.0)
        y = xp.where(x >= -tau / 2, above, below)
        for _ in range(NEWTON_STEPS):
            lower = _sigmoid(-y, xp)
            y = y - (y - x - tau * lower) / (1 + tau * lower * (1 - lower))
        return promoted.cast_back(backend, xp.where(xp.isfinite(x), y, x))[0]


@isolated
def norm_logistic(x: Array, *, axis: Axis = None) -> Array:
    r"""Sum of ``log(1 + exp(-x))``, the function behind `prox_logistic`; not a norm.

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
    .. math:: f(x) = \sum_i \log(1 + e^{-x_i})

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> round(float(prox.norm_logistic(np.asarray([0.0, 1000.0]))), 6)
    0.693147
    """
    backend = resolve(x=x)
    (x,) = promote(backend, allow_complex=False, x=x).arrays
    axis, xp = check_sum_axis(x, axis), backend.xp
    with backend.ignore_overflow():
        tail = xp.log1p(xp.exp(-backend.modulus(x)))
        return backend.total(tail + backend.at_least(-x, 0.0), axis)


def _sigmoid(x: Array, xp: Namespace) -> Array:
    """``1 / (1 + exp(-x))`` without overflow."""
    power = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1 / (1 + power), power / (1 + power))
