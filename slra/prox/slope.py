"""The sorted l1 norm (SLOPE, OWL): the larger an entry, the more it pays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import check_axis, check_numbers, check_tau, promote, resolve

__all__ = ["norm_slope", "prox_slope"]


@isolated
def prox_slope(x: Array, tau: float | Array, *, weights: Sequence[float], axis: int = -1) -> Array:
    r"""Proximal operator of ``tau`` times the sorted l1 norm.

    Parameters
    ----------
    x : array
        Real or complex floating.
    tau : float or array
        Step, 0 or more; an array broadcasts to ``x`` and has length one along ``axis``.
    weights : sequence of float
        One for each entry along ``axis``, the first for the largest modulus: never rising, 0 or more. On the host.
    axis : int
        The axis of the vectors; the others are a batch.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its vector.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``tau`` neither a real number nor such an array.
    ValueError
        If ``tau`` is negative or not finite, or does not fit ``x``; if ``axis`` is out of range or empty; if there are
        not as many weights as entries, or they rise or are negative.

    Notes
    -----
    The sorted moduli less ``tau * weights``, made to fall by isotonic regression and cut off at 0; then put back where
    they were, with their phases. The regression is SciPy's (pool adjacent violators); where values cannot be looked at
    or a derivative is asked for it is the formula with ``n^2`` means

    .. math:: y_i = \min_{a \le i} \max_{b \ge i} \operatorname{mean}(z_a, \dots, z_b)

    References
    ----------
    M. Bogdan, E. van den Berg, C. Sabatti, W. Su, E. J. Candes, SLOPE - adaptive variable selection via convex
    optimization, Annals of Applied Statistics 9 (2015), 1103-1140, Algorithm 3.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_slope(np.asarray([-3.0, 0.5, 2.5]), 1.0, weights=[2.0, 1.0, 0.0]).tolist()
    [-1.25, 0.5, 1.25]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    (along,) = check_axis(x, (axis,))
    tau = check_tau(backend, x, tau, axes=(along,))
    lam = _checked(weights, x.shape[along])
    xp = backend.xp
    with backend.ignore_overflow():
        moved = xp.moveaxis(x, along, -1)
        if not isinstance(tau, float):
            tau = xp.broadcast_to(tau, tuple(1 if a == along else n for a, n in enumerate(x.shape)))
            tau = xp.moveaxis(tau, along, -1)
        modulus = backend.modulus(moved)
        levels = tau * backend.from_numpy(lam, x, backend.real_dtype(x.dtype))
        if backend.takes_rows_to_numpy(modulus, levels):
            fit = backend.rows_by_numpy(_by_regression, modulus, levels)
        else:
            order = xp.argsort(modulus, axis=-1, descending=True)
            falling = _by_means(xp.take_along_axis(modulus, order, axis=-1) - levels, backend)
            back = xp.argsort(order, axis=-1)
            fit = xp.take_along_axis(backend.at_least(falling, 0.0), back, axis=-1)
        gain = fit / xp.where(modulus == 0, xp.ones_like(modulus), modulus)
        return promoted.cast_back(backend, xp.moveaxis(moved * gain, -1, along))[0]


@isolated
def norm_slope(x: Array, *, weights: Sequence[float], axis: int = -1) -> Array:
    r"""Sorted l1 norm, the function behind `prox_slope`.

    Parameters
    ----------
    x : array
        Real or complex floating.
    weights : sequence of float
        As for `prox_slope`.
    axis : int
        The axis of the vectors.

    Returns
    -------
    array
        Real, without that axis; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array.
    ValueError
        If ``axis`` is out of range or empty; if there are not as many weights as entries, or they rise or are negative.

    Notes
    -----
    .. math:: f(x) = \sum_i w_i |x|_{(i)}, \quad |x|_{(1)} \ge |x|_{(2)} \ge \dots

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_slope(np.asarray([-3.0, 0.5, 2.5]), weights=[2.0, 1.0, 0.0]))
    8.5
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    (along,) = check_axis(x, (axis,))
    lam = _checked(weights, x.shape[along])
    xp = backend.xp
    with backend.ignore_overflow():
        modulus = backend.modulus(xp.moveaxis(x, along, -1))
        ordered = xp.sort(modulus, axis=-1, descending=True)
        return xp.sum(ordered * backend.from_numpy(lam, x, backend.real_dtype(x.dtype)), axis=-1)


def _checked(weights: Any, n: int) -> np.ndarray[Any, Any]:
    lam = check_numbers(weights, "weights", n, "entry")
    if not (np.all(np.isfinite(lam)) and np.all(np.diff(lam) <= 0) and np.all(lam >= 0)):
        raise ValueError("weights must be finite, 0 or more, and never rise")
    return lam


def _by_regression(
    modulus: np.ndarray[Any, Any], levels: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Shrink vectors along the last axis."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(-modulus, axis=-1, stable=True)
    z: np.ndarray[Any, Any] = np.take_along_axis(modulus, order, axis=-1) - levels
    fit = np.empty_like(z)
    for place in np.ndindex(z.shape[:-1]):
        is_finite = np.all(np.isfinite(z[place]))
        fit[place] = isotonic_regression(z[place], increasing=False).x if is_finite else np.nan
    np.put_along_axis(z, order, np.maximum(fit, 0), axis=-1)
    return z


def _by_means(z: Array, backend: Backend) -> Array:
    """Nearest sequences that never rise, along the last axis, where values cannot be looked at."""
    xp, n = backend.xp, z.shape[-1]
    device = backend.creation_device(z)
    sums = xp.cumulative_sum(z, axis=-1, include_initial=True)
    i = xp.arange(n, device=device)
    counts = xp.astype(xp.abs(i[None, :] - i[:, None]) + 1, z.dtype)
    # Entry (a, b) is the mean of z_a to z_b.
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / counts
    is_run = i[:, None] <= i[None, :]
    means = xp.where(is_run, means, -float("inf"))
    # The largest over b >= i for each (a, i), by the running maximum from the right.
    highest = xp.stack([xp.max(means[..., j:], axis=-1) for j in range(n)], axis=-1)
    return xp.min(xp.where(is_run, highest, float("inf")), axis=-2)
