"""Proximal gradient: ISTA, and FISTA with adaptive restart."""

import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from slra._backends import Backend
from slra._backends.ambient import isolated, with_callers_errors
from slra._typing import Array
from slra._validate import (
    check_callable,
    check_finite,
    check_flag,
    check_gradient,
    check_positive,
    check_returned,
    check_tau,
    promote,
    resolve,
)
from slra.prox.l1 import prox_elastic_net, prox_l1, prox_nonneg_l1
from slra.solvers._loop import Callback, SolveResult, Step, check_limits, inner, norm, run

__all__ = ["proximal_gradient"]

ValueAndGrad = Callable[[Array], tuple[Any, Array]]
Prox = Callable[[Array, Any], Array]
# (y, grad, step) -> where a step against the gradient and the operator lead.
ForwardBackward = Callable[[Array, Array, Any], Array]


class _State(NamedTuple):
    x: Array
    # Where the gradient is taken: beyond x, along the last step.
    y: Array
    momentum: Array
    step: Any
    largest_gradient: Array


@isolated
def proximal_gradient(
    x0: Array,
    value_and_grad: ValueAndGrad,
    prox: Prox,
    *,
    weight: float | Array = 1.0,
    step: float | Array | None = None,
    accelerated: bool = True,
    tol: float | None = 1e-6,
    max_iter: int = 1000,
    objective: Callable[[Array], Any] | None = None,
    callback: Callback | None = None,
) -> SolveResult:
    r"""Minimise ``f(x) + weight * g(x)``, f smooth and g with a proximal operator, by ISTA or FISTA.

    Parameters
    ----------
    x0 : array
        Where to start; real or complex floating, any shape; half precision is computed in float32.
    value_and_grad : callable
        ``x -> (f(x), gradient of f at x)``: a number or 0-d array, and an array like ``x``. For complex ``x`` the
        gradient ``G`` with ``f(x + d) = f(x) + Re <G, d> + o(|d|)``. The value is used by the search for a step only.
    prox : callable
        ``(x, tau) -> argmin_y tau * g(y) + 1/2 ||y - x||^2``, such as `slra.prox.prox_l1`; called with
        ``tau = step * weight``. That one, `slra.prox.prox_nonneg_l1` and
        ``functools.partial(slra.prox.prox_elastic_net, l2=...)``, given as they are, are known by name: the step
        against the gradient and the operator are then one primitive, on CuPy one kernel.
    weight : float or array
        Factor on g, 0 or more; an array broadcasts to ``x``, for an operator that takes such a ``tau``: with `prox_l1`
        it weighs each entry.
    step : float or 0-d array, optional
        Step length, at most 1/L for an L-Lipschitz gradient. By default it is found by backtracking, starting from
        the curvature along the gradient at ``x0``; that needs values that can be looked at.
    accelerated : bool
        FISTA with restart rather than ISTA.
    tol : float or None
        Stop when the residual is at most this. None means exactly ``max_iter`` iterations, which is the form that runs
        under ``jax.jit`` (as one loop, not unrolled), vmap, torch.compile and on Dask.
    max_iter : int
        Largest number of iterations.
    objective : callable, optional
        ``x -> f(x) + weight * g(x)``, evaluated after each iteration for the history only.
    callback : callable, optional
        Called with a `Progress` after each iteration; returning True stops the solver.

    Returns
    -------
    SolveResult
        The residual is ``||y - x|| / step``, the norm of the gradient mapping (zero exactly at a minimiser), over the
        largest norm of a gradient seen. ``converged`` is False where ``max_iter`` was reached first, the callback
        stopped, or the iteration left the finite numbers.

    Raises
    ------
    TypeError
        If ``x0`` is not a floating array, or an option is of a wrong type; if a gradient is complex and ``x0`` is not.
    ValueError
        If ``x0`` has NaN or infinity; if an option is out of range; if ``tol`` or ``callback`` is given or ``step`` is
        not where values cannot be looked at.

    Notes
    -----
    .. math::

        x_{k+1} = \operatorname{prox}_{s w g}(y_k - s \nabla f(y_k)), \qquad
        y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k), \qquad
        t_{k+1} = \tfrac12 \bigl(1 + \sqrt{1 + 4 t_k^2}\bigr)

    starting over with ``t = 1`` where the momentum points uphill, ``<y_k - x_{k+1}, x_{k+1} - x_k> > 0``. For convex
    f and g and ``s <= 1/L`` the objective converges as O(1/k^2), and linearly with strong convexity.

    References
    ----------
    A. Beck, M. Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse problems,
    SIAM Journal on Imaging Sciences 2 (2009), 183-202; B. O'Donoghue, E. Candes, Adaptive restart for accelerated
    gradient schemes, Foundations of Computational Mathematics 15 (2015), 715-732, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> b = np.asarray([3.0, 0.5])
    >>> result = slra.proximal_gradient(
    ...     np.zeros(2), lambda x: (((x - b) ** 2).sum() / 2, x - b), slra.prox.prox_l1, tol=1e-12
    ... )
    >>> result.x.round(9).tolist(), result.converged
    ([2.0, 0.0], True)

    With another weight, and an elastic net in the place of the l1 norm:

    >>> from functools import partial
    >>> result = slra.proximal_gradient(
    ...     np.zeros(2), lambda x: (((x - b) ** 2).sum() / 2, x - b), partial(slra.prox.prox_elastic_net, l2=1.0),
    ...     weight=0.25, tol=1e-12,
    ... )
    >>> result.x.round(9).tolist()
    [2.2, 0.2]
    """
    backend = resolve(x0=x0)
    promoted = promote(backend, x0=x0)
    (x,) = promoted.arrays
    check_finite(backend, x, "x0")
    tol, max_iter = check_limits(tol, max_iter)
    check_flag(accelerated, "accelerated")
    value_and_grad = _checked(value_and_grad)
    check_callable(prox, "prox")
    check_callable(objective, "objective", optional=True)
    check_callable(callback, "callback", optional=True)
    if step is None:
        if not backend.is_eager(x):
            raise ValueError("step must be given where values cannot be looked at")
        step = _first_step(x, value_and_grad, backend)
        searches = True
    else:
        step = _check_step(step, x, backend)
        searches = False
    weight = check_tau(backend, x, weight, "weight")
    forward_backward = _forward_backward(prox, weight, x, backend)
    like: dict[str, Any] = {
        "dtype": backend.real_dtype(x.dtype),
        "device": backend.creation_device(x),
    }
    start = _State(x, x, backend.xp.ones((), **like), step, backend.xp.zeros((), **like))

    def advance(state: _State) -> Step:
        return _advance(state, value_and_grad, forward_backward, accelerated, searches, backend)

    result = run(advance, start, objective, tol, max_iter, callback, backend, may_scan=not searches)
    return result._replace(x=promoted.cast_back(backend, result.x)[0])


def _check_step(step: Any, x: Array, backend: Backend) -> float | Array:
    """Return a step, which is not to be 0 in the dtype of ``x`` either, as a float or an array."""
    if isinstance(step, numbers.Real):
        return check_positive(step, "step", limits=backend.xp.finfo(x.dtype))
    step = check_tau(backend, x, step, "step", axes=tuple(range(x.ndim)))
    if backend.is_eager(step) and bool(backend.xp.any(step == 0)):
        raise ValueError("step must be finite and greater than 0, got 0")
    return step


def _checked(value_and_grad: Any) -> ValueAndGrad:
    """Look at what a function of the caller's returns."""
    check_callable(value_and_grad, "value_and_grad")
    value_and_grad = with_callers_errors(value_and_grad)

    def call(x: Array) -> tuple[Any, Array]:
        pair = value_and_grad(x)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"value_and_grad must return a pair of a value and a gradient, got {type(pair).__name__}"
            )
        return pair[0], check_returned(pair[1], "value_and_grad", x.shape)

    return call


def _advance(
    state: _State,
    value_and_grad: ValueAndGrad,
    forward_backward: ForwardBackward,
    accelerated: bool,
    searches: bool,
    backend: Backend,
) -> Step:
    xp = backend.xp
    value, grad = value_and_grad(state.y)
    grad = check_gradient(backend, state.y, grad)
    step = state.step
    new = forward_backward(state.y, grad, step)
    while searches and not _descends(state.y, new, value, grad, step, value_and_grad, backend):
        step /= 2
        new = forward_backward(state.y, grad, step)
    y, t = new, state.momentum
    # Not around what the caller's functions compute.
    with backend.ignore_overflow():
        move, gap = new - state.x, state.y - new
        largest = xp.maximum(state.largest_gradient, norm(grad, backend))
        residual = norm(gap, backend) / (step * xp.where(largest == 0, 1.0, largest))
        if accelerated:
            following = (1 + xp.sqrt(1 + 4 * t * t)) / 2
            uphill = inner(gap, move, backend) > 0
            y = backend.extrapolate(new, move, xp.where(uphill, 0.0, (t - 1) / following))
            t = xp.where(uphill, 1.0, following)
    return Step(_State(new, y, t, step, largest), new, xp.reshape(residual, ()))


def _forward_backward(prox: Prox, weight: Any, x: Array, backend: Backend) -> ForwardBackward:
    """Return ``(y, grad, step) -> prox(y - step * grad, step * weight)``, one primitive where there is one."""
    primitive, prox = _primitive(prox, x, backend), with_callers_errors(prox)

    def call(y: Array, grad: Array, step: Any) -> Array:
        with backend.ignore_overflow():
            if primitive is not None:
                return primitive(y, grad, step, weight)
            # An array, where NumPy makes a scalar of a difference of 0-d ones.
            forward, tau = backend.xp.asarray(y - step * grad), step * weight
        return check_returned(prox(forward, tau), "prox", y.shape)

    return call


def _primitive(prox: Prox, x: Array, backend: Backend) -> Callable[..., Array] | None:
    """Find the primitive that steps and applies ``prox`` at once, or None; what ``prox`` does is not guessed at."""
    if prox is prox_l1:
        return backend.soft_threshold_step
    if prox is prox_nonneg_l1 and not backend.is_complex(x):
        return backend.nonneg_threshold_step
    if isinstance(prox, partial) and prox.func is prox_elastic_net:
        if prox.args or set(prox.keywords) != {"l2"}:
            return None
        limits = backend.xp.finfo(x.dtype)
        l2 = check_positive(prox.keywords["l2"], "l2", allow_zero=True, limits=limits)
        return partial(backend.elastic_threshold_step, l2=l2)
    return None


def _descends(
    y: Array,
    new: Array,
    value: Any,
    grad: Array,
    step: float,
    value_and_grad: ValueAndGrad,
    backend: Backend,
) -> bool:
    """Whether f lies below its quadratic model at the new point, but for the rounding of f."""
    reached, value = float(value_and_grad(new)[0]), float(value)
    with backend.ignore_overflow():
        move = new - y
        model = float(inner(grad, move, backend)) + float(inner(move, move, backend)) / (2 * step)
    slack = 10 * float(backend.xp.finfo(y.dtype).eps) * max(abs(value), abs(reached))
    # Written so that NaN, which no shorter step may cure, ends the search.
    return not reached - value > model + slack


def _first_step(x: Array, value_and_grad: ValueAndGrad, backend: Backend) -> float:
    """Inverse of the curvature of f at ``x`` along its gradient: at least as long as the longest safe step."""
    grad = check_gradient(backend, x, value_and_grad(x)[1])
    size = float(norm(grad, backend))
    if size == 0:
        return 1.0
    probe = max(float(norm(x, backend)), 1.0) * float(backend.xp.finfo(x.dtype).eps) ** 0.5 / size
    bend = float(norm(value_and_grad(x + probe * grad)[1] - grad, backend)) / (probe * size)
    return 1 / bend if bend > 0 else 1.0
