"""The primal-dual method of Condat and Vu: an operator inside a function that has a proximal operator."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from slra._backends.ambient import isolated, with_callers_errors
from slra._typing import Array
from slra._validate import (
    check_callable,
    check_finite,
    check_gradient,
    check_positive,
    check_returned,
    check_tau,
    promote,
)
from slra.solvers._loop import (
    FLOOR,
    Callback,
    SolveResult,
    Step,
    check_limits,
    check_visible,
    run,
)
from slra.solvers._scalars import Scalars, norm, scalars_of
from slra.solvers._tree import Flatten, Tree, Unflatten, tree_of

__all__ = ["primal_dual"]

# Products to find the norm of K with, and what is added to what they find, which is never too large.
N_POWER, MARGIN = 30, 1.05
# Iterations before the ratio of the steps is first changed, and how many more before each next time.
WINDOW = 10
# As in proximal_gradient: a rounding in eps.
ROUNDING = 0.3


class _State(NamedTuple):
    x: Array
    u: Array
    # Gradient at x, K x, and the adjoint at u.
    grad: Array
    image: Any
    back: Array
    # Curvature of h that the steps allow for, norm of K, and dual step over primal step.
    curvature: Any
    norm: Any
    ratio: Any
    # Where the iterates were when that ratio was last changed, how long ago, and how often it was.
    x_before: Array
    u_before: Array
    age: Any
    changes: Any
    largest: Any
    strongest: Any
    residual: Any
    absolute: Any


@isolated
def primal_dual(
    x0: Any,
    value_and_grad: Callable[[Any], tuple[Any, Any]] | None,
    prox_f: Callable[[Any, Any], Any] | None,
    prox_gconj: Callable[[Any, Any], Any],
    K: Callable[[Any], Any],
    KT: Callable[[Any], Any],
    *,
    steps: tuple[Any, Any] | None = None,
    tol: float | None = 1e-6,
    atol: float = 0.0,
    max_iter: int = 5000,
    start: Any = None,
    objective: Callable[[Any], Any] | None = None,
    callback: Callback | None = None,
    flatten: Flatten | None = None,
    unflatten: Unflatten | None = None,
) -> SolveResult:
    r"""Minimise ``h(x) + f(x) + g(K x)``: h smooth, f and g with proximal operators, all convex, K linear.

    Parameters
    ----------
    x0 : array
        Where to start; real or complex floating, any shape; half precision is computed in float32. Or a tuple or list
        of arrays, or what ``flatten`` takes apart.
    value_and_grad : callable or None
        ``x -> (h(x), gradient of h at x)``, as for `proximal_gradient`; None where there is no h. Of the value only
        whether it is finite is looked at.
    prox_f : callable or None
        ``(x, tau) -> argmin_y tau * f(y) + 1/2 ||y - x||^2``; None where there is no f.
    prox_gconj : callable
        ``(u, sigma) -> argmin_v sigma * g*(v) + 1/2 ||v - u||^2`` with the convex conjugate of g. For the l1 norm
        times ``w`` that is the projection on moduli up to ``w``; by Moreau it is
        ``u - sigma * prox_g(u / sigma, 1 / sigma)``.
    K, KT : callable
        ``x -> K x`` and ``u -> K^H u``. ``K`` may return a tuple or list of arrays, which ``KT`` and ``prox_gconj``
        then take: so several functions of several operators are summed.
    steps : (tau, sigma), optional
        Lengths of the steps, numbers or arrays that broadcast to ``x`` and to ``K x`` (a diagonal preconditioner:
        ``1 / tau_j`` and ``1 / sigma_i`` the sums of ``|K_ij|`` over i and j are safe where there is no h). With the
        norm of K and a constant L of the gradient of h, ``1 / tau - sigma ||K||^2 >= L / 2``. By default they are
        found: the norm of K by a power iteration, the curvature of h from gradients on the way, and their ratio from
        how far ``x`` and ``u`` go.
    tol : float or None
        Stop when the residual is at most this. None means exactly ``max_iter`` iterations, which is the form that runs
        under ``jax.jit`` (as one loop, not unrolled), torch.compile and on Dask.
    atol : float
        Stop, too, when the residual before it is made relative is at most this.
    max_iter : int
        Largest number of iterations: each one gradient, one ``K`` and one ``KT``.
    start : SolveResult or (x, u), optional
        Where to start instead: what an earlier call returned.
    objective : callable, optional
        ``x -> value``, evaluated after each iteration for the history only.
    callback : callable, optional
        Called with a `Progress` after each iteration; returning True stops the solver.
    flatten, unflatten : callable, optional
        ``x -> list of arrays`` and back, for other structures.

    Returns
    -------
    SolveResult
        ``x``, and the dual variable ``u``, of the structure of ``K x``. The residual is that of these two, the larger
        of ``||p|| / max(||grad h(x)||, ||K^H u||, L ||x||)`` and ``||d|| / (||K|| ||x||)``, L the curvature of h that
        was met. The members p and d of ``grad h(x) + df(x) + K^H u`` and ``dg*(u) - K x``, that the step shows, are
        both 0 at a solution and nowhere else.

    Raises
    ------
    TypeError
        If ``x0`` is not a floating array, or an option is of a wrong type.
    ValueError
        If ``x0`` has NaN or infinity; if an option is out of range; if ``tol`` or ``callback`` is given where values
        cannot be looked at.

    Notes
    -----
    .. math::

        x_{k+1} = \operatorname{prox}_{\tau f}(x_k - \tau (\nabla h(x_k) + K^H u_k)), \qquad
        u_{k+1} = \operatorname{prox}_{\sigma g^*}(u_k + \sigma K (2 x_{k+1} - x_k))

    References
    ----------
    L. Condat, A primal-dual splitting method for convex optimization involving Lipschitzian, proximable and linear
    composite terms, Journal of Optimization Theory and Applications 158 (2013), 460-479; T. Pock, A. Chambolle,
    Diagonal preconditioning for first order primal-dual algorithms in convex optimization, ICCV 2011; T. Goldstein,
    M. Li, X. Yuan, Adaptive primal-dual splitting methods for statistical learning and image processing, NIPS 2015.

    Examples
    --------
    A fused lasso signal, ``1/2 ||x - b||^2 + 1/2 sum |x_{i+1} - x_i|``.

    >>> import numpy as np
    >>> import slra
    >>> b = np.asarray([0.0, 0.2, 3.0, 3.2])
    >>> result = slra.primal_dual(
    ...     np.zeros(4),
    ...     lambda x: (0.5 * np.sum((x - b) ** 2), x - b),
    ...     None,
    ...     lambda u, sigma: np.clip(u, -0.5, 0.5),
    ...     np.diff,
    ...     lambda u: -np.diff(u, prepend=0, append=0),
    ...     tol=1e-9,
    ... )
    >>> result.x.round(6).tolist(), result.converged
    ([0.35, 0.35, 2.85, 2.85], True)
    """
    tree, vector = tree_of(x0, flatten, unflatten, "x0")
    backend = tree.backend
    xp = backend.xp
    promoted = promote(backend, x0=vector)
    (x,) = promoted.arrays
    check_finite(backend, x, "x0")
    limits = check_limits(tol, atol, max_iter)
    for name, function in (("prox_gconj", prox_gconj), ("K", K), ("KT", KT)):
        check_callable(function, name)
    for name, maybe in (
        *(("value_and_grad", value_and_grad), ("prox_f", prox_f)),
        *(("objective", objective), ("callback", callback)),
    ):
        check_callable(maybe, name, optional=True)
    check_visible(x, limits, callback, backend)
    prox_gconj, K, KT = (with_callers_errors(f) for f in (prox_gconj, K, KT))
    value_and_grad, prox_f = (f and with_callers_errors(f) for f in (value_and_grad, prox_f))
    as_numbers = limits.tol is not None or callback is not None
    m = scalars_of(x, (), backend, as_numbers=as_numbers)

    dual, _ = tree_of(K(tree.split(x)), None, None, "what K returns")
    eps = float(xp.finfo(x.dtype).eps)

    def forward(x: Array) -> Array:
        image = dual.join(K(tree.split(x)), "what K returns")
        return xp.astype(image, _wider(image, x, tree), copy=False)

    def back(u: Array) -> Array:
        return check_returned(tree.join(KT(dual.split(u)), "what KT returns"), "KT", x.shape)

    def gradient(x: Array) -> tuple[Any, Array]:
        if value_and_grad is None:
            return 0.0, xp.zeros_like(x)
        pair = value_and_grad(tree.split(x))
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"value_and_grad must return a pair of a value and a gradient, got {type(pair).__name__}"
            )
        grad = tree.join(pair[1], "the gradient that value_and_grad returns")
        return pair[0], check_gradient(backend, x, check_returned(grad, "value_and_grad", x.shape))

    def size(x: Array) -> Any:
        return norm(backend.stop_gradient(x), m, backend)

    image = forward(x)
    u = xp.zeros_like(image)
    x, u = _warm(start, x, u, tree, dual)
    image = image if start is None else forward(x)
    given = None if steps is None else _check_steps(steps, x, u, tree)
    value, grad = gradient(x)
    if backend.is_eager(x) and not (
        math.isfinite(float(value)) and bool(xp.all(xp.isfinite(grad)))
    ):
        raise ValueError(
            "value_and_grad must return a finite value and gradient at x0, got NaN or infinity; "
            "start in the domain of the function"
        )
    none, unknown = m.full(0.0), m.full(math.inf)
    bend, length = none, none
    if given is None:
        length = _norm_of(forward, back, x, size, m, tree)
        bend = none if value_and_grad is None else _bend(gradient, x, grad, size, m, tree)
    first = _State(
        *(x, u, grad, image, back(u), bend, length, m.full(1.0), x, u, none, none),
        *(size(x), none, unknown, unknown),
    )

    def advance(state: _State) -> Step:
        x, u = state.x, state.u
        if given is None:
            # At least as long as the numbers of the dtype allow, where K and h are 0.
            sigma = m.ratio(state.ratio, state.norm)
            sigma = m.where(sigma == 0, 1.0, sigma)
            inverse = state.ratio * state.norm + state.curvature
            tau = m.where(inverse == 0, 1.0, m.ratio(1.0, inverse))
        else:
            tau, sigma = given
        with backend.ignore_overflow():
            slope = state.grad + state.back
            forth = xp.asarray(x - tau * slope)
        new = forth
        if prox_f is not None:
            found = tree.join(prox_f(tree.split(forth), tau), "what prox_f returns")
            new = check_returned(found, "prox_f", x.shape)
        image = forward(new)
        with backend.ignore_overflow():
            forth = xp.asarray(u + sigma * (2 * image - state.image))
        found = dual.join(prox_gconj(dual.split(forth), sigma), "what prox_gconj returns")
        new_u = check_returned(found, "prox_gconj", u.shape)
        new_back = back(new_u)
        value, grad = gradient(new)
        with backend.ignore_overflow():
            d, turn = new - x, grad - state.grad
            moved, turned = size(d), size(turn)
            across = m.ratio(
                _along(d, turn, m, tree), m.maximum(moved, 1e-300) if m.are_numbers else moved
            )
            p = turn + new_back - state.back - d / tau
            q = image - state.image - (new_u - u) / sigma
            is_finite = _is_finite(value, m, tree) & m.isfinite(size(grad) + size(new_u))
            bend = m.ratio(across, moved)
            rough = m.maximum(
                bend, m.where(across > 0, m.ratio(m.ratio(turned, across) * turned, moved), 0.0)
            )
            # A step so short that its differences are rounding tells nothing.
            tells = moved > 64 * eps * size(new)
            accepted = is_finite
            curvature, stretched = state.curvature, state.norm
            if given is None:
                room = 2 * state.curvature
                accepted = is_finite & (m.negate(tells) | (bend <= room) | (bend * tau <= 1))
                met = m.where(is_finite & tells, m.minimum(rough, 10 / tau), 0.0)
                curvature = m.maximum(curvature, met)
                curvature = m.where(is_finite, curvature, 10 / tau)
                stretched = m.maximum(
                    stretched,
                    m.where(is_finite & tells, m.ratio(size(image - state.image), moved), 0.0),
                )
            else:
                stretched = m.maximum(
                    stretched, m.ratio(size(image), m.where(size(new) == 0, 1.0, size(new)))
                )
            largest = m.maximum(state.largest, size(new))
            pull = m.maximum(size(grad), size(new_back))
            strongest = m.maximum(state.strongest, pull)
            primal = m.maximum(size(p), ROUNDING * eps * size(new / tau))
            gap = m.maximum(size(q), ROUNDING * eps * size(new_u / sigma))
            scale = m.maximum(pull, curvature * m.maximum(size(new), FLOOR * largest))
            primal_rel = _relative(primal, m.maximum(scale, FLOOR * strongest), m)
            gap_rel = _relative(gap, stretched * m.maximum(size(new), FLOOR * largest), m)
            following = _State(
                m.pick(accepted, new, x),
                m.pick(accepted, new_u, u),
                m.pick(accepted, grad, state.grad),
                m.pick(accepted, image, state.image),
                m.pick(accepted, new_back, state.back),
                curvature,
                stretched,
                state.ratio,
                state.x_before,
                state.u_before,
                state.age + 1,
                state.changes,
                m.where(accepted, largest, state.largest),
                m.where(accepted, strongest, state.strongest),
                m.where(accepted, m.maximum(primal_rel, gap_rel), state.residual),
                m.where(accepted, m.maximum(primal, gap), state.absolute),
            )
            if given is None:
                following = _balanced(following, size, m)
        is_stuck = m.negate(accepted) if given is not None else m.negate(m.isfinite(curvature))
        return Step(following, following.x, following.residual, following.absolute, is_stuck)

    goal = None if objective is None else tree.wrap(objective)
    result, last = run(advance, first, goal, limits, callback, m, tree)
    x, u = promoted.cast_back(backend, result.x, last.u)
    return result._replace(x=tree.split(x), u=dual.split(u))


def _relative(size: Any, scale: Any, m: Scalars) -> Any:
    return m.where(scale > 0, m.ratio(size, scale), m.where(size > 0, math.inf, 0.0))


def _balanced(state: _State, size: Callable[[Array], Any], m: Scalars) -> _State:
    """Bring the ratio of the steps towards that of the ways gone, the less often the more often it was done.

    Source: the primal weight of D. Applegate et al., Practical large-scale linear programming using primal-dual hybrid
    gradient, NeurIPS 2021, section 4.3, here between windows that grow, without their restarts.
    """
    target = m.ratio(size(state.u - state.u_before), size(state.x - state.x_before))
    target = m.maximum(state.ratio / 100, m.minimum(target, 100 * state.ratio))
    changes = (state.age >= WINDOW * (1 + state.changes)) & (target > 0)
    return state._replace(
        ratio=m.where(changes, m.sqrt(state.ratio * target), state.ratio),
        x_before=m.pick(changes, state.x, state.x_before),
        u_before=m.pick(changes, state.u, state.u_before),
        age=m.where(changes, 0.0, state.age),
        changes=m.where(changes, state.changes + 1, state.changes),
    )


def _along(x: Array, y: Array, m: Scalars, tree: Tree) -> Any:
    backend = tree.backend
    product = backend.inner(backend.stop_gradient(x), backend.stop_gradient(y))
    return float(product) if m.are_numbers else product


def _is_finite(value: Any, m: Scalars, tree: Tree) -> Any:
    if m.are_numbers:
        return math.isfinite(float(value))
    value = m.full(value) if isinstance(value, (int, float)) else value
    return tree.backend.xp.reshape(tree.backend.xp.isfinite(value), ())


def _wider(image: Array, x: Array, tree: Tree) -> Any:
    """Precision of ``x`` for what K returns, complex where that is."""
    backend = tree.backend
    real = backend.real_dtype(x.dtype)
    if not backend.is_complex(image):
        return real
    return backend.xp.complex64 if real == backend.xp.float32 else backend.xp.complex128


def _norm_of(
    forward: Callable[[Array], Array],
    back: Callable[[Array], Array],
    x: Array,
    size: Callable[[Array], Any],
    m: Scalars,
    tree: Tree,
) -> Any:
    """Norm of K by power iteration, from a start that is the same each time."""
    backend = tree.backend
    drawn = np.random.default_rng(0).standard_normal(tuple(x.shape))
    v = backend.xp.astype(backend.from_numpy(drawn, x, backend.real_dtype(x.dtype)), x.dtype)
    length = m.full(0.0)
    for _ in range(N_POWER):
        v = v * m.ratio(1.0, size(v))
        image = forward(v)
        length = size(image)
        v = back(image)
    return MARGIN * length


def _bend(
    gradient: Callable[[Array], tuple[Any, Array]],
    x: Array,
    grad: Array,
    size: Callable[[Array], Any],
    m: Scalars,
    tree: Tree,
) -> Any:
    """Curvature of h at the start along its gradient."""
    backend = tree.backend
    eps = float(backend.xp.finfo(x.dtype).eps)
    extent, slope = size(x), size(grad)
    short = m.ratio(m.where(extent == 0, 1.0, extent) * eps**0.5, slope)
    with backend.ignore_overflow():
        probe = backend.extrapolate(x, grad, m.spread(-short))
    turn = gradient(probe)[1] - grad
    with backend.ignore_overflow():
        bend = m.ratio(size(turn), short * slope)
    return m.where(m.isfinite(bend), bend, 0.0)


def _check_steps(steps: Any, x: Array, u: Array, tree: Tree) -> tuple[Any, Any]:
    """Return the two lengths, each a number or an array."""
    if not isinstance(steps, tuple) or len(steps) != 2:
        raise TypeError(f"steps must be a pair (tau, sigma), got {type(steps).__name__}")
    backend = tree.backend
    checked = []
    for name, step, like in (("tau of steps", steps[0], x), ("sigma of steps", steps[1], u)):
        if isinstance(step, (int, float)):
            checked.append(check_positive(step, name, limits=backend.xp.finfo(like.dtype)))
            continue
        one = check_tau(backend, like, step, name)
        if not isinstance(one, float) and backend.is_eager(one) and bool(backend.xp.any(one == 0)):
            raise ValueError(f"{name} must be finite and greater than 0, got 0")
        checked.append(one)
    return checked[0], checked[1]


def _warm(start: Any, x: Array, u: Array, tree: Tree, dual: Tree) -> tuple[Array, Array]:
    if start is None:
        return x, u
    if isinstance(start, SolveResult):
        if start.u is None:
            raise ValueError("start must be a result of primal_dual, got one that has no u")
        start = (start.x, start.u)
    if not isinstance(start, tuple) or len(start) != 2:
        raise TypeError(
            f"start must be a result of primal_dual or a pair (x, u), got {type(start).__name__}"
        )
    warm = []
    for name, given, structure, like in (
        ("x of start", start[0], tree, x),
        ("u of start", start[1], dual, u),
    ):
        one = check_returned(structure.join(given, name), name, like.shape)
        check_finite(tree.backend, one, name)
        warm.append(tree.backend.xp.astype(one, like.dtype))
    return warm[0], warm[1]
