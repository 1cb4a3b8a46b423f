"""Proximal gradient: ISTA, and FISTA with adaptive restart and steps that are found on the way."""

import math
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
    check_returned,
    check_tau,
    check_weight,
    promote,
)
from slra.prox.l1 import prox_elastic_net, prox_l1, prox_nonneg_l1
from slra.solvers._loop import (
    FLOOR,
    Callback,
    SolveResult,
    Step,
    check_limits,
    check_visible,
    run,
)
from slra.solvers._scalars import Scalars, as_scalars, check_steps, norm, scalars_of
from slra.solvers._tree import Flatten, Tree, Unflatten, tree_of

__all__ = ["proximal_gradient"]

ValueAndGrad = Callable[[Any], tuple[Any, Any]]
Prox = Callable[[Any, Any], Any]
# (y, grad, step) -> where a step against the gradient and the operator lead.
ForwardBackward = Callable[[Array, Array, Any], Array]

# How much longer each step is than the last. Of 1, 1.01, 1.02 and 1.05 all need about as many steps on the problems of
# benchmarks/solvers.py, but with 1 a step that was once cut near the start stays short.
GROWTH = 1.02
# Where the step is below half of what the curvature allows, it grows faster.
FAST_GROWTH = 2.0
# A step that leaves the domain, or meets a curvature far beyond what it was made for, is cut to this at least.
CUT = 0.1
# Where gradients change so many times faster than a step of this length allows, they were not foreseen.
WILD = 4.0
# A curvature counts for so much less after each step that meets a smaller one.
FORGET = 0.95
# Rounding of a difference of two iterates, in eps: the standard deviation of a rounding is 0.29 eps.
ROUNDING = 0.3


class _State(NamedTuple):
    x: Array
    # There, and what both changed by in the last step.
    grad: Array
    move: Array
    turn: Array
    momentum: Any
    step: Any
    # That which led to x.
    last: Any
    # Largest curvature met of late, and largest iterate.
    curvature: Any
    largest: Any
    residual: Any
    absolute: Any
    is_first: Any


@isolated
def proximal_gradient(
    x0: Any,
    value_and_grad: ValueAndGrad,
    prox: Prox,
    *,
    weight: float | Array = 1.0,
    step: float | Array | None = None,
    accelerated: bool = True,
    tol: float | None = 1e-6,
    atol: float = 0.0,
    max_iter: int = 5000,
    objective: Callable[[Any], Any] | None = None,
    callback: Callback | None = None,
    flatten: Flatten | None = None,
    unflatten: Unflatten | None = None,
) -> SolveResult:
    r"""Minimise ``f(x) + weight * g(x)``, f smooth and g with a proximal operator, by ISTA or FISTA.

    Parameters
    ----------
    x0 : array
        Where to start; real or complex floating, any shape; half precision is computed in float32. Or a tuple or list
        of arrays, or what ``flatten`` takes apart: then all functions take and return such a structure.
    value_and_grad : callable
        ``x -> (f(x), gradient of f at x)``: a number or 0-d array, and an array like ``x``. For complex ``x`` the
        gradient ``G`` with ``f(x + d) = f(x) + Re <G, d> + o(|d|)``. Of the value only whether it is finite is looked
        at: infinity, or NaN, says that ``x`` is outside of the domain of f, and the point is not accepted. An array of
        values, of the shape of the leading axes of ``x``, says that these count problems of a batch.
    prox : callable
        ``(x, tau) -> argmin_y tau * g(y) + 1/2 ||y - x||^2``, such as `slra.prox.prox_l1`; called with
        ``tau = step * weight``: a number, or an array where ``weight`` or ``step`` is one, for a batch, and where
        neither ``step`` nor ``tol`` is given. That one, `slra.prox.prox_nonneg_l1` and
        ``functools.partial(slra.prox.prox_elastic_net, l2=...)``, given as they are, are known by name: the step
        against the gradient and the operator are then one primitive, on CuPy one kernel.
    weight : float or array
        Factor on g, 0 or more; an array broadcasts to ``x``, for an operator that takes such a ``tau``: with `prox_l1`
        it weighs each entry.
    step : float or array, optional
        Step length, at most 1/L for an L-Lipschitz gradient; for a batch an array of them, of the shape of its leading
        axes. By default it is found on the way, from gradients, and need be constant nowhere.
    accelerated : bool
        FISTA with restart rather than ISTA.
    tol : float or None
        Stop when the residual is at most this. None means exactly ``max_iter`` iterations, which is the form that runs
        under ``jax.jit`` (as one loop, not unrolled), vmap, torch.compile and on Dask.
    atol : float
        Stop, too, when ``||r||`` (below) is at most this, in the units of a gradient.
    max_iter : int
        Largest number of iterations, each of one gradient.
    objective : callable, optional
        ``x -> f(x) + weight * g(x)``, evaluated after each iteration for the history; where it is not finite nothing
        has converged.
    callback : callable, optional
        Called with a `Progress` after each iteration; returning True stops the solver.
    flatten, unflatten : callable, optional
        ``x -> list of arrays`` and back, for structures other than tuples and lists, such as
        ``jax.tree_util.tree_leaves`` and ``partial(jax.tree_util.tree_unflatten, structure)``.

    Returns
    -------
    SolveResult
        The residual is that of ``x`` itself: ``||r|| / max(||grad f(x)||, L ||x||)``, with the subgradient r of
        ``f + weight * g`` at ``x`` that the step to it shows, no less than what rounding leaves unknown of it. It is
        zero exactly at a minimiser, and no gradient mapping at ``x`` is longer than ``||r||``. L is the curvature of f
        met by the last steps; for an iterate that goes to 0, ``||x||`` counts as 1e-12 of the largest there was. So the
        scale does not depend on where the run started. ``converged`` is False where ``max_iter`` was reached first, the
        callback stopped, or no step leads to a finite value. For a batch there are a step, a residual and a stop for
        each problem, and ``converged`` is an array.

    Raises
    ------
    TypeError
        If ``x0`` is not a floating array, or an option is of a wrong type; if a gradient is complex and ``x0`` is not.
    ValueError
        If ``x0`` has NaN or infinity, or the value or the gradient there has; if an option is out of range; if ``tol``
        or ``callback`` is given where values cannot be looked at.

    Notes
    -----
    .. math::

        x_{k+1} = \operatorname{prox}_{s w g}(y_k - s \, h_k), \qquad
        (y_k, h_k) = (x_k, \nabla f(x_k)) + \frac{t_k - 1}{t_{k+1}}
            \bigl( (x_k, \nabla f(x_k)) - (x_{k-1}, \nabla f(x_{k-1})) \bigr), \qquad
        t_{k+1} = \tfrac12 \bigl(1 + \sqrt{1 + 4 t_k^2 s_{k-1} / s_k}\bigr)

    starting over with ``t = 1`` where the momentum points uphill, ``<y_k - x_{k+1}, x_{k+1} - x_k> > 0``. The gradient
    at ``y_k`` is extrapolated like ``y_k``, which is exact for quadratic f: one gradient a step, all of them at points
    that may be returned, in the domain of g.

    A step is accepted if its value and gradient are finite and
    ``<grad f(x_{k+1}) - h_k, x_{k+1} - y_k> <= ||x_{k+1} - y_k||^2 / s``, but for rounding; if not, s is cut and the
    iteration repeats. After a step it grows by 2%, or doubles where f is flatter than half of what it is made for. With
    a given step, momentum ends where that inequality fails.

    References
    ----------
    A. Beck, M. Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse problems,
    SIAM Journal on Imaging Sciences 2 (2009), 183-202; B. O'Donoghue, E. Candes, Adaptive restart for accelerated
    gradient schemes, Foundations of Computational Mathematics 15 (2015), 715-732, section 3.2; K. Scheinberg,
    D. Goldfarb, X. Bai, Fast first-order methods for composite convex optimization with backtracking, Foundations of
    Computational Mathematics 14 (2014), 389-417, for momentum with steps that grow.

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
    tree, vector = tree_of(x0, flatten, unflatten, "x0")
    backend = tree.backend
    promoted = promote(backend, x0=vector)
    (x,) = promoted.arrays
    check_finite(backend, x, "x0")
    limits = check_limits(tol, atol, max_iter)
    check_flag(accelerated, "accelerated")
    check_callable(value_and_grad, "value_and_grad")
    check_callable(prox, "prox")
    check_callable(objective, "objective", optional=True)
    check_callable(callback, "callback", optional=True)
    check_visible(x, limits, callback, backend)
    weight = check_tau(backend, x, weight, "weight")
    evaluate = _checked(value_and_grad, tree)
    value, grad = evaluate(x)
    of_steps: tuple[int, ...] = ()
    if step is not None:
        step, of_steps = check_steps(step, x, "step", backend)
    batch = _batch(x, value, of_steps)
    # Where nothing is to be looked at, nothing is: automatic differentiation and tracing go through arrays.
    as_numbers = limits.tol is not None or callback is not None
    scalars = scalars_of(x, batch, backend, as_numbers=as_numbers)
    problem = _Problem(
        evaluate,
        _forward_backward(prox, weight, x, tree),
        scalars,
        backend,
        accelerated,
        step is None,
        step if isinstance(step, float) else None,
        _range_of(x, backend),
    )
    start = problem.start(x, value, grad, step)
    result, _ = run(
        problem.advance,
        start,
        None if objective is None else tree.wrap(objective),
        limits,
        callback,
        scalars,
        tree,
    )
    return result._replace(x=tree.split(promoted.cast_back(backend, result.x)[0]))


def _batch(x: Array, value: Any, of_steps: tuple[int, ...]) -> tuple[int, ...]:
    """Leading axes of ``x`` that count problems: those of the value, or those along which steps differ."""
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) == 1 and (shape != tuple(x.shape[: len(shape)]) or len(shape) == x.ndim):
        shape = ()
    if shape != tuple(x.shape[: len(shape)]):
        raise ValueError(
            "value_and_grad must return a value of no dimensions, or one for each problem along the leading axes of "
            f"x0, whose shape is {tuple(x.shape)}, got {shape}"
        )
    return max(shape, of_steps, key=len)


def _checked(value_and_grad: ValueAndGrad, tree: Tree) -> Callable[[Array], tuple[Any, Array]]:
    """Look at what a function of the caller's returns."""
    value_and_grad = with_callers_errors(value_and_grad)

    def call(x: Array) -> tuple[Any, Array]:
        pair = value_and_grad(tree.split(x))
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"value_and_grad must return a pair of a value and a gradient, got {type(pair).__name__}"
            )
        grad = tree.join(pair[1], "the gradient that value_and_grad returns")
        grad = check_returned(grad, "value_and_grad", x.shape)
        return pair[0], check_gradient(tree.backend, x, grad)

    return call


class _Range(NamedTuple):
    """Spacing of numbers at 1, and the least and the greatest number of a dtype, looked up once."""

    eps: float
    least: float
    most: float


def _range_of(x: Array, backend: Backend) -> _Range:
    limits = backend.xp.finfo(x.dtype)
    return _Range(float(limits.eps), float(limits.smallest_normal), float(limits.max))


class _Problem(NamedTuple):
    """What a step needs to know and does not change."""

    evaluate: Callable[[Array], tuple[Any, Array]]
    forward_backward: ForwardBackward
    scalars: Scalars
    backend: Backend
    accelerated: bool
    searches: bool
    # A step that was given as one number, and stays one: operators of the caller's may take no array.
    fixed: float | None
    limits: "_Range"

    def start(self, x: Array, value: Any, grad: Array, step: Any) -> _State:
        """Return the first state; where no step is given the first is short, to learn the curvature."""
        m, xp = self.scalars, self.backend.xp
        size, slope = self._norm(x), self._norm(grad)
        finite = self._is_finite(value) & m.isfinite(slope)
        if self.backend.is_eager(grad) and not (
            finite if isinstance(finite, bool) else xp.all(finite)
        ):
            raise ValueError(
                "value_and_grad must return a finite value and gradient at x0, got NaN or infinity; "
                "start in the domain of the function"
            )
        curvature, learns = m.full(0.0), m.full(1.0) > 0
        if step is None:
            # Along the gradient, not along a step, which near a solution leads where f hardly bends.
            length = m.where(size == 0, 1.0, size) * self.limits.eps**0.5
            short = self._in_range(m.where(slope == 0, 1.0, m.ratio(length, slope)))
            probe = self.backend.extrapolate(x, grad, m.spread(-short))
            turn = self.evaluate(probe)[1] - grad
            bend = m.ratio(self._norm(turn), short * slope)
            is_known = m.isfinite(bend) & (bend > 0)
            curvature = m.where(is_known, bend, 0.0)
            step = self._in_range(m.where(is_known, m.ratio(1.0, bend), short))
            learns = m.negate(is_known)
        else:
            step = as_scalars(step, m, self.backend)
        zero, one, unknown = xp.zeros_like(x), m.full(1.0), m.full(math.inf)
        return _State(
            x, grad, zero, zero, one, step, step, curvature, size, unknown, unknown, learns
        )

    def advance(self, state: _State) -> Step:
        """Make one step, if it can be accepted, and choose the length of the next.

        The point y beyond x is never evaluated: its gradient is extrapolated as it is, which is exact where f is
        quadratic. So all gradients are those of points that may be returned, and one a step is enough.
        """
        m, backend = self.scalars, self.backend
        x, grad, step = state.x, state.grad, state.step
        ratio = m.where(state.momentum == 1, 1.0, state.last / step)
        momentum = (1 + m.sqrt(1 + 4 * state.momentum * state.momentum * ratio)) / 2
        beta = (state.momentum - 1) / momentum
        y, slope = x, grad
        if self.accelerated and not (isinstance(beta, float) and beta == 0):
            y = backend.extrapolate(x, state.move, m.spread(beta))
            slope = backend.extrapolate(grad, state.turn, m.spread(beta))
        new = self.forward_backward(y, slope, m.spread(step) if self.fixed is None else self.fixed)
        value, new_grad = self.evaluate(new)
        found = self._measure(y, slope, new, new_grad, state.move, beta, step)
        choice = self._judge(state, found, self._is_finite(value), momentum)
        accepted = choice.accepted
        following = _State(
            m.pick(accepted, new, x),
            m.pick(accepted, new_grad, grad),
            m.pick(accepted, new - x, state.move),
            m.pick(accepted, new_grad - grad, state.turn),
            choice.momentum,
            choice.step,
            m.where(accepted, step, state.last),
            m.where(accepted, choice.curvature, state.curvature),
            m.where(accepted, choice.largest, state.largest),
            m.where(accepted, choice.residual, state.residual),
            m.where(accepted, choice.absolute, state.absolute),
            state.is_first & m.negate(accepted),
        )
        return Step(following, following.x, following.residual, following.absolute, choice.is_stuck)

    def _judge(
        self, state: _State, found: "_Measured", value_is_finite: Any, momentum: Any
    ) -> "_Choice":
        """Accept or refuse a point, and choose what follows."""
        m, step = self.scalars, state.step
        eps = self.limits.eps
        is_finite = value_is_finite & m.isfinite(found.moved + found.turned + found.slope)
        # <turn, d> <= ||d||^2 / step in units of the right side. Values of f, whose difference is lost in rounding near
        # the end, are not compared; what rounding does to the gradients is allowed for.
        curvature = m.ratio(found.turned, found.moved) * found.cosine
        excess = step * curvature
        noise = m.ratio(4 * eps * (found.size + step * found.slope), found.moved)
        # Where a gradient at y was not foreseen well, momentum ends, and where it points uphill.
        is_calm = is_finite & (step * m.ratio(found.turned, found.moved) <= WILD * (1 + noise))
        accepted = is_finite
        if self.searches:
            accepted = is_finite & (excess <= 1 + noise) & (is_calm | (state.momentum == 1))
        onward = m.where(found.uphill > 0, 1.0, momentum)
        momentum = m.where(is_calm, m.where(accepted, onward, state.momentum), 1.0)
        is_stuck = m.negate(accepted) & (state.momentum == 1)

        following = step
        if self.searches:
            room = m.ratio(found.moved * found.cosine, found.turned)
            is_flat = is_finite & ((found.turned == 0) | (2 * step < room))
            longer = step * m.where(is_flat, FAST_GROWTH, GROWTH)
            # The first step was there to learn how long one may be.
            learns = state.is_first & (found.cosine > 0) & (noise < 0.5)
            longer = m.where(learns, m.maximum(longer, m.ratio(found.moved, found.turned)), longer)
            # Not a digit has changed: all is solved, or the step is lost in rounding.
            longer = m.where(found.moved == 0, step / CUT, longer)
            cut = m.where(excess > 1, m.maximum(m.ratio(0.9, excess), CUT), 0.9)
            cut = m.where(is_finite, cut, CUT)
            following = self._in_range(m.where(accepted, longer, step * m.minimum(cut, 0.9)))
            is_stuck = is_stuck & (following == step)

        curvature = m.minimum(m.maximum(curvature, FORGET * state.curvature), 1 / step)
        largest = m.maximum(state.largest, found.size)
        scale = m.maximum(found.slope, curvature * m.maximum(found.size, FLOOR * largest))
        absolute = m.maximum(found.residual, ROUNDING * eps * found.size / step)
        residual = m.where(
            scale > 0, m.ratio(absolute, scale), m.where(absolute > 0, math.inf, 0.0)
        )
        return _Choice(
            accepted, momentum, following, curvature, largest, residual, absolute, is_stuck
        )

    def _measure(
        self, y: Array, slope: Array, new: Array, grad: Array, move: Array, beta: Any, step: Any
    ) -> "_Measured":
        """Norms, and the cosine of the angle between a step and what it changed in the gradient."""
        m, backend = self.scalars, self.backend
        if m.are_numbers:
            *squares, across, along = backend.step_products(y, slope, new, grad, move, -1 / step)
            low, high = self.limits.least / self.limits.eps, self.limits.most
            if all(low < square < high for square in squares):
                moved, turned, rest, height, size = map(math.sqrt, squares)
                across, along = across / (moved * turned), along / moved
                uphill = -moved - beta * along
                return _Measured(moved, turned, across, rest, height, size, uphill)
            # Squares left the range of the dtype.
        y, slope, new, grad, move = map(backend.stop_gradient, (y, slope, new, grad, move))
        d, turn = new - y, grad - slope
        # A subgradient of f + w g at the new point: (y - new) / step - slope is one of w g.
        r = backend.extrapolate(turn, d, m.spread(-1 / step))
        moved, turned, rest, height, size = map(self._norm, (d, turn, r, grad, new))
        across, along = self._inner(d, turn, moved, turned), self._inner(d, move, moved, 1.0)
        if m.are_numbers:
            across, along = float(across), float(along)
        return _Measured(moved, turned, across, rest, height, size, -moved - beta * along)

    def _inner(self, x: Array, y: Array, x_unit: Any, y_unit: Any) -> Any:
        """Inner product in these units, each array scaled before; 0 where a unit is."""
        m = self.scalars
        axes = tuple(range(len(m.batch), x.ndim))
        x_inverse, y_inverse = m.ratio(1.0, x_unit), m.ratio(1.0, y_unit)
        return self.backend.inner(x * m.spread(x_inverse), y * m.spread(y_inverse), axes)

    def _norm(self, x: Array) -> Any:
        return norm(x, self.scalars, self.backend)

    def _is_finite(self, value: Any) -> Any:
        if self.scalars.are_numbers:
            return math.isfinite(float(value))
        if isinstance(value, (int, float)):
            value = self.scalars.full(value)
        return self.backend.xp.reshape(self.backend.xp.isfinite(value), self.scalars.batch)

    def _in_range(self, step: Any) -> Any:
        low, high = 8 * self.limits.least, self.limits.most / 8
        return self.scalars.minimum(self.scalars.maximum(step, low), high)


class _Measured(NamedTuple):
    moved: Any
    turned: Any
    cosine: Any
    residual: Any
    slope: Any
    size: Any
    # <y - new, new - x> over the norm of the first.
    uphill: Any


class _Choice(NamedTuple):
    accepted: Any
    momentum: Any
    step: Any
    curvature: Any
    largest: Any
    residual: Any
    absolute: Any
    is_stuck: Any


def _forward_backward(prox: Prox, weight: Any, x: Array, tree: Tree) -> ForwardBackward:
    """Return ``(y, grad, step) -> prox(y - step * grad, step * weight)``, one primitive where there is one."""
    backend = tree.backend
    primitive, prox = _primitive(prox, x, backend), with_callers_errors(prox)

    def call(y: Array, grad: Array, step: Any) -> Array:
        if primitive is not None:
            return primitive(y, grad, step, weight)
        # An array, where NumPy makes a scalar of a difference of 0-d ones.
        forward, tau = backend.xp.asarray(y - step * grad), step * weight
        found = tree.join(prox(tree.split(forward), tau), "what prox returns")
        return check_returned(found, "prox", y.shape)

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
        l2 = check_weight(backend, x, prox.keywords["l2"], "l2", allow_zero=True)
        return partial(backend.elastic_threshold_step, l2=l2)
    return None
