"""Operators made of others: shifted, scaled, conjugate, smoothed, and of several blocks.

All take and return functions ``prox(x, tau)``, such as `slra.prox.prox_l1`, or a ``functools.partial`` of one that
needs options.
"""

from collections.abc import Callable, Sequence
from typing import Any

from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import (
    check_axis,
    check_callable,
    check_positive,
    check_weight,
    is_array,
    resolve,
)

__all__ = ["conjugate", "envelope", "scale", "separable", "translate"]

Prox = Callable[[Array, Any], Array]


def translate(prox: Prox, shift: Array) -> Prox:
    r"""Operator of ``f(x - shift)``, from that of ``f``.

    Parameters
    ----------
    prox : callable
        ``prox(x, tau)``, the operator of ``tau * f``.
    shift : array
        What is taken off ``x``; broadcasts to it.

    Returns
    -------
    callable
        ``(x, tau)`` to an array.

    Raises
    ------
    TypeError
        If ``prox`` is not callable.

    Notes
    -----
    .. math:: \operatorname{prox}(x) = b + \operatorname{prox}_{\tau f}(x - b)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> near = prox.translate(prox.prox_l1, np.asarray([1.0, 1.0]))
    >>> near(np.asarray([3.0, 1.5]), 1.0).tolist()
    [2.0, 1.0]
    """
    check_callable(prox, "prox")
    return isolated(lambda x, tau: shift + prox(x - shift, tau))


def scale(prox: Prox, factor: float | Array = 1.0, *, argument: float | Array = 1.0) -> Prox:
    r"""Operator of ``factor * f(argument * x)``, from that of ``f``.

    Parameters
    ----------
    prox : callable
        ``prox(x, tau)``, the operator of ``tau * f``.
    factor : float or 0-d array
        0 or more. An array may be traced or learned; it is checked on the call, where it can be looked at.
    argument : float or 0-d array
        Greater than 0.

    Returns
    -------
    callable
        ``(x, tau)`` to an array.

    Raises
    ------
    TypeError
        If ``prox`` is not callable, or a number not one.
    ValueError
        If ``factor`` is negative or ``argument`` not positive.

    Notes
    -----
    .. math:: \operatorname{prox}(x) = \operatorname{prox}_{c a^2 \tau f}(a x) / a

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.scale(prox.prox_l1, 2.0)(np.asarray([3.0, 1.5]), 1.0).tolist()
    [1.0, 0.0]
    """
    check_callable(prox, "prox")
    if not is_array(factor):
        factor = check_positive(factor, "factor", allow_zero=True)
    if not is_array(argument):
        argument = check_positive(argument, "argument")

    def call(x: Array, tau: Any) -> Array:
        c = _in_call(x, factor, "factor", allow_zero=True)
        a = _in_call(x, argument, "argument")
        if isinstance(a, float) and a == 1:
            return prox(x, c * tau)
        return prox(a * x, c * a * a * tau) / a

    return isolated(call)


def _in_call(x: Array, number: Any, name: str, *, allow_zero: bool = False) -> Any:
    """Return a number as it is, or an array for use with ``x``."""
    if isinstance(number, float):
        return number
    return check_weight(resolve(x=x), x, number, name, allow_zero=allow_zero)


def conjugate(prox: Prox) -> Prox:
    r"""Operator of the convex conjugate ``f*``, from that of a convex ``f``.

    Parameters
    ----------
    prox : callable
        ``prox(x, tau)``, the operator of ``tau * f``.

    Returns
    -------
    callable
        ``(x, tau)`` to an array, for ``tau`` greater than 0.

    Raises
    ------
    TypeError
        If ``prox`` is not callable.

    Notes
    -----
    Moreau's identity:

    .. math:: \operatorname{prox}_{\tau f^*}(x) = x - \tau \operatorname{prox}_{f / \tau}(x / \tau)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 2.5.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.conjugate(prox.prox_l1)(np.asarray([3.0, 0.5]), 2.0).tolist()
    [1.0, 0.5]
    """
    check_callable(prox, "prox")
    return isolated(lambda x, tau: x - tau * prox(x / tau, 1 / tau))


def envelope(prox: Prox, mu: float | Array = 1.0) -> Prox:
    r"""Operator of the Moreau envelope of ``f``, which is ``f`` made smooth, from that of a convex ``f``.

    Parameters
    ----------
    prox : callable
        ``prox(x, tau)``, the operator of ``tau * f``.
    mu : float or 0-d array
        How smooth, greater than 0: the gradient ``(x - prox(x, mu)) / mu`` has the Lipschitz constant ``1 / mu``.

    Returns
    -------
    callable
        ``(x, tau)`` to an array.

    Raises
    ------
    TypeError
        If ``prox`` is not callable, or ``mu`` not a number.
    ValueError
        If ``mu`` is not positive.

    Notes
    -----
    .. math:: M(x) = \min_y f(y) + \frac{1}{2 \mu} \|y - x\|^2, \quad \operatorname{prox}_{\tau M}(x) =
        \frac{\mu x + \tau \operatorname{prox}_{(\mu + \tau) f}(x)}{\mu + \tau}

    References
    ----------
    A. Beck, First-Order Methods in Optimization, SIAM 2017, Corollary 6.64.

    Examples
    --------
    The envelope of the modulus is Huber's function:

    >>> import numpy as np
    >>> from slra import prox
    >>> x = np.asarray([-3.0, 0.5, 2.0])
    >>> prox.envelope(prox.prox_l1)(x, 1.0).tolist(), prox.prox_huber(x, 1.0, delta=1.0).tolist()
    ([-2.0, 0.25, 1.0], [-2.0, 0.25, 1.0])
    """
    check_callable(prox, "prox")
    if not is_array(mu):
        mu = check_positive(mu, "mu")

    def call(x: Array, tau: Any) -> Array:
        m = _in_call(x, mu, "mu")
        return (m * x + tau * prox(x, m + tau)) / (m + tau)

    return isolated(call)


def separable(proxes: Sequence[Prox], sizes: Sequence[int], *, axis: int = -1) -> Prox:
    r"""Operator of a sum of functions of blocks of ``x``, from those of the functions.

    Parameters
    ----------
    proxes : sequence of callable
        ``prox(x, tau)`` for each block.
    sizes : sequence of int
        Length of each block along ``axis``.
    axis : int
        Where the blocks follow each other.

    Returns
    -------
    callable
        ``(x, tau)`` to an array; ``tau`` is a number, or has length one along ``axis``.

    Raises
    ------
    TypeError
        If a prox is not callable.
    ValueError
        If there are not as many sizes as operators; on the call, if they do not add up to the length of ``x``.

    Notes
    -----
    .. math:: f(x) = \sum_k f_k(x_k)

    References
    ----------
    N. Parikh, S. Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), section 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> both = prox.separable([prox.prox_l1, prox.prox_nonneg_l1], [2, 1])
    >>> both(np.asarray([-3.0, 0.5, -2.0]), 1.0).tolist()
    [-2.0, 0.0, 0.0]
    """
    for i, prox in enumerate(proxes):
        check_callable(prox, f"proxes[{i}]")
    if len(sizes) != len(proxes) or not proxes:
        raise ValueError(f"sizes must be one for each of {len(proxes)} operators, got {len(sizes)}")

    def apply(x: Array, tau: Any) -> Array:
        (along,) = check_axis(x, (axis,))
        if sum(sizes) != x.shape[along]:
            raise ValueError(
                f"sizes must add up to the length of x along axis {axis}, {x.shape[along]}, got {sum(sizes)}"
            )
        parts, start = [], 0
        for prox, size in zip(proxes, sizes, strict=True):
            index = (slice(None),) * along + (slice(start, start + size), ...)
            parts.append(prox(x[index], tau))
            start += size
        return resolve(x=x).xp.concat(parts, axis=along)

    return isolated(apply)
