"""The alternating direction method of multipliers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from slra._backends import Backend
from slra._backends.ambient import isolated, with_callers_errors
from slra._typing import Array
from slra._validate import (
    check_callable,
    check_finite,
    check_positive,
    check_returned,
    promote,
    resolve,
)
from slra.solvers._loop import Callback, SolveResult, Step, check_limits, norm, run

__all__ = ["admm"]

Operator = Callable[[Array], Array]


class _State(NamedTuple):
    x: Array
    z: Array
    # The multiplier over rho.
    u: Array
    rho: Array


@isolated
def admm(
    z0: Array,
    solve_x: Callable[[Array, Any], Array],
    prox_z: Callable[[Array, Any], Array],
    *,
    operator: Operator | None = None,
    adjoint: Operator | None = None,
    rho: float = 1.0,
    relaxation: float = 1.0,
    balance: float | None = None,
    tol: float | None = 1e-6,
    max_iter: int = 1000,
    objective: Callable[[Array], Any] | None = None,
    callback: Callback | None = None,
) -> SolveResult:
    r"""Minimise ``f(x) + g(z)`` subject to ``A x = z``, f and g convex.

    Parameters
    ----------
    z0 : array
        Where ``z`` starts; real or complex floating, any shape; half precision is computed in float32.
    solve_x : callable
        ``(v, rho) -> argmin_x f(x) + rho/2 ||A x - v||^2``.
    prox_z : callable
        ``(v, step) -> argmin_z step * g(z) + 1/2 ||z - v||^2``, as for `proximal_gradient`.
    operator, adjoint : callable, optional
        ``x -> A x`` and ``z -> A^H z``, both or none; A is the identity by default.
    rho : float
        Penalty, greater than 0: it changes the speed, not the solution.
    relaxation : float
        Between 0 and 2; 1.5 to 1.8 is often faster than 1.
    balance : float, optional
        Double or halve ``rho`` when one residual exceeds the other this many times, at least 1 (10 is usual).
        ``solve_x`` then meets changing values of ``rho``, as 0-d arrays.
    tol : float or None
        Stop when the residual is at most this. None means exactly ``max_iter`` iterations, which is the form that runs
        under ``jax.jit`` (as one loop, not unrolled), vmap, torch.compile and on Dask.
    max_iter : int
        Largest number of iterations.
    objective : callable, optional
        ``x -> value``, evaluated after each iteration for the history only.
    callback : callable, optional
        Called with a `Progress` after each iteration; returning True stops the solver.

    Returns
    -------
    SolveResult
        ``x`` is the last ``x``; with the identity for A it is the last ``z``, which has what ``prox_z`` gives, such as
        exact zeros. The residual is the larger of ``||A x - z|| / max(||A x||, ||z||)`` and
        ``||A^H (z - z_old)|| / ||A^H u||``.

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
    backend = resolve(z0=z0)
    promoted = promote(backend, z0=z0)
    (z,) = promoted.arrays
    check_finite(backend, z, "z0")
    tol, max_iter = check_limits(tol, max_iter)
    check_callable(solve_x, "solve_x")
    check_callable(prox_z, "prox_z")
    for name, function in (
        *(("operator", operator), ("adjoint", adjoint)),
        *(("objective", objective), ("callback", callback)),
    ):
        check_callable(function, name, optional=True)
    solve_x, prox_z = with_callers_errors(solve_x), with_callers_errors(prox_z)
    operator, adjoint = (f and with_callers_errors(f) for f in (operator, adjoint))
    rho = check_positive(rho, "rho", limits=backend.xp.finfo(z.dtype))
    relaxation = check_positive(relaxation, "relaxation")
    if relaxation >= 2:
        raise ValueError(f"relaxation must be between 0 and 2, got {relaxation}")
    if balance is not None:
        balance = check_positive(balance, "balance", limits=backend.xp.finfo(z.dtype))
        if balance < 1:
            raise ValueError(f"balance must be 1 or more, got {balance}")
    if (operator is None) != (adjoint is None):
        raise ValueError("operator and adjoint must be given both or neither")
    like: dict[str, Any] = {
        "dtype": backend.real_dtype(z.dtype),
        "device": backend.creation_device(z),
    }
    penalty = backend.xp.full((), rho, **like)

    def advance(state: _State) -> Step:
        rho_now = rho if balance is None else state.rho
        x = solve_x(state.z - state.u, rho_now)
        image = x if operator is None else operator(x)
        with backend.ignore_overflow():
            mixed = image if relaxation == 1 else relaxation * image + (1 - relaxation) * state.z
            # An array, where NumPy makes a scalar of a sum of 0-d ones.
            shifted = backend.xp.asarray(mixed + state.u)
        z = check_returned(prox_z(shifted, 1 / rho_now), "prox_z", state.z.shape)
        with backend.ignore_overflow():
            u, move = shifted - z, z - state.z
        back = adjoint or (lambda v: v)
        back_move, back_u = back(move), back(u)
        with backend.ignore_overflow():
            primal = _ratio(
                norm(image - z, backend), norm(image, backend), norm(z, backend), backend=backend
            )
            dual = _ratio(norm(back_move, backend), norm(back_u, backend), backend=backend)
            factor = _balancing_factor(primal, dual, balance, backend)
            kept = z if operator is None else x
            following = _State(kept, z, u / factor, state.rho * factor)
        return Step(following, kept, backend.xp.maximum(primal, dual))

    # The first x is known only after the first solve; where A is not the identity its shape may differ from z.
    start = _State(z if operator is None else solve_x(z, rho), z, backend.xp.zeros_like(z), penalty)
    result = run(advance, start, objective, tol, max_iter, callback, backend)
    return result._replace(x=promoted.cast_back(backend, result.x)[0])


def _ratio(x: Array, *scales: Array, backend: Backend) -> Array:
    xp = backend.xp
    scale = scales[0] if len(scales) == 1 else xp.maximum(*scales)
    return xp.reshape(x / xp.where(scale == 0, 1.0, scale), ())


def _balancing_factor(primal: Array, dual: Array, balance: float | None, backend: Backend) -> Any:
    """Factor on rho that brings the two residuals together. Source: Boyd et al., section 3.4.1."""
    if balance is None:
        return 1.0
    xp = backend.xp
    one = xp.ones_like(primal)
    return xp.where(
        primal > balance * dual, 2 * one, xp.where(dual > balance * primal, one / 2, one)
    )
