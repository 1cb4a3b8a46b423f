"""The loop around a step of a solver: history, stopping, callback."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from slra._backends import Backend
from slra._backends.ambient import with_callers_errors
from slra._typing import Array
from slra._validate import check_count, check_positive
from slra.solvers._scalars import Scalars
from slra.solvers._tree import Tree

__all__ = [
    "FLOOR",
    "Callback",
    "Limits",
    "Progress",
    "SolveResult",
    "Step",
    "check_limits",
    "check_visible",
    "inner",
    "run",
]

# A residual is relative to the size of the iterate, but not of one that goes to 0, which has no digits to be relative
# to: then to this times the largest seen. A start up to 1e12 times too large does no harm.
FLOOR = 1e-12


class SolveResult(NamedTuple):
    """What a solver returns.

    Attributes
    ----------
    x : array
        The last iterate; what ``unflatten`` makes of it, where the start was a structure.
    n_iter : int
        Number of iterations made.
    objective : array, shape (n_iter,), or None
        Value of ``objective`` after each iteration, where one was given; ``(n_iter, *batch)`` for a batch.
    residual : array, shape (n_iter,)
        What ``tol`` is compared with, after each iteration; real; ``(n_iter, *batch)`` for a batch.
    converged : bool or None
        Whether the last residual is within ``tol`` or ``atol``; None where ``tol`` is. For a batch an array of them.
    z : array or None
        Of `admm`: the last ``z``.
    u : array or None
        Of `admm`: the multiplier over ``rho``; of `primal_dual`: the dual variable.
    rho : float, array or None
        Of `admm`: the last penalty.

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

    x: Any
    n_iter: int
    objective: Array | None
    residual: Array
    converged: Any
    z: Array | None = None
    u: Array | None = None
    rho: Any = None


class Progress(NamedTuple):
    """What a callback is given after each iteration.

    Attributes
    ----------
    n_iter : int
        Number of iterations made so far.
    x : array
        The current iterate.
    objective : array or None
        Value of ``objective`` there, where one was given; 0-d, or one for each problem of a batch.
    residual : float
        What ``tol`` is compared with; an array for a batch.

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
    x: Any
    objective: Array | None
    residual: Any


class Step(NamedTuple):
    """One iteration: what the next one needs, and what it has to show.

    ``residual`` is relative and ``absolute`` is not; ``is_stuck`` says that no iteration will change anything.
    """

    state: Any
    x: Array
    residual: Any
    absolute: Any
    is_stuck: Any


class Limits(NamedTuple):
    """When to stop."""

    tol: float | None
    atol: float
    max_iter: int

    def reached(self, residual: Any, absolute: Any) -> Any:
        """Whether a problem, or each, is solved."""
        return (residual <= self.tol) | (absolute <= self.atol)


Callback = Callable[[Progress], Any]


def check_limits(tol: Any, atol: Any, max_iter: Any) -> Limits:
    """Return tolerances and a positive number of iterations."""
    n_max = check_count(max_iter, "max_iter")
    if n_max == 0:
        raise ValueError("max_iter must be 1 or more, got 0")
    tol = None if tol is None else check_positive(tol, "tol", allow_zero=True)
    return Limits(tol, check_positive(atol, "atol", allow_zero=True), n_max)


def check_visible(x: Array, limits: Limits, callback: Callback | None, backend: Backend) -> None:
    """Raise where values would have to be looked at and cannot be."""
    if (limits.tol is not None or callback is not None) and not backend.is_eager(x):
        raise ValueError(
            "tol and callback must be None where values cannot be looked at (in a traced function or a lazy array): "
            "exactly max_iter iterations are made"
        )


def run(
    advance: Callable[[Any], Step],
    state: Any,
    objective: Callable[[Array], Any] | None,
    limits: Limits,
    callback: Callback | None,
    scalars: Scalars,
    tree: Tree,
) -> tuple[SolveResult, Any]:
    """Advance until all is solved, the callback says stop, or ``max_iter`` is reached; return the last state too."""
    objective, callback = (f and with_callers_errors(f) for f in (objective, callback))
    backend = tree.backend
    xp = backend.xp
    if limits.tol is None and callback is None:
        return _scan(advance, state, objective, limits.max_iter, backend)
    step: Step | None = None
    objectives: list[Array] = []
    residuals = []
    solved: Any = False
    for n_iter in range(1, limits.max_iter + 1):
        previous, step = step, advance(state)
        if previous is not None and not isinstance(solved, bool):
            step = _freeze(solved, previous, step, scalars)
        state, x, residual, absolute, is_stuck = step
        residuals.append(residual)
        value = None
        if objective is not None:
            value = _as_array(objective(x), x, backend)
            objectives.append(value)
        if limits.tol is not None:
            solved = limits.reached(residual, absolute)
            if value is not None:
                finite = xp.isfinite(value)
                solved = solved and bool(finite) if isinstance(solved, bool) else solved & finite
        wants_to_stop = callback is not None and callback(
            Progress(n_iter, tree.split(x), value, residual)
        )
        if wants_to_stop is True or _all(solved, xp) or _all(is_stuck, xp):
            break
    history = None if objective is None else xp.stack(objectives)
    if isinstance(residuals[0], float):
        real = {"dtype": backend.real_dtype(x.dtype), "device": backend.creation_device(x)}
        with backend.ignore_overflow():
            stacked = xp.asarray(residuals, **real)
    else:
        stacked = xp.stack(residuals)
    converged = None if limits.tol is None else solved
    return SolveResult(x, n_iter, history, stacked, converged), state


def _all(condition: Any, xp: Any) -> bool:
    return condition if isinstance(condition, bool) else bool(xp.all(condition))


def _freeze(solved: Array, old: Step, new: Step, scalars: Scalars) -> Step:
    """Keep what belongs to problems that are solved."""

    def keep(before: Any, after: Any) -> Any:
        return scalars.pick(solved, before, after)

    state = type(new.state)(*map(keep, old.state, new.state))
    return Step(state, *map(keep, old[1:], new[1:]))


def _scan(
    advance: Callable[[Any], Step],
    state: Any,
    objective: Callable[[Array], Any] | None,
    max_iter: int,
    backend: Backend,
) -> tuple[SolveResult, Any]:
    """Make exactly ``max_iter`` iterations, whatever the data."""

    def body(carry: tuple[Any, Array]) -> tuple[tuple[Any, Array], tuple[Array, ...]]:
        state, x, residual, *_ = advance(carry[0])
        if objective is None:
            return (state, x), (residual,)
        return (state, x), (residual, _as_array(objective(x), x, backend))

    (state, x), (residuals, *values) = backend.scan(body, (state, state[0]), max_iter)
    return SolveResult(x, max_iter, values[0] if values else None, residuals, None), state


def _as_array(value: Any, like: Array, backend: Backend) -> Array:
    """Value of an objective as an array, whether it came as one or as a number."""
    xp = backend.xp
    dtype = backend.real_dtype(like.dtype)
    if isinstance(value, (int, float)):
        return xp.asarray(value, dtype=dtype, device=backend.creation_device(like))
    value = xp.reshape(value, ()) if math.prod(value.shape) == 1 else value
    with backend.ignore_overflow():
        return xp.astype(value, dtype, copy=False)


def inner(x: Array, y: Array, backend: Backend) -> Array:
    """Real inner product of two arrays of one shape."""
    with backend.ignore_overflow():
        return backend.inner(x, y)
