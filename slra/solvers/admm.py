"""The alternating direction method of multipliers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from slra._backends.ambient import isolated, with_callers_errors
from slra._typing import Array
from slra._validate import (
    check_callable,
    check_finite,
    check_positive,
    check_returned,
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
from slra.solvers._scalars import Scalars, as_scalars, check_steps, norm, scalars_of
from slra.solvers._tree import Flatten, Tree, Unflatten, tree_of

__all__ = ["admm"]

# Where A x and z vanish, they are small beside the multiplier over rho, which has their units.
SMALL = 1e-6

Operator = Callable[[Any], Any]


class _State(NamedTuple):
    x: Array
    z: Array
    # The multiplier over rho.
    u: Array
    rho: Any
    # Largest ||A x|| or ||z||, and ||A^H u||, so far.
    largest: Any
    strongest: Any
    # Iterations since rho changed, and how often it has.
    age: Any
    changes: Any


@isolated
def admm(
    z0: Any,
    solve_x: Callable[[Any, Any], Any],
    prox_z: Callable[[Any, Any], Any],
    *,
    operator: Operator | None = None,
    adjoint: Operator | None = None,
    rho: float | Array = 1.0,
    relaxation: float = 1.0,
    balance: float | None = None,
    tol: float | None = 1e-6,
    atol: float = 0.0,
    max_iter: int = 1000,
    start: Any = None,
    objective: Callable[[Any], Any] | None = None,
    callback: Callback | None = None,
    flatten: Flatten | None = None,
    unflatten: Unflatten | None = None,
) -> SolveResult:
    r"""Minimise ``f(x) + g(z)`` subject to ``A x = z``, f and g convex.

    Parameters
    ----------
    z0 : array
        Where ``z`` starts; real or complex floating, any shape; half precision is computed in float32. Or a tuple or
        list of arrays, or what ``flatten`` takes apart.
    solve_x : callable
        ``(v, rho) -> argmin_x f(x) + rho/2 ||A x - v||^2``.
    prox_z : callable
        ``(v, step) -> argmin_z step * g(z) + 1/2 ||z - v||^2``, as for `proximal_gradient`.
    operator, adjoint : callable, optional
        ``x -> A x`` and ``z -> A^H z``, both or none; A is the identity by default.
    rho : float or array
        Penalty, greater than 0: it changes the speed, not the solution. An array of the shape of leading axes of ``z``
        says that these count problems of a batch: each has its penalty, its residual and its stop.
    relaxation : float
        Between 0 and 2; 1.5 to 1.8 is often faster than 1.
    balance : float, optional
        Double or halve ``rho`` when one residual exceeds the other this many times, at least 1 (10 is usual).
        ``solve_x`` then meets changing values of ``rho``, the less often the longer it runs.
    tol : float or None
        Stop when the residual is at most this. None means exactly ``max_iter`` iterations, which is the form that runs
        under ``jax.jit`` (as one loop, not unrolled), vmap, torch.compile and on Dask.
    atol : float
        Stop, too, when ``||A x - z||`` and ``rho ||A^H (z - z_old)||`` are at most this.
    max_iter : int
        Largest number of iterations.
    start : SolveResult or (z, u), optional
        Where to start instead: what an earlier call returned.
    objective : callable, optional
        ``x -> value``, evaluated after each iteration for the history only.
    callback : callable, optional
        Called with a `Progress` after each iteration; returning True stops the solver.
    flatten, unflatten : callable, optional
        ``z -> list of arrays`` and back, for structures other than tuples and lists. With the identity for A, ``x`` is
        of the structure too, else what ``solve_x`` returns: an array.

    Returns
    -------
    SolveResult
        ``x`` is the last ``x``; with the identity for A it is the last ``z``, which has what ``prox_z`` gives, such as
        exact zeros. ``z``, ``u`` (the multiplier over ``rho``) and ``rho`` are the last ones. The residual is the
        larger of ``||A x - z|| / max(||A x||, ||z||, 1e-6 ||u||)`` and ``||A^H (z - z_old)|| / ||A^H u||``, where a
        scale that goes to 0 counts as 1e-12 of the largest there was, and a difference of less than 4 roundings of what
        it is a difference of as 0.

    Raises
    ------
    TypeError
        If ``z0`` is not a floating array, or an option is of a wrong type.
    ValueError
        If ``z0`` has NaN or infinity; if an option is out of range; if only one of ``operator`` and ``adjoint`` is
        given; if ``tol`` or ``callback`` is given where values cannot be looked at.

    Notes
    -----
    .. math::

        x \leftarrow \arg\min_x f(x) + \tfrac{\rho}{2} \|A x - z + u\|^2, \quad
        z \leftarrow \operatorname{prox}_{g/\rho}(h + u), \quad
        u \leftarrow u + h - z, \quad h = \alpha A x + (1 - \alpha) z_{\text{old}}

    References
    ----------
    S. Boyd, N. Parikh, E. Chu, B. Peleato, J. Eckstein, Distributed optimization and statistical learning via the
    alternating direction method of multipliers, Foundations and Trends in Machine Learning 3 (2011), sections 3.1-3.4.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> b = np.asarray([3.0, 0.5])
    >>> result = slra.admm(np.zeros(2), lambda v, rho: (b + rho * v) / (1 + rho), slra.prox.prox_l1, tol=1e-10)
    >>> result.x.round(8).tolist(), result.converged
    ([2.0, 0.0], True)
    """
    tree, vector = tree_of(z0, flatten, unflatten, "z0")
    backend = tree.backend
    promoted = promote(backend, z0=vector)
    (z,) = promoted.arrays
    check_finite(backend, z, "z0")
    limits = check_limits(tol, atol, max_iter)
    check_callable(solve_x, "solve_x")
    check_callable(prox_z, "prox_z")
    for name, function in (
        *(("operator", operator), ("adjoint", adjoint)),
        *(("objective", objective), ("callback", callback)),
    ):
        check_callable(function, name, optional=True)
    solve_x, prox_z = with_callers_errors(solve_x), with_callers_errors(prox_z)
    operator, adjoint = (f and with_callers_errors(f) for f in (operator, adjoint))
    check_visible(z, limits, callback, backend)
    rho, batch = check_steps(rho, z, "rho", backend)
    relaxation = check_positive(relaxation, "relaxation")
    if relaxation >= 2:
        raise ValueError(f"relaxation must be between 0 and 2, got {relaxation}")
    if balance is not None:
        balance = check_positive(balance, "balance", limits=backend.xp.finfo(z.dtype))
        if balance < 1:
            raise ValueError(f"balance must be 1 or more, got {balance}")
    if (operator is None) != (adjoint is None):
        raise ValueError("operator and adjoint must be given both or neither")
    as_numbers = limits.tol is not None or callback is not None
    digit = 4 * float(backend.xp.finfo(z.dtype).eps)
    m = scalars_of(z, batch, backend, as_numbers=as_numbers)
    penalty = as_scalars(rho, m, backend)
    z, u = _warm(start, z, penalty, tree, m)

    def x_step(v: Array, rho: Any) -> Any:
        found = solve_x(tree.split(v), rho)
        return tree.join(found, "what solve_x returns") if operator is None else found

    def forward(x: Any) -> Array:
        return x if operator is None else tree.join(operator(x), "what operator returns")

    def back(v: Array) -> Array:
        return v if adjoint is None else adjoint(tree.split(v))

    def size(x: Array) -> Any:
        return norm(backend.stop_gradient(x), m, backend)

    def advance(state: _State) -> Step:
        rho_now = rho if balance is None else m.spread(state.rho)
        x = x_step(state.z - state.u, rho_now)
        image = forward(x)
        with backend.ignore_overflow():
            mixed = image if relaxation == 1 else relaxation * image + (1 - relaxation) * state.z
            # An array, where NumPy makes a scalar of a sum of 0-d ones.
            shifted = backend.xp.asarray(mixed + state.u)
        found = tree.join(prox_z(tree.split(shifted), 1 / rho_now), "what prox_z returns")
        z = check_returned(found, "prox_z", state.z.shape)
        with backend.ignore_overflow():
            u, move = shifted - z, z - state.z
        back_move, back_u = back(move), back(u)
        with backend.ignore_overflow():
            gap, shift, pull = size(image - z), size(back_move), size(back_u)
            scaled, extent = size(u), m.maximum(size(image), size(z))
            largest = m.maximum(extent, state.largest)
            strongest = m.maximum(pull, state.strongest)
            absolute = m.maximum(gap, state.rho * shift)
            # Both are differences of numbers as large as the multiplier and the iterate, and known to their last digit.
            gap = m.where(gap > digit * scaled, gap, 0.0)
            shift = m.where(shift > digit * size(z), shift, 0.0)
            least = m.maximum(FLOOR * largest, SMALL * scaled)
            primal = m.ratio(gap, m.maximum(extent, least))
            dual = m.ratio(shift, m.maximum(pull, FLOOR * strongest))
            kept = z if operator is None else x
            following = _State(
                kept, z, u, state.rho, largest, strongest, state.age + 1, state.changes
            )
            if balance is not None:
                following = _balanced(following, primal, dual, balance, m)
        residual = m.maximum(primal, dual)
        return Step(following, kept, residual, absolute, m.negate(m.isfinite(residual)))

    # The first x is known only after the first solve; where A is not the identity its shape may differ from z.
    none = m.full(0.0)
    x = z if operator is None else x_step(z, rho)
    first = _State(x, z, u, penalty, none, none, none, none)
    goal = None if objective is None else (tree.wrap(objective) if operator is None else objective)
    seen = tree if operator is None else tree._replace(unflatten=None)
    result, last = run(advance, first, goal, limits, callback, m, seen)
    x, z, u = promoted.cast_back(backend, result.x, last.z, last.u)
    return result._replace(x=seen.split(x), z=tree.split(z), u=tree.split(u), rho=last.rho)


def _warm(start: Any, z: Array, rho: Any, tree: Tree, m: Scalars) -> tuple[Array, Array]:
    """Return where ``z`` and ``u`` start; a result's multiplier is brought to the penalty of this run."""
    backend = tree.backend
    if start is None:
        return z, backend.xp.zeros_like(z)
    factor = None
    if isinstance(start, SolveResult):
        if start.z is None or start.u is None:
            raise ValueError("start must be a result of admm, got one that has no z and u")
        if start.rho is not None:
            factor = m.spread(start.rho / rho)
        start = (start.z, start.u)
    if not isinstance(start, tuple) or len(start) != 2:
        raise TypeError(
            f"start must be a result of admm or a pair (z, u), got {type(start).__name__}"
        )
    warm = []
    for name, given in zip(("z of start", "u of start"), start, strict=True):
        one = check_returned(tree.join(given, name), name, z.shape)
        check_finite(backend, one, name)
        warm.append(backend.xp.astype(one, z.dtype))
    return warm[0], warm[1] if factor is None else warm[1] * factor


def _balanced(state: _State, primal: Any, dual: Any, balance: float, m: Scalars) -> _State:
    """Change rho to bring the two residuals together, the less often the more often it has been done.

    Source: Boyd et al., section 3.4.1, where it must stop after a number of iterations for the method to converge.
    """
    factor = m.where(primal > balance * dual, 2.0, m.where(dual > balance * primal, 0.5, 1.0))
    changes = (factor != 1.0) & (state.age > state.changes)
    factor = m.where(changes, factor, 1.0)
    return state._replace(
        u=state.u / m.spread(factor),
        rho=state.rho * factor,
        age=m.where(changes, 0.0, state.age),
        changes=m.where(changes, state.changes + 1, state.changes),
    )
