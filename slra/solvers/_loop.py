"""The loop around a step of a solver: history, stopping, callback."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from slra._backends import Backend
from slra._backends.ambient import with_callers_errors
from slra._typing import Array
from slra._validate import check_count, check_positive

__all__ = ["Callback", "Progress", "SolveResult", "Step", "check_limits", "inner", "norm", "run"]


class SolveResult(NamedTuple):
    """What a solver returns.

    Attributes
    ----------
    x : array
        The last iterate.
    n_iter : int
        Number of iterations made.
    objective : array, shape (n_iter,), or None
        Value of ``objective`` after each iteration, where one was given.
    residual : array, shape (n_iter,)
        What ``tol`` is compared with, after each iteration; real.
    converged : bool or None
        Whether the last residual is at most ``tol``; None where ``tol`` is.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> y = np.asarray([3.0, 0.5])
    >>> half = lambda x: (0.5 * np.sum((x - y) ** 2), x - y)
    >>> result = slra.proximal_gradient(0 * y, half, slra.prox.prox_l1)
    >>> result.x.round(6).tolist(), result.converged, result.residual.shape == (result.n_iter,)
    ([2.0, 0.0], True, True)
    """

    x: Array
    n_iter: int
    objective: Array | None
    residual: Array
    converged: bool | None


class Progress(NamedTuple):
    """What a callback is given after each iteration.

    Attributes
    ----------
    n_iter : int
        Number of iterations made so far.
    x : array
        The current iterate.
    objective : array or None
        Value of ``objective`` there, where one was given; 0-d.
    residual : float
        What ``tol`` is compared with.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> y = np.asarray([3.0, 0.5])
    >>> half = lambda x: (0.5 * np.sum((x - y) ** 2), x - y)
    >>> seen = []
    >>> result = slra.proximal_gradient(0 * y, half, slra.prox.prox_l1, callback=seen.append)
    >>> [progress.n_iter for progress in seen] == list(range(1, result.n_iter + 1))
    True
    """

    n_iter: int
    x: Array
    objective: Array | None
    residual: float


class Step(NamedTuple):
    """One iteration: what the next one needs, and what it has to show."""

    state: Any
    x: Array
    residual: Array


Callback = Callable[[Progress], Any]


def check_limits(tol: Any, max_iter: Any) -> tuple[float | None, int]:
    """Return a tolerance and a positive number of iterations."""
    n_max = check_count(max_iter, "max_iter")
    if n_max == 0:
        raise ValueError("max_iter must be 1 or more, got 0")
    return (None if tol is None else check_positive(tol, "tol", allow_zero=True)), n_max


def run(
    advance: Callable[[Any], Step],
    state: Any,
    objective: Callable[[Array], Any] | None,
    tol: float | None,
    max_iter: int,
    callback: Callback | None,
    backend: Backend,
    *,
    may_scan: bool = True,
) -> SolveResult:
    """Advance until the residual is at most ``tol``, the callback says stop, or ``max_iter`` is reached."""
    objective, callback = (f and with_callers_errors(f) for f in (objective, callback))
    if tol is None and callback is None and may_scan:
        return _scan(advance, state, objective, max_iter, backend)
    xp = backend.xp
    objectives, residuals = [], []
    converged = None if tol is None else False
    for n_iter in range(1, max_iter + 1):
        state, x, residual = advance(state)
        if not backend.is_eager(residual):
            raise ValueError(
                "tol and callback must be None, and step a number, where values cannot be looked at "
                "(in a traced function or a lazy array): exactly max_iter iterations are made"
            )
        value = None if objective is None else _as_array(objective(x), residual, backend)
        objectives.append(value)
        residuals.append(residual)
        reached = float(residual)
        wants_to_stop = callback is not None and callback(Progress(n_iter, x, value, reached))
        if tol is not None and reached <= tol:
            converged = True
            break
        if wants_to_stop is True or not math.isfinite(reached):
            break
    history = None if objective is None else xp.stack(objectives)
    return SolveResult(x, n_iter, history, xp.stack(residuals), converged)


def _scan(
    advance: Callable[[Any], Step],
    state: Any,
    objective: Callable[[Array], Any] | None,
    max_iter: int,
    backend: Backend,
) -> SolveResult:
    """Make exactly ``max_iter`` iterations, whatever the data."""

    def body(carry: tuple[Any, Array]) -> tuple[tuple[Any, Array], tuple[Array, ...]]:
        state, x, residual = advance(carry[0])
        if objective is None:
            return (state, x), (residual,)
        return (state, x), (residual, _as_array(objective(x), residual, backend))

    (_, x), (residuals, *values) = backend.scan(body, (state, state[0]), max_iter)
    return SolveResult(x, max_iter, values[0] if values else None, residuals, None)


def _as_array(value: Any, like: Array, backend: Backend) -> Array:
    """Value of an objective as a 0-d array, whether it came as one or as a number."""
    xp = backend.xp
    if isinstance(value, (int, float)):
        value = xp.asarray(value, dtype=like.dtype, device=backend.creation_device(like))
    return xp.astype(xp.reshape(value, ()), like.dtype)


def inner(x: Array, y: Array, backend: Backend) -> Array:
    """Real inner product of two arrays of one shape."""
    xp = backend.xp
    with backend.ignore_overflow():
        if backend.is_complex(x):
            return xp.sum(xp.real(x) * xp.real(y) + xp.imag(x) * xp.imag(y))
        return xp.sum(x * y)


def norm(x: Array, backend: Backend) -> Array:
    """Euclidean norm of all entries."""
    return backend.xp.sqrt(inner(x, x, backend))
