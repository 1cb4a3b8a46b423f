r"""The combined objective: a task's loss and the l1 norms of the low-rank queries, keys and values.

.. math:: L = L_{\text{task}} + \lambda_Q \|\hat Q\|_1 + \lambda_K \|\hat K\|_1 + \lambda_V \|\hat V\|_1

It can be minimised in two ways: with the penalty's subgradient (what automatic differentiation uses), which brings
entries near zero, or with its proximal operator, which makes them exactly zero.
"""

from typing import Any

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._typing import Array, Namespace
from slra._validate import (
    check_l1,
    check_positive,
    check_scalar,
    check_tau,
    is_array,
    promote,
    resolve,
)
from slra.prox.l1 import norm_l1, prox_l1

__all__ = ["combined_objective", "l1_penalty", "l1_penalty_grad", "l1_penalty_prox"]

L1 = float | Array | tuple[float | Array, float | Array, float | Array]


def __dir__() -> list[str]:
    return __all__


@isolated
def combined_objective(task: Any, q: Array, k: Array, v: Array, l1: L1) -> Array:
    r"""Loss of the task plus the l1 penalty on the low-rank queries, keys and values.

    Parameters
    ----------
    task : float or 0-d array
        Loss of the task, L_task.
    q, k, v : array
        Q^, K^ and V^; real floating, any shapes, of one library.
    l1 : float, 0-d array, or three of them
        Weights lambda_Q, lambda_K and lambda_V, each 0 or more; one number for all three. An array may be traced or
        learned; its value is checked where it can be looked at.

    Returns
    -------
    array
        0-d, real.

    Raises
    ------
    TypeError
        If an array is not real floating, two come from different libraries, or ``l1`` is not a number or three of them.
    ValueError
        If a weight is negative or not finite.

    Notes
    -----
    .. math:: L = L_{\text{task}} + \lambda_Q \|\hat Q\|_1 + \lambda_K \|\hat K\|_1 + \lambda_V \|\hat V\|_1

    The norms are sums over all entries: for a batch whose task loss is a mean, divide ``l1`` by its size.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import objective
    >>> q, k, v = np.asarray([-1.0, 2.0]), np.asarray([0.5]), np.asarray([4.0])
    >>> float(objective.combined_objective(10.0, q, k, v, (1.0, 2.0, 0.0)))
    14.0
    """
    backend = _check(q, k, v)
    task = check_scalar(backend, task, "task")
    penalty = l1_penalty(q, k, v, l1)
    with backend.ignore_overflow():
        return task + penalty


@isolated
def l1_penalty(q: Array, k: Array, v: Array, l1: L1) -> Array:
    r"""Weighted sum of the l1 norms of the low-rank queries, keys and values.

    Parameters
    ----------
    q, k, v : array
        Q^, K^ and V^; real floating, any shapes, of one library.
    l1 : float, 0-d array, or three of them
        Weights lambda_Q, lambda_K and lambda_V, each 0 or more; one number for all three. An array may be traced or
        learned; its value is checked where it can be looked at.

    Returns
    -------
    array
        0-d, real. Sums are formed in the dtype of each array, float32 for half precision.

    Raises
    ------
    TypeError
        If an array is not real floating, two come from different libraries, or ``l1`` is not a number or three of them.
    ValueError
        If a weight is negative or not finite.

    Notes
    -----
    .. math:: \lambda_Q \|\hat Q\|_1 + \lambda_K \|\hat K\|_1 + \lambda_V \|\hat V\|_1

    torch and JAX differentiate it; their gradient is that of `l1_penalty_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> from slra import objective
    >>> q, k, v = np.asarray([-1.0, 2.0]), np.asarray([0.5]), np.asarray([4.0])
    >>> float(objective.l1_penalty(q, k, v, (1.0, 2.0, 0.0)))
    4.0
    """
    backend = _check(q, k, v)
    weights = check_l1(l1, _summed_in(backend, q, k, v), backend)
    with backend.ignore_overflow():
        parts = [
            _weighted_norm(x, weight, backend) for x, weight in zip((q, k, v), weights, strict=True)
        ]
        return parts[0] + parts[1] + parts[2]


@isolated
def l1_penalty_grad(q: Array, k: Array, v: Array, l1: L1) -> tuple[Array, Array, Array]:
    r"""Subgradient of `l1_penalty`: the one that is 0 where an entry is 0.

    Parameters
    ----------
    q, k, v : array
        Q^, K^ and V^; real floating, any shapes, of one library.
    l1 : float, 0-d array, or three of them
        Weights lambda_Q, lambda_K and lambda_V, each 0 or more; one number for all three. An array may be traced or
        learned; its value is checked where it can be looked at.

    Returns
    -------
    dq, dk, dv : array
        In the shapes and dtypes of q, k and v.

    Raises
    ------
    TypeError
        If an array is not real floating, two come from different libraries, or ``l1`` is not a number or three of them.
    ValueError
        If a weight is negative or not finite.

    Notes
    -----
    .. math:: \lambda_Q \operatorname{sign}(\hat Q), \quad \operatorname{sign}(0) = 0

    At 0 every number of modulus up to lambda is a subgradient; 0 is the smallest, and what differentiating `l1_penalty`
    gives, on torch and on JAX (where ``jax.grad`` of ``abs`` alone is 1 at 0).

    Examples
    --------
    >>> import numpy as np
    >>> from slra import objective
    >>> q, k, v = np.asarray([-3.0, 0.0]), np.asarray([0.5]), np.asarray([4.0])
    >>> [x.tolist() for x in objective.l1_penalty_grad(q, k, v, (1.0, 2.0, 0.5))]
    [[-1.0, 0.0], [2.0], [0.5]]
    """
    backend = _check(q, k, v)
    weights = check_l1(l1, [backend.xp.finfo(x.dtype) for x in (q, k, v)], backend)
    dq, dk, dv = [
        _in_dtype(weight, x, backend) * _sign(x, backend.xp)
        for x, weight in zip((q, k, v), weights, strict=True)
    ]
    return dq, dk, dv


@isolated
def l1_penalty_prox(
    q: Array,
    k: Array,
    v: Array,
    l1: L1,
    *,
    step: float | Array | tuple[float | Array, float | Array, float | Array] = 1.0,
) -> tuple[Array, Array, Array]:
    r"""Proximal operator of ``step`` times `l1_penalty`: soft thresholds, which give exact zeros.

    Parameters
    ----------
    q, k, v : array
        Q^, K^ and V^; real floating, any shapes, of one library.
    l1 : float, 0-d array, or three of them
        Weights lambda_Q, lambda_K and lambda_V, each 0 or more; one number for all three. An array may be traced or
        learned; its value is checked where it can be looked at.
    step : float, array, or three of them
        Length of the gradient step before it, 0 or more; 1 makes ``l1`` the thresholds. An array, which broadcasts to
        q, k and v (one of three to one of them), is that of each entry: of an optimizer that scales its steps, such as
        Adam, ``lr / (sqrt(v) + eps)``.

    Returns
    -------
    q, k, v : array
        In the shapes and dtypes of the arguments.

    Raises
    ------
    TypeError
        If an array is not real floating, two come from different libraries, or ``l1`` is not a number or three of them.
    ValueError
        If a weight or ``step`` is negative or not finite, or ``step`` does not broadcast.

    Notes
    -----
    .. math:: \operatorname{prox}(x)_i = \operatorname{sign}(x_i) \max(|x_i| - s \lambda, 0)

    The step must be that of each entry: the prox of another metric than that of the gradient step has other fixed
    points, which are no minimisers.

    After a step against the gradient of the task's loss it is one iteration of proximal gradient; for a loop with
    steps that are found and momentum see `slra.proximal_gradient`.

    Examples
    --------
    One iteration on ``1/2 ||q - b||^2 + ||q||_1``, and the same with nothing for k and v:

    >>> import numpy as np
    >>> from slra import objective
    >>> q, b, none = np.zeros(2), np.asarray([3.0, 0.5]), np.zeros(0)
    >>> objective.l1_penalty_prox(q - 1.0 * (q - b), none, none, 1.0)[0].tolist()
    [2.0, 0.0]
    """
    backend = _check(q, k, v)
    steps = step if isinstance(step, (tuple, list)) else (step,) * 3
    if len(steps) != 3:
        raise TypeError(f"step must be a number, an array or three of them, got {len(steps)}")
    limits = _summed_in(backend, q, k, v)
    weights = check_l1(l1, limits, backend)
    q, k, v = [
        _thresholded(x, one, weight, float(limit.max), backend)
        for x, one, weight, limit in zip((q, k, v), steps, weights, limits, strict=True)
    ]
    return q, k, v


def _check(q: Array, k: Array, v: Array) -> Backend:
    """Raise unless the three are real floating arrays of one library; they may differ in dtype."""
    backend = resolve(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        promote(backend, allow_complex=False, **{name: x})
    return backend


def _summed_in(backend: Backend, *arrays: Array) -> list[Any]:
    """Return what `finfo` says of the dtypes of sums over these arrays, which are single for half precision."""
    return [backend.xp.finfo(promote(backend, x=x).arrays[0].dtype) for x in arrays]


def _in_dtype(weight: Any, x: Array, backend: Backend) -> Any:
    """Give a weight that is an array the dtype of ``x``: 0-d tensors promote otherwise than the standard says."""
    return weight if isinstance(weight, float) else backend.xp.astype(weight, x.dtype, copy=False)


def _thresholded(x: Array, step: Any, weight: Any, largest: float, backend: Backend) -> Array:
    """Soft-threshold by a product; beyond the largest number it leaves nothing, as does that number."""
    if not is_array(step):
        step = check_positive(step, "step", allow_zero=True)
        if isinstance(weight, float):
            return x if weight == 0 else prox_l1(x, min(step * weight, largest))
    (wide,) = promote(backend, x=x).arrays
    if not isinstance(step, float):
        step = check_tau(backend, wide, step, "step")
    with backend.ignore_overflow():
        product = step * _in_dtype(weight, wide, backend)
    return prox_l1(x, backend.at_most(product, largest))


def _weighted_norm(x: Array, weight: Any, backend: Backend) -> Array:
    """Product of the weight and the l1 norm; without a weight it is 0 for an infinite norm too."""
    if not isinstance(weight, float):
        norm = norm_l1(x)
        weight = _in_dtype(weight, norm, backend)
        is_nothing = (weight == 0) & ~backend.xp.isfinite(norm)
        return weight * backend.xp.where(is_nothing, backend.xp.zeros_like(norm), norm)
    if weight >= float(_summed_in(backend, x)[0].smallest_normal):
        return weight * norm_l1(x)
    return norm_l1(backend.xp.reshape(x, (-1,))[:0])


def _sign(x: Array, xp: Namespace) -> Array:
    """Sign of ``x``: 0 for 0, and NaN for NaN, which not every library's own gives."""
    ones = xp.ones_like(x)
    return xp.where(x > 0, ones, xp.where(x < 0, -ones, x))
