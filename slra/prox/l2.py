"""The Euclidean norm of a vector, the sum of such norms over groups, and the Euclidean ball."""

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_axis, check_matrix, check_tau, promote, resolve

__all__ = ["norm_l2", "norm_l21", "project_l2_ball", "prox_l2", "prox_l21"]


@isolated
def prox_l2(x: Array, tau: float | Array, *, axis: int | tuple[int, ...] = -1) -> Array:
    r"""Shorten vectors by ``tau``: the proximal operator of ``tau * ||x||_2``, the norm and not its square.

    Parameters
    ----------
    x : array
        Real or complex floating.
    tau : float or array
        Threshold, 0 or more, infinity to keep it at zero; an array broadcasts to ``x`` and has length one along
        ``axis``.
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
        If ``tau`` is negative or NaN, or does not fit ``x``; if ``axis`` is out of range or empty.

    Notes
    -----
    .. math:: \operatorname{prox}(x) = x \max(1 - \tau / \|x\|_2, 0)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.5.1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_l2(np.asarray([[6.0, 8.0], [0.3, 0.4]]), 5.0, axis=-1).tolist()
    [[3.0, 4.0], [0.0, 0.0]]
    """
    backend = resolve(x=x)
    return _shorten(x, tau, check_axis(x, axis), backend)


@isolated
def norm_l2(x: Array, *, axis: int | tuple[int, ...] = -1) -> Array:
    r"""Euclidean norm of vectors, the function behind `prox_l2`.

    Parameters
    ----------
    x : array
        Real or complex floating.
    axis : int or tuple of int
        The axes that make up one vector.

    Returns
    -------
    array
        Real, without those axes; float32 for half precision. Squares neither overflow nor underflow.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``axis`` not an int.
    ValueError
        If ``axis`` is out of range or empty.

    Notes
    -----
    .. math:: \|x\|_2 = \sqrt{\textstyle\sum_i |x_i|^2}

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.norm_l2(np.asarray([[6.0, 8.0], [0.0, 1.0]]), axis=-1).tolist()
    [10.0, 1.0]
    """
    backend = resolve(x=x)
    (x,) = promote(backend, keep_half=backend.takes_half, x=x).arrays
    axes = check_axis(x, axis)
    with backend.ignore_overflow():
        return backend.xp.squeeze(backend.group_norm(x, axes), axis=axes)


@isolated
def prox_l21(x: Array, tau: float | Array, *, axis: int = -1) -> Array:
    r"""Shorten the rows or columns of matrices: the proximal operator of ``tau * ||x||_{2,1}`` (group lasso).

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating.
    tau : float or array
        Threshold, 0 or more, infinity to keep it at zero; an array broadcasts to ``x`` and has length one along
        ``axis``: one number a group.
    axis : int
        The axis along which a group lies: -1 makes groups of rows, -2 of columns.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its group.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or ``axis`` not an int.
    ValueError
        If ``x`` has fewer than two axes; if ``tau`` is negative or not finite, or does not fit ``x``; if ``axis`` is
        not one of the last two, or empty.

    Notes
    -----
    .. math:: \operatorname{prox}(x)_g = x_g \max(1 - \tau_g / \|x_g\|_2, 0) \text{ for each group } g

    References
    ----------
    M. Yuan, Y. Lin, Model selection and estimation in regression with grouped variables,
    Journal of the Royal Statistical Society B 68 (2006), 49-67.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_l21(np.asarray([[6.0, 0.3], [8.0, 0.4]]), 5.0, axis=-2).tolist()
    [[3.0, 0.0], [4.0, 0.0]]
    """
    backend = resolve(x=x)
    return _shorten(x, tau, _check_group_axis(x, axis), backend)


@isolated
def norm_l21(x: Array, *, axis: int = -1) -> Array:
    r"""Sum of the Euclidean norms of the rows or columns of matrices, the function behind `prox_l21`.

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating.
    axis : int
        The axis along which a group lies: -1 makes groups of rows, -2 of columns.

    Returns
    -------
    array, shape (...)
        Real; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``axis`` not an int.
    ValueError
        If ``x`` has fewer than two axes; if ``axis`` is not one of the last two, or empty.

    Notes
    -----
    .. math:: \|x\|_{2,1} = \sum_g \|x_g\|_2

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_l21(np.asarray([[6.0, 0.3], [8.0, 0.4]]), axis=-2))
    10.5
    """
    backend = resolve(x=x)
    (x,) = promote(backend, keep_half=backend.takes_half, x=x).arrays
    axes = _check_group_axis(x, axis)
    with backend.ignore_overflow():
        return backend.total(backend.group_norm(x, axes), (-2, -1))


@isolated
def project_l2_ball(
    x: Array, radius: float | Array = 1.0, *, axis: int | tuple[int, ...] = -1
) -> Array:
    r"""Nearest point of the Euclidean ball around zero.

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
    .. math:: P(x) = x \min(1, r / \|x\|_2)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 6.5.1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.project_l2_ball(np.asarray([[6.0, 8.0], [0.3, 0.4]]), 5.0).tolist()
    [[3.0, 4.0], [0.3, 0.4]]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    axes = check_axis(x, axis)
    radius = check_tau(backend, x, radius, "radius", axes=axes)
    xp = backend.xp
    with backend.ignore_overflow():
        unit, norm = backend.scaled_group_norm(x, axes)
        inside = unit * norm <= radius
        scale = (radius / unit) / xp.where(inside, 1.0, norm)
        return promoted.cast_back(backend, xp.where(inside, x, x * scale))[0]


def _shorten(x: Array, tau: float | Array, axes: tuple[int, ...], backend: Backend) -> Array:
    promoted = promote(backend, keep_half=backend.takes_half, x=x)
    (x,) = promoted.arrays
    tau = check_tau(backend, x, tau, axes=axes, allow_inf=True)
    with backend.ignore_overflow():
        return promoted.cast_back(backend, backend.group_threshold(x, tau, axes))[0]


def _check_group_axis(x: Array, axis: int) -> tuple[int, ...]:
    check_matrix(x, "x")
    axes = check_axis(x, axis)
    if len(axes) != 1 or axes[0] < x.ndim - 2:
        raise ValueError(f"axis must be -1 (groups are rows) or -2 (columns), got {axis}")
    return axes
