"""Sums of Euclidean norms over groups of any sizes, with weights, alone and beside an l1 norm."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import Array
from slra._validate import (
    check_axis,
    check_numbers,
    check_tau,
    check_weight,
    on_host,
    promote,
    resolve,
    shown,
)

__all__ = ["norm_groups", "norm_sparse_group", "prox_groups", "prox_sparse_group"]

Groups = Sequence[Any] | Any


@isolated
def prox_groups(
    x: Array,
    tau: float | Array,
    *,
    groups: Groups,
    weights: Sequence[float] | None = None,
    axis: int = -1,
) -> Array:
    r"""Shorten groups of entries: the proximal operator of ``tau * sum_g w_g ||x_g||_2``.

    Parameters
    ----------
    x : array
        Real or complex floating.
    tau : float or array
        Threshold, 0 or more; an array broadcasts to ``x`` and has length one along ``axis``.
    groups : sequence of int, or sequence of sequences of int
        The number of the group of each entry along ``axis``, from 0; or for each group the indices that it has. Groups
        do not overlap; of any sizes; what is in none of them stays as it is. On the host: lists or NumPy arrays.
    weights : sequence of float, optional
        One for each group, 0 or more, infinity to keep it at zero; 1 by default.
    axis : int
        The axis along which the groups lie; the others are a batch.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its group.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or ``groups`` not of ints.
    ValueError
        If ``tau`` is negative or NaN, or does not fit ``x``; if ``axis`` is out of range or empty; if ``groups`` has
        another length than ``x``, an index out of range, or one twice; if there are not as many weights as groups, or
        one is negative.

    Notes
    -----
    .. math:: \operatorname{prox}(x)_g = x_g \max(1 - \tau w_g / \|x_g\|_2, 0)

    Groups of like sizes are gathered and taken together: a dozen passes for thousands of groups.

    References
    ----------
    M. Yuan, Y. Lin, Model selection and estimation in regression with grouped variables,
    Journal of the Royal Statistical Society B 68 (2006), 49-67.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_groups(np.asarray([6.0, 0.5, 8.0]), 5.0, groups=[[0, 2], [1]]).tolist()
    [3.0, 0.0, 4.0]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    axes = check_axis(x, (axis,))
    tau = check_tau(backend, x, tau, axes=axes, allow_inf=True)
    layout = _layout(groups, weights, x.shape[axes[0]])
    with backend.ignore_overflow():
        return promoted.cast_back(backend, _shorten(x, tau, layout, axes[0], backend))[0]


@isolated
def norm_groups(
    x: Array, *, groups: Groups, weights: Sequence[float] | None = None, axis: int = -1
) -> Array:
    r"""Weighted sum of the Euclidean norms of groups, the function behind `prox_groups`.

    Parameters
    ----------
    x : array
        Real or complex floating.
    groups : sequence of int, or sequence of sequences of int
        As for `prox_groups`.
    weights : sequence of float, optional
        As for `prox_groups`.
    axis : int
        The axis along which the groups lie.

    Returns
    -------
    array
        Real, without that axis; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``groups`` not of ints.
    ValueError
        If ``axis`` is out of range or empty, or ``groups`` or ``weights`` do not fit.

    Notes
    -----
    .. math:: f(x) = \sum_g w_g \|x_g\|_2

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_groups(np.asarray([6.0, 0.5, 8.0]), groups=[0, 1, 0]))
    10.5
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    (along,) = check_axis(x, (axis,))
    layout = _layout(groups, weights, x.shape[along])
    with backend.ignore_overflow():
        return _total(x, layout, along, backend)


@isolated
def prox_sparse_group(
    x: Array,
    tau: float | Array,
    *,
    groups: Groups,
    l1: float | Array = 1.0,
    weights: Sequence[float] | None = None,
    axis: int = -1,
) -> Array:
    r"""Shrink entries, then groups: the proximal operator of ``tau * (l1 ||x||_1 + sum_g w_g ||x_g||_2)``.

    Parameters
    ----------
    x : array
        Real or complex floating.
    tau : float or array
        Threshold, 0 or more; an array broadcasts to ``x`` and has length one along ``axis``.
    groups : sequence of int, or sequence of sequences of int
        As for `prox_groups`.
    l1 : float or 0-d array
        Weight of the l1 norm, 0 or more. An array may be traced or learned.
    weights : sequence of float, optional
        As for `prox_groups`.
    axis : int
        The axis along which the groups lie; the others are a batch.

    Returns
    -------
    array
        The shape, dtype and device of ``x``. NaN spreads over its group.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``tau`` neither a real number nor such an array, or ``groups`` not of ints.
    ValueError
        If ``tau`` or ``l1`` is negative or not finite, or ``tau`` does not fit ``x``; if ``axis`` is out of range or
        empty; if ``groups`` or ``weights`` do not fit.

    Notes
    -----
    The operator of the sum is that of the groups after that of the l1 norm.

    References
    ----------
    N. Simon, J. Friedman, T. Hastie, R. Tibshirani, A sparse-group lasso, Journal of Computational and Graphical
    Statistics 22 (2013), 231-245.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> prox.prox_sparse_group(np.asarray([4.0, 0.5, 5.0]), 1.0, groups=[0, 0, 0]).round(3).tolist()
    [2.4, 0.0, 3.2]
    """
    backend = resolve(x=x)
    promoted = promote(backend, x=x)
    (x,) = promoted.arrays
    axes = check_axis(x, (axis,))
    tau = check_tau(backend, x, tau, axes=axes)
    l1 = check_weight(backend, x, l1, "l1", allow_zero=True)
    layout = _layout(groups, weights, x.shape[axes[0]])
    with backend.ignore_overflow():
        shrunk = backend.soft_threshold(x, tau * l1)
        return promoted.cast_back(backend, _shorten(shrunk, tau, layout, axes[0], backend))[0]


@isolated
def norm_sparse_group(
    x: Array,
    *,
    groups: Groups,
    l1: float | Array = 1.0,
    weights: Sequence[float] | None = None,
    axis: int = -1,
) -> Array:
    r"""Weighted l1 norm plus that of groups, the function behind `prox_sparse_group`.

    Parameters
    ----------
    x : array
        Real or complex floating.
    groups : sequence of int, or sequence of sequences of int
        As for `prox_groups`.
    l1 : float or 0-d array
        Weight of the l1 norm, 0 or more. An array may be traced or learned.
    weights : sequence of float, optional
        As for `prox_groups`.
    axis : int
        The axis along which the groups lie.

    Returns
    -------
    array
        Real, without that axis; float32 for half precision.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, or ``groups`` not of ints.
    ValueError
        If ``l1`` is negative or not finite, ``axis`` out of range or empty, or ``groups`` or ``weights`` do not fit.

    Notes
    -----
    .. math:: f(x) = \ell_1 \|x\|_1 + \sum_g w_g \|x_g\|_2

    Examples
    --------
    >>> import numpy as np
    >>> from slra import prox
    >>> float(prox.norm_sparse_group(np.asarray([3.0, 0.0, 4.0]), groups=[0, 0, 0]))
    12.0
    """
    backend = resolve(x=x)
    (x,) = promote(backend, x=x).arrays
    (along,) = check_axis(x, (axis,))
    l1 = check_weight(backend, x, l1, "l1", allow_zero=True)
    layout = _layout(groups, weights, x.shape[along])
    with backend.ignore_overflow():
        return l1 * backend.sum_abs(x, along) + _total(x, layout, along, backend)


class _Layout(NamedTuple):
    """Groups as arrays: of each entry its group, or one beyond the last; the members of those of like sizes.

    A row of ``members`` has one group, filled up with an index beyond the last entry; ``place`` is where each group is
    among the rows of all blocks.
    """

    labels: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    members: list[np.ndarray[Any, Any]]
    place: np.ndarray[Any, Any]


def _layout(groups: Any, weights: Any, n: int) -> _Layout:
    labels, n_groups = _labels(groups, n)
    sizes = np.bincount(labels, minlength=n_groups + 1)[:n_groups]
    order, starts = np.argsort(labels, kind="stable"), np.cumsum(sizes) - sizes
    # Rows of one length waste no more than half of it.
    widths = 2 ** np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)
    members, place, n_rows = [], np.zeros(n_groups, int), 0
    for width in np.unique(widths):
        chosen = np.flatnonzero(widths == width)
        offsets = np.arange(min(width, sizes[chosen].max(initial=1)))
        at = np.minimum(starts[chosen, None] + offsets, n - 1)
        members.append(np.where(offsets < sizes[chosen, None], order[at], n))
        place[chosen] = n_rows + np.arange(chosen.size)
        n_rows += chosen.size
    return _Layout(labels, _checked_weights(weights, n_groups), members, place)


def _labels(groups: Any, n: int) -> tuple[np.ndarray[Any, Any], int]:
    """Group of each of n entries, the number of groups where it is in none, and that number."""
    wrong = TypeError(
        "groups must be ints, one for each entry, or sequences of ints, one for each group, "
        f"got {shown(groups)}"
    )
    if isinstance(groups, (str, bytes)) or not (
        isinstance(groups, Sequence) or compat.is_array_api_obj(groups)
    ):
        raise wrong
    outer = on_host(groups) if compat.is_array_api_obj(groups) else groups
    if outer is None or getattr(outer, "ndim", 1) == 0:
        raise wrong
    read = [on_host(g) for g in outer]
    given = [g for g in read if g is not None and (g.dtype.kind in "iu" or not g.size)]
    if len(given) < len(read) or {g.ndim for g in given} not in ({0}, {1}, set()):
        raise wrong
    if not given:
        raise ValueError("groups must have one group or more, got none")
    if given[0].ndim == 0:
        labels = np.asarray(given).astype(int)
        if labels.shape != (n,):
            raise ValueError(f"groups must have {n} numbers, one for each entry, got {len(labels)}")
        if labels.min() < 0:
            raise ValueError(f"groups must be numbers from 0 on, got {labels.min()}")
        return labels, int(labels.max()) + 1
    indices = np.concatenate(given).astype(int)
    if indices.size and not -n <= indices.min() <= indices.max() < n:
        raise ValueError(f"groups must have indices of the {n} entries, got {indices.max()}")
    if np.unique(indices % n).size < indices.size:
        raise ValueError("groups must not overlap, got an index twice")
    labels = np.full(n, len(given))
    labels[indices] = np.repeat(np.arange(len(given)), [g.size for g in given])
    return labels, len(given)


def _checked_weights(weights: Any, n_groups: int) -> np.ndarray[Any, Any]:
    if weights is None:
        return np.ones(n_groups)
    checked = check_numbers(weights, "weights", n_groups, "group")
    if not np.all(checked >= 0):
        raise ValueError("weights must be 0 or more")
    return checked


def _norms(x: Array, layout: _Layout, backend: Backend) -> tuple[Array, Array]:
    """Scale and norm over it of each group along the last axis of ``x``, (..., n_groups) each."""
    xp = backend.xp
    padded = xp.concat([x, xp.zeros_like(x[..., :1])], axis=-1)
    parts = []
    for members in layout.members:
        gathered = backend.take_places(padded, members.ravel())
        gathered = xp.reshape(gathered, (*x.shape[:-1], *members.shape))
        parts.append(backend.scaled_group_norm(gathered, (x.ndim,)))
    unit, norm = (
        backend.take_places(xp.concat([part[i][..., 0] for part in parts], axis=-1), layout.place)
        for i in (0, 1)
    )
    return unit, norm


def _shorten(x: Array, tau: float | Array, layout: _Layout, axis: int, backend: Backend) -> Array:
    xp = backend.xp
    x = xp.moveaxis(x, axis, -1)
    if not isinstance(tau, float):
        tau = xp.moveaxis(xp.broadcast_to(tau, (*x.shape[:axis], 1, *x.shape[axis:-1])), axis, -1)
    unit, norm = _norms(x, layout, backend)
    weights = backend.from_numpy(layout.weights, x, backend.real_dtype(x.dtype))
    # Without a weight there is no threshold, whatever tau.
    level = xp.where(weights == 0, 0.0, tau * xp.where(weights == 0, 1.0, weights))
    is_zero = norm == 0
    gain = backend.at_least(norm - level / unit, 0.0) / xp.where(is_zero, 1.0, norm)
    gain = xp.where(is_zero & (level == 0), xp.ones_like(gain), gain)
    # Those that are in no group find a gain of 1 behind the others.
    gain = xp.concat([gain, xp.ones_like(gain[..., :1])], axis=-1)
    gain = backend.take_places(gain, layout.labels)
    return xp.moveaxis(x * gain, -1, axis)


def _total(x: Array, layout: _Layout, axis: int, backend: Backend) -> Array:
    xp = backend.xp
    unit, norm = _norms(xp.moveaxis(x, axis, -1), layout, backend)
    weights = backend.from_numpy(layout.weights, x, backend.real_dtype(x.dtype))
    norm = unit * norm
    return xp.sum(xp.where((weights == 0) | (norm == 0), 0.0, weights * norm), axis=-1)
