"""Solvers against closed forms, scikit-learn and scipy."""

from functools import partial

import numpy as np
import pytest
import scipy.optimize

import slra
from tests.backends import to_numpy, to_xp
from tests.solver_problems import problems, true_residual

L1 = 5.0


def lasso(dtype="float64"):
    rng = np.random.default_rng(0)
    A = rng.standard_normal((60, 100))
    if np.dtype(dtype).kind == "c":
        A = A + 1j * rng.standard_normal(A.shape)
    truth = np.where(np.arange(100) % 12 == 0, rng.standard_normal(100) * 3, 0)
    b = A @ truth + 0.1 * rng.standard_normal(60)
    return A.astype(dtype), b.astype(dtype)


def value(A, b, x):
    A, b, x = (np.asarray(a, dtype=np.result_type(a, "float64")) for a in (A, b, x))
    return np.linalg.norm(A @ x - b) ** 2 / 2 + L1 * np.sum(np.abs(x))


def as_functions(xp, A, b):
    """Return the smooth part with its gradient, the prox and the objective of a lasso, written for a backend."""
    A, b = to_xp(xp, A), to_xp(xp, b)
    is_complex = xp.isdtype(A.dtype, "complex floating")
    Ah = xp.conj(xp.matrix_transpose(A)) if is_complex else xp.matrix_transpose(A)

    def smooth(x):
        misfit = A @ x - b
        return xp.sum(xp.abs(misfit) ** 2) / 2, Ah @ misfit

    return (
        smooth,
        lambda x, step: slra.prox.prox_l1(x, L1 * step),
        lambda x: smooth(x)[0] + L1 * xp.sum(xp.abs(x)),
    )


def lasso_optimum(A, b):
    from sklearn.linear_model import Lasso

    fit = Lasso(alpha=L1 / len(b), fit_intercept=False, tol=1e-12, max_iter=100_000).fit(A, b)
    return value(A, b, fit.coef_)


@pytest.mark.eager_only("tol and backtracking look at values")
@pytest.mark.parametrize("accelerated", [True, False])
def test_lasso_equals_coordinate_descent(xp, accelerated):
    A, b = lasso()
    smooth, prox, objective = as_functions(xp, A, b)
    result = slra.proximal_gradient(
        to_xp(xp, np.zeros(100)),
        smooth,
        prox,
        accelerated=accelerated,
        tol=1e-9,
        max_iter=3000,
        objective=objective,
    )
    assert result.converged is True
    assert result.n_iter == result.residual.shape[0] == result.objective.shape[0] < 3000
    best = lasso_optimum(A, b)
    assert abs(value(A, b, to_numpy(result.x)) - best) <= 1e-9 * best
    history = to_numpy(result.objective)
    np.testing.assert_allclose(history[-1], best, rtol=1e-9)
    if not accelerated:
        # With a step that the search has found admissible, the objective never rises.
        assert np.all(np.diff(history) <= 1e-12 * history[0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_fixed_number_of_iterations(xp, dtype):
    """Exactly max_iter steps on every backend, traced ones included, and the same ones."""
    A, b = lasso(dtype)
    step = 1 / float(np.linalg.norm(A, 2)) ** 2

    def solve(namespace):
        return slra.proximal_gradient(
            to_xp(namespace, np.zeros(100, dtype)),
            *as_functions(namespace, A, b)[:2],
            objective=as_functions(namespace, A, b)[2],
            step=step,
            tol=None,
            max_iter=8,
        )

    result, reference = solve(xp), solve(np)
    assert result.converged is None
    assert result.n_iter == 8
    tol = 1000 * np.finfo(dtype).eps
    for name in ("x", "objective", "residual"):
        ours, theirs = to_numpy(getattr(result, name)), getattr(reference, name)
        np.testing.assert_allclose(ours, theirs, atol=tol * np.max(np.abs(theirs)))
    assert to_numpy(result.objective)[-1] < 0.5 * to_numpy(result.objective)[0]


def small():
    rng = np.random.default_rng(1)
    return rng.standard_normal((12, 20)), rng.standard_normal(12)


def shrunk(x, tau):
    return np.sign(x) * np.maximum(np.abs(x) - tau, 0)


# Weight, operator as the solver is given it, and what that does; the last is not known by name.
KNOWN = {
    "l1": (0.75, lambda: slra.prox.prox_l1, shrunk),
    "l1, a weight for each entry": (np.linspace(0, 2, 20), lambda: slra.prox.prox_l1, shrunk),
    "nonneg": (0.75, lambda: slra.prox.prox_nonneg_l1, lambda x, tau: np.maximum(x - tau, 0)),
    "elastic net": (
        0.75,
        lambda: partial(slra.prox.prox_elastic_net, l2=2.0),
        lambda x, tau: shrunk(x, tau) / (1 + 2 * tau),
    ),
    "another": (0.75, lambda: lambda x, tau: x / (1 + tau), lambda x, tau: x / (1 + tau)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_weight_and_operators_known_by_name(xp, name):
    """The same as a loop of NumPy that calls the operator with ``step * weight``."""
    A, b = small()
    weight, known, called = KNOWN[name]
    step, x = 0.02, np.zeros(20)
    for _ in range(5):
        x = called(x - step * (A.T @ (A @ x - b)), step * weight)
    smooth = as_functions(xp, A, b)[0]
    result = slra.proximal_gradient(
        to_xp(xp, np.zeros(20)),
        smooth,
        known(),
        weight=weight if isinstance(weight, float) else to_xp(xp, weight),
        step=step,
        accelerated=False,
        tol=None,
        max_iter=5,
    )
    # Five steps, each with sums of 20 and 12 terms in another order, which the next steps take on without enlarging.
    eps = np.finfo("float64").eps
    np.testing.assert_allclose(to_numpy(result.x), x, atol=500 * eps * np.max(np.abs(x)))


def test_a_gradient_of_another_dtype_is_taken_in_that_of_the_start(xp):
    A, b = small()
    smooth = as_functions(xp, A, b)[0]
    x0 = to_xp(xp, np.zeros(20, "float32"))
    result = slra.proximal_gradient(
        x0,
        lambda x: smooth(xp.astype(x, xp.float64)),
        slra.prox.prox_l1,
        step=0.02,
        tol=None,
        max_iter=3,
    )
    assert result.x.dtype == xp.float32


def test_a_complex_gradient_of_a_real_start_is_refused():
    with pytest.raises(TypeError, match="real gradient where x0 is real, got complex128"):
        slra.proximal_gradient(np.ones(3), lambda x: (0.0, x + 0j), lambda x, tau: x, step=0.1)


def test_operators_known_by_name_are_checked():
    def solve(x0, operator, **options):
        return slra.proximal_gradient(x0, lambda x: (0.0, x), operator, step=0.1, **options)

    with pytest.raises(ValueError, match="l2 must be finite and 0 or more"):
        solve(np.ones(3), partial(slra.prox.prox_elastic_net, l2=-1.0))
    with pytest.raises(TypeError, match="x must have a real floating dtype"):
        solve(np.ones(3) + 0j, slra.prox.prox_nonneg_l1)
    with pytest.raises(TypeError, match="l2"):
        solve(np.ones(3), slra.prox.prox_elastic_net)
    with pytest.raises(ValueError, match="weight must be finite and 0 or more"):
        solve(np.ones(3), slra.prox.prox_l1, weight=-1.0)
    with pytest.raises(ValueError, match="weight must broadcast to x"):
        solve(np.ones(3), slra.prox.prox_l1, weight=np.ones(4))


def test_jit_makes_one_loop():
    """A thousand iterations compile as quickly as one: the loop is in the graph, not its steps."""
    jax = pytest.importorskip("jax")
    A, b = lasso()

    def solve(A, n):
        smooth, prox, _ = as_functions(jax.numpy, A, b)
        x0 = jax.numpy.zeros(100)
        return slra.proximal_gradient(x0, smooth, prox, step=1e-3, tol=None, max_iter=n).x

    def size(n):
        return len(str(jax.make_jaxpr(solve, static_argnums=1)(A, n)).splitlines())

    assert size(1000) == size(2)


def test_values_that_cannot_be_looked_at_are_refused():
    jax = pytest.importorskip("jax")
    A, b = lasso()
    smooth, prox, _ = as_functions(jax.numpy, A, b)

    def solve(x0, **options):
        return slra.proximal_gradient(x0, smooth, prox, **options).x

    x0 = jax.numpy.zeros(100)
    np.testing.assert_array_equal(
        jax.jit(lambda x: solve(x, tol=None, max_iter=3))(x0).shape, x0.shape
    )
    with pytest.raises(ValueError, match="tol and callback must be None"):
        jax.jit(lambda x: solve(x, step=1e-3))(x0)
    with pytest.raises(ValueError, match="tol and callback must be None"):
        jax.jit(lambda x: solve(x, step=1e-3, tol=None, callback=print))(x0)


@pytest.mark.eager_only("a callback looks at values")
def test_callback_sees_every_iteration_and_can_stop(xp):
    A, b = lasso()
    smooth, prox, objective = as_functions(xp, A, b)
    seen = []

    def callback(progress):
        seen.append((progress.n_iter, progress.residual, float(progress.objective)))
        return progress.n_iter == 7

    x0 = to_xp(xp, np.zeros(100))
    result = slra.proximal_gradient(
        x0, smooth, prox, tol=1e-12, objective=objective, callback=callback
    )
    assert result.n_iter == 7
    assert result.converged is False
    assert [n for n, *_ in seen] == list(range(1, 8))
    np.testing.assert_array_equal([r for _, r, _ in seen], to_numpy(result.residual))
    np.testing.assert_array_equal([f for *_, f in seen], to_numpy(result.objective))


@pytest.mark.eager_only("tol looks at values")
def test_not_converged_is_said(xp):
    A, b = lasso()
    x0 = to_xp(xp, np.zeros(100))
    smooth, prox, _ = as_functions(xp, A, b)
    short = slra.proximal_gradient(x0, smooth, prox, tol=1e-9, max_iter=3)
    assert short.converged is False
    assert short.n_iter == 3
    with np.errstate(all="ignore"):
        diverged = slra.proximal_gradient(
            x0, smooth, prox, step=10.0, accelerated=False, max_iter=2000
        )
    assert diverged.converged is False
    assert diverged.n_iter < 2000


@pytest.mark.eager_only("backtracking looks at values")
def test_backtracking_meets_a_curvature_that_grows(xp):
    """f(x) = log(1 + exp(-m(x))) + x^4 terms: no global Lipschitz constant, compared with scipy."""
    target = np.asarray([2.0, -1.0, 0.3])
    t = to_xp(xp, target)

    def smooth(x):
        return xp.sum((x - t) ** 4) / 4 + xp.sum(x * x) / 2, (x - t) ** 3 + x

    result = slra.proximal_gradient(
        to_xp(xp, np.asarray([8.0, -9.0, 7.0])), smooth, lambda x, step: x, tol=1e-12, max_iter=5000
    )
    best = [
        scipy.optimize.brentq(lambda x, t=t: (x - t) ** 3 + x, -5, 5, xtol=1e-15) for t in target
    ]
    assert result.converged is True
    # The residual is relative to the gradient at the start, about 1e3 at worst; the curvature is at least 1.
    np.testing.assert_allclose(to_numpy(result.x), best, atol=3e-9)


@pytest.mark.eager_only("tol looks at values")
@pytest.mark.parametrize(
    "options",
    [{}, {"relaxation": 1.6}, {"balance": 10.0, "rho": 1e-3}],
    ids=["plain", "relaxed", "balanced"],
)
def test_admm_lasso(xp, options):
    A, b = lasso()
    curvature, V = np.linalg.eigh(A.T @ A)
    curvature, V, Vt = to_xp(xp, curvature), to_xp(xp, V), to_xp(xp, V.T.copy())
    moment = to_xp(xp, A.T @ b)

    def solve_x(v, rho):
        return V @ ((Vt @ (moment + rho * v)) / (curvature + rho))

    result = slra.admm(
        to_xp(xp, np.zeros(100)),
        solve_x,
        lambda x, step: slra.prox.prox_l1(x, L1 * step),
        **{"rho": 10.0, "tol": 1e-9, "max_iter": 3000, **options},
    )
    assert result.converged is True
    assert np.any(to_numpy(result.x) == 0)
    best = lasso_optimum(A, b)
    assert abs(value(A, b, to_numpy(result.x)) - best) <= 1e-7 * best


def total_variation(xp, b, max_iter):
    """Return the result of ADMM on min 1/2||x - b||^2 + |D x|_1, D the differences."""
    D = np.diff(np.eye(len(b)), axis=0)
    inverse = to_xp(xp, np.linalg.inv(np.eye(len(b)) + 2.0 * D.T @ D))
    d, dt, data = to_xp(xp, D), to_xp(xp, D.T.copy()), to_xp(xp, b)
    return slra.admm(
        to_xp(xp, np.zeros(len(b) - 1)),
        lambda v, rho: inverse @ (data + rho * (dt @ v)),
        slra.prox.prox_l1,
        operator=lambda x: d @ x,
        adjoint=lambda z: dt @ z,
        rho=2.0,
        tol=None,
        max_iter=max_iter,
    )


STEPS = np.repeat([1.0, 4.0, 2.0], 10) + 0.1 * np.random.default_rng(0).standard_normal(30)


def test_admm_with_an_operator_and_a_fixed_number_of_iterations(xp):
    result, reference = total_variation(xp, STEPS, 10), total_variation(np, STEPS, 10)
    assert result.converged is None
    np.testing.assert_allclose(to_numpy(result.x), reference.x, atol=1e-13)
    np.testing.assert_allclose(to_numpy(result.residual), reference.residual, atol=1e-13)


def test_admm_with_an_operator_solves_total_variation():
    result = total_variation(np, STEPS, 400)
    x = result.x
    assert result.residual[-1] <= 1e-10
    # b - x = D^T w with |w| <= 1, and w = sign(D x) where x jumps.
    w = -np.cumsum(STEPS - x)[:-1]
    assert abs(np.sum(STEPS - x)) <= 1e-9
    assert np.max(np.abs(w)) <= 1 + 1e-8
    jumps = np.abs(np.diff(x)) > 1e-6
    assert np.any(jumps)
    np.testing.assert_allclose(w[jumps], np.sign(np.diff(x)[jumps]), atol=1e-8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tol": -1.0}, ValueError, "tol must be finite and 0 or more"),
        ({"max_iter": 0}, ValueError, "max_iter must be 1 or more"),
        ({"max_iter": 2.0}, TypeError, "max_iter must be an int"),
        ({"step": -1.0}, ValueError, "step must be finite"),
        ({"step": np.ones(3)}, ValueError, "step must broadcast to"),
    ],
)
def test_options_of_proximal_gradient(options, error, message):
    with pytest.raises(error, match=message):
        slra.proximal_gradient(np.zeros(3), lambda x: (0.0, x), lambda x, step: x, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be finite and greater than 0"),
        ({"relaxation": 2.0}, "relaxation must be between 0 and 2"),
        ({"balance": 0.5}, "balance must be 1 or more"),
        ({"operator": lambda x: x}, "operator and adjoint must be given both or neither"),
    ],
)
def test_options_of_admm(options, message):
    with pytest.raises(ValueError, match=message):
        slra.admm(np.zeros(3), lambda v, rho: v, lambda v, step: v, **options)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="x0 must be finite"):
        slra.proximal_gradient(np.full(3, np.nan), lambda x: (0.0, x), lambda x, step: x)
    with pytest.raises(ValueError, match="z0 must be finite"):
        slra.admm(np.full(3, np.inf), lambda v, rho: v, lambda v, step: v)


# Sixty problems, and what is peculiar to some


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_converged_is_true_of_sixty_problems():
    """Solved by default, to what the residual says in double precision; from the solution at once."""
    given = problems()
    assert len(given) == 60
    unsolved = []
    for problem in given:
        smooth, prox = problem.functions(problem.x0.real.dtype)
        result = slra.proximal_gradient(problem.x0, smooth, prox)
        assert np.isfinite(smooth(result.x)[0]), problem.name
        if not result.converged:
            unsolved.append(problem.name)
            continue
        assert result.x.dtype == problem.x0.dtype
        # L of the whole Hessian there is no less than what was met of it; the operators round, too.
        assert true_residual(problem, result.x) <= 3e-6, problem.name
        again = slra.proximal_gradient(result.x, smooth, prox)
        assert again.converged, problem.name
        # One whose solution is 0, to whose digits there is no end, goes on from where it stopped.
        assert again.n_iter <= 25, problem.name
        assert true_residual(problem, again.x) <= 3e-6, problem.name
    assert len(unsolved) <= 2, unsolved


@pytest.mark.eager_only("the function itself looks at values")
def test_a_point_outside_of_the_domain_is_not_accepted(xp):
    """A step of the length that the curvature at the start allows leads out of it."""

    def smooth(x):
        inside = bool(xp.all(x > 0))
        return (xp.sum(x - xp.log(x)) if inside else float("inf")), 1 - 1 / x

    x0 = to_xp(xp, np.asarray([100.0, 30.0]))
    seen = []
    result = slra.proximal_gradient(
        x0, smooth, lambda x, step: x, tol=1e-9, callback=lambda p: seen.append(to_numpy(p.x))
    )
    assert result.converged is True
    assert np.all(np.asarray(seen) > 0)
    np.testing.assert_allclose(to_numpy(result.x), 1.0, rtol=1e-8)


def test_a_start_outside_of_the_domain_is_refused():
    with pytest.raises(ValueError, match="finite value and gradient at x0"):
        slra.proximal_gradient(np.ones(2), lambda x: (np.inf, x), lambda x, step: x)
    with pytest.raises(ValueError, match="finite value and gradient at x0"):
        slra.proximal_gradient(np.ones(2), lambda x: (0.0, x * np.nan), lambda x, step: x)


@pytest.mark.parametrize("objective", [None, lambda x: np.inf])
def test_nothing_converges_to_an_infinite_objective(objective):
    """Nowhere but at the start is the function finite; or its objective is finite nowhere."""

    def smooth(x):
        return (0.0 if objective or np.all(x == 1) else np.nan), x

    result = slra.proximal_gradient(
        np.ones(2), smooth, lambda x, step: x, objective=objective, max_iter=300
    )
    assert result.converged is False
    assert np.all(np.isfinite(result.x))


def test_absolute_tolerance():
    def smooth(x):
        return 0.5 * np.sum((x - 3) ** 2), x - 3

    options = {"step": 0.5, "accelerated": False, "tol": 0.0}
    result = slra.proximal_gradient(np.zeros(4), smooth, lambda x, step: x, atol=1e-3, **options)
    assert result.converged is True
    # The gradient is halved each time, from a norm of 6: less than 1e-3 first after 13.
    assert result.n_iter == 13
    assert np.linalg.norm(smooth(result.x)[1]) <= 1e-3


def test_a_step_that_rounding_swallows_is_no_convergence():
    """Steps of 1e-30 change no digit; nor do they solve anything."""

    def smooth(x):
        return 0.5 * np.sum((x - 3) ** 2), x - 3

    result = slra.proximal_gradient(np.ones(4), smooth, lambda x, s: x, step=1e-30, max_iter=50)
    assert result.converged is False


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_residual_is_that_of_the_point_returned(dtype, accelerated):
    """No less than the gradient mapping there, in double precision, whatever step it is taken with."""
    A, b = lasso(dtype)
    smooth, prox, _ = as_functions(np, A, b)
    wide, _, _ = as_functions(np, A.astype("float64"), b.astype("float64"))
    eps = float(np.finfo(dtype).eps)
    for max_iter in (1, 3, 10, 60):
        result = slra.proximal_gradient(
            np.zeros(100, dtype), smooth, prox, accelerated=accelerated, max_iter=max_iter
        )
        x = result.x.astype("float64")
        grad, L = wide(x)[1], np.linalg.norm(A.astype("float64"), 2) ** 2
        scale = max(np.linalg.norm(grad), L * np.linalg.norm(x))
        for step in (0.1 / L, 1 / L, 10 / L):
            mapping = np.linalg.norm(x - prox(x - step * grad, step)) / step
            # 60 and 100 products are added in each gradient.
            assert mapping <= (result.residual[-1] + 100 * eps) * scale


# Batches


def lassos(count=6):
    """As many lassos of one shape, in scales from 1e-2 to 1e2, with a weight for each."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((count, 30, 20)) * np.geomspace(0.1, 10, count)[:, None, None]
    b = rng.standard_normal((count, 30))
    weight = 0.1 * np.max(np.abs(np.einsum("kij,ki->kj", A, b)), axis=1, keepdims=True)
    return A, b, weight


def batched(xp, A, b):
    A, b = to_xp(xp, A), to_xp(xp, b)

    def smooth(x):
        rest = xp.sum(A * x[:, None, :], axis=-1) - b
        return xp.sum(rest * rest, axis=-1) / 2, xp.sum(A * rest[:, :, None], axis=-2)

    return smooth


@pytest.mark.eager_only("tol looks at values")
def test_each_problem_of_a_batch_has_its_own_step_and_stop(xp):
    """What each alone gives, after as many steps as the slowest alone."""
    A, b, weight = lassos()
    result = slra.proximal_gradient(
        to_xp(xp, np.zeros((6, 20))),
        batched(xp, A, b),
        slra.prox.prox_l1,
        weight=to_xp(xp, weight),
        tol=1e-9,
    )
    assert tuple(result.converged.shape) == (6,)
    assert bool(xp.all(result.converged))
    assert tuple(result.residual.shape) == (result.n_iter, 6)
    residual, slowest = to_numpy(result.residual), 0
    for i in range(6):
        smooth = as_functions(np, A[i], b[i])[0]
        alone = slra.proximal_gradient(
            np.zeros(20), smooth, slra.prox.prox_l1, weight=float(weight[i, 0]), tol=1e-9
        )
        slowest = max(slowest, alone.n_iter)
        # The condition of the smooth parts is at most 100.
        size = np.linalg.norm(alone.x)
        assert np.linalg.norm(to_numpy(result.x)[i] - alone.x) <= 1e-6 * size
        stopped = np.flatnonzero(residual[:, i] <= 1e-9)[0]
        np.testing.assert_array_equal(residual[stopped:, i], residual[stopped, i])
    assert result.n_iter <= 1.2 * slowest + 3


@pytest.mark.parametrize("as_column", [False, True])
def test_a_step_for_each_problem_of_a_batch(xp, as_column):
    A, b, weight = lassos()
    step = 1 / np.linalg.norm(A, 2, axis=(1, 2)) ** 2
    result = slra.proximal_gradient(
        to_xp(xp, np.zeros((6, 20))),
        batched(xp, A, b),
        slra.prox.prox_l1,
        weight=to_xp(xp, weight),
        step=to_xp(xp, step[:, None] if as_column else step),
        tol=None,
        max_iter=4,
    )
    assert tuple(result.residual.shape) == (4, 6)
    for i in range(6):
        alone = slra.proximal_gradient(
            np.zeros(20),
            as_functions(np, A[i], b[i])[0],
            slra.prox.prox_l1,
            weight=float(weight[i, 0]),
            step=float(step[i]),
            tol=None,
            max_iter=4,
        )
        size = np.max(np.abs(alone.x))
        np.testing.assert_allclose(to_numpy(result.x)[i], alone.x, atol=1e-12 * size)


def test_a_value_for_something_else_is_refused():
    with pytest.raises(ValueError, match="one for each problem along the leading axes"):
        slra.proximal_gradient(np.ones((4, 3)), lambda x: (np.ones(3), x), lambda x, step: x)


def test_steps_are_found_where_nothing_can_be_looked_at(xp):
    """Under a trace and on Dask too: a fixed number of steps, none of them given, the same as with plain numbers."""
    A, b = small()

    def solve(namespace):
        smooth = as_functions(namespace, A, b)[0]
        x0 = to_xp(namespace, np.zeros(20))
        return slra.proximal_gradient(x0, smooth, slra.prox.prox_l1, tol=None, max_iter=8)

    result = solve(xp)
    assert result.converged is None
    x = to_numpy(result.x)
    mapping = np.linalg.norm(x - shrunk(x - A.T @ (A @ x - b), 1.0))
    assert mapping <= 0.2 * np.linalg.norm(A.T @ b)
    seen = []
    smooth = as_functions(np, A, b)[0]
    slra.proximal_gradient(
        np.zeros(20), smooth, slra.prox.prox_l1, tol=0.0, max_iter=8, callback=seen.append
    )
    np.testing.assert_allclose(x, seen[-1].x, atol=1e-10)


# Structures


@pytest.mark.eager_only("tol looks at values")
@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_several_arrays(xp, kind):
    """A matrix of low rank and a sparse vector, each with its operator."""
    B, c = to_xp(xp, np.diag([5.0, 0.5, 3.0])), to_xp(xp, np.asarray([3.0, -0.5, -2.0, 1.0]))
    options = {}
    if kind is dict:
        options = {
            "flatten": lambda d: [d["B"], d["c"]],
            "unflatten": lambda leaves: dict(zip(("B", "c"), leaves, strict=True)),
        }

    def make(*arrays):
        return dict(zip(("B", "c"), arrays, strict=True)) if kind is dict else kind(arrays)

    def take(x):
        assert type(x) is kind
        return (x["B"], x["c"]) if kind is dict else x

    def smooth(x):
        X, y = take(x)
        return xp.sum((X - B) ** 2) / 2 + xp.sum((y - c) ** 2), make(X - B, 2 * (y - c))

    def prox(x, tau):
        X, y = take(x)
        return make(slra.prox.prox_nuclear(X, tau), slra.prox.prox_l1(y, tau))

    result = slra.proximal_gradient(make(0 * B, 0 * c), smooth, prox, tol=1e-9, **options)
    X, y = take(result.x)
    np.testing.assert_allclose(to_numpy(X), np.diag([4.0, 0.0, 2.0]), atol=1e-7)
    np.testing.assert_allclose(to_numpy(y), [2.5, 0.0, -1.5, 0.5], atol=1e-7)


def test_structures_that_do_not_fit():
    x0 = (np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"gradient .* shapes \[\(2,\), \(3,\)\]"):
        slra.proximal_gradient(x0, lambda x: (0.0, x[::-1]), lambda x, tau: x)
    with pytest.raises(TypeError, match="x0 must be an array, a tuple or a list"):
        slra.proximal_gradient({"a": np.ones(2)}, lambda x: (0.0, x), lambda x, tau: x)
    with pytest.raises(ValueError, match="flatten and unflatten must be given both"):
        slra.proximal_gradient(x0, lambda x: (0.0, x), lambda x, tau: x, flatten=list)


# Multipliers in and out


def lasso_step(A, b):
    curvature, V = np.linalg.eigh(A.T @ A)
    return lambda v, rho: V @ ((V.T @ (A.T @ b + rho * v)) / (curvature + rho))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("level", [1.0, 1.5])
def test_admm_where_the_solution_is_zero(level, dtype):
    A, b = lasso(dtype)
    l1 = float(level * np.max(np.abs(A.T @ b)))
    prox = partial(slra.prox.prox_l1)
    for options in ({"rho": 100.0}, {"balance": 10.0}):
        result = slra.admm(
            np.zeros(100, dtype), lasso_step(A, b), lambda x, t: prox(x, l1 * t), **options
        )
        assert result.converged is True
        np.testing.assert_array_equal(result.x, 0)


@pytest.mark.parametrize("as_pair", [True, False])
def test_admm_goes_on_where_it_stopped(as_pair):
    A, b = lasso()

    def solve(**options):
        return slra.admm(
            np.zeros(100),
            lasso_step(A, b),
            lambda x, t: slra.prox.prox_l1(x, L1 * t),
            rho=50.0,
            **options,
        )

    whole = solve(tol=None, max_iter=40)
    first = solve(tol=None, max_iter=15)
    second = solve(tol=None, max_iter=25, start=(first.z, first.u) if as_pair else first)
    np.testing.assert_allclose(second.x, whole.x, atol=1e-12)
    done = solve(max_iter=3000)
    assert done.converged is True
    assert solve(start=done).n_iter <= 2


def test_admm_takes_a_start_of_another_penalty():
    A, b = lasso()
    prox = partial(lambda x, t: slra.prox.prox_l1(x, L1 * t))
    first = slra.admm(np.zeros(100), lasso_step(A, b), prox, rho=50.0, tol=1e-10, max_iter=5000)
    assert first.converged is True
    again = slra.admm(np.zeros(100), lasso_step(A, b), prox, rho=25.0, start=first)
    assert again.n_iter <= 2
    np.testing.assert_allclose(again.u, 2 * first.u, atol=1e-5 * np.max(np.abs(first.u)))
    with pytest.raises(TypeError, match="start must be a result of admm or a pair"):
        slra.admm(np.zeros(100), lasso_step(A, b), prox, start=3)
    with pytest.raises(ValueError, match="one that has no z and u"):
        slra.admm(np.zeros(100), lasso_step(A, b), prox, start=first._replace(z=None, u=None))


@pytest.mark.eager_only("tol looks at values")
def test_admm_of_a_batch(xp):
    """1/2 |x - b|^2 + |x|_1 for three b at once, of three scales; rho for each."""
    b = np.asarray([[3.0, 0.5], [300.0, 0.2], [0.4, 0.2]])
    data, rho = to_xp(xp, b), to_xp(xp, np.asarray([1.0, 0.5, 3.0]))
    result = slra.admm(
        to_xp(xp, np.zeros((3, 2))),
        lambda v, rho: (data + rho * v) / (1 + rho),
        slra.prox.prox_l1,
        rho=rho,
        tol=1e-9,
    )
    assert tuple(result.residual.shape) == (result.n_iter, 3)
    assert bool(xp.all(result.converged))
    np.testing.assert_allclose(to_numpy(result.x), shrunk(b, 1.0), atol=1e-6)


# Primal-dual


def differences(x):
    return x[1:] - x[:-1]


def steps_on(xp, data, weight, **options):
    """Total variation of a signal, 1/2 ||x - b||^2 + weight |D x|_1."""
    b = to_xp(xp, data)
    edge = xp.zeros_like(b[:1])

    def adjoint(u):
        return xp.concat([edge, u]) - xp.concat([u, edge])

    return slra.primal_dual(
        xp.zeros_like(b),
        lambda x: (xp.sum((x - b) ** 2) / 2, x - b),
        None,
        lambda u, sigma: slra.prox.project_box(u, -weight, weight),
        differences,
        adjoint,
        **options,
    )


@pytest.mark.eager_only("tol looks at values")
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_primal_dual_solves_total_variation(xp, scale):
    """x = b - D^T u with |u| <= weight and u = weight sign(D x) where x jumps, which no other x has."""
    data, weight = scale * STEPS, 0.5 * scale
    result = steps_on(xp, data, weight, tol=1e-9, max_iter=20_000)
    assert result.converged is True
    x = to_numpy(result.x)
    u = -np.cumsum(data - x)[:-1]
    assert abs(np.sum(data - x)) <= 1e-7 * scale
    assert np.max(np.abs(u)) <= weight * (1 + 1e-6)
    jumps = np.abs(np.diff(x)) > 1e-5 * scale
    assert 0 < np.sum(jumps) < 29
    np.testing.assert_allclose(u[jumps], weight * np.sign(np.diff(x)[jumps]), rtol=1e-5)
    np.testing.assert_allclose(to_numpy(result.u), u, atol=1e-5 * weight)
    again = steps_on(xp, data, weight, tol=1e-9, start=result)
    assert again.n_iter <= 5


def test_primal_dual_makes_a_fixed_number_of_iterations(xp):
    def solve(namespace):
        return steps_on(namespace, STEPS, 0.5, tol=None, max_iter=5, steps=(0.2, 0.9))

    result, reference = solve(xp), solve(np)
    assert result.converged is None
    np.testing.assert_allclose(to_numpy(result.x), reference.x, atol=1e-13)
    np.testing.assert_allclose(to_numpy(result.u), reference.u, atol=1e-13)
    x, u = np.zeros(30), np.zeros(29)
    D = np.diff(np.eye(30), axis=0)
    for _ in range(5):
        new = x - 0.2 * (x - STEPS + D.T @ u)
        u = np.clip(u + 0.9 * D @ (2 * new - x), -0.5, 0.5)
        x = new
    np.testing.assert_allclose(reference.x, x, atol=1e-13)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_primal_dual_with_constraints_and_two_operators(preconditioned):
    """Least |D x|_1 + |x|_1 / 2 under A x = c, against a linear program."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((4, 12))
    c = A @ np.repeat([0.0, 2.0, 0.0], 4)
    D = np.diff(np.eye(12), axis=0)
    cost = np.concatenate([np.full(24, 0.5), np.ones(22)])
    equal = np.block(
        [
            [A, -A, np.zeros((4, 22))],
            [D, -D, -np.eye(11), np.eye(11)],
        ]
    )
    best = scipy.optimize.linprog(cost, A_eq=equal, b_eq=np.concatenate([c, np.zeros(11)])).fun
    options = {}
    if preconditioned:
        K = np.vstack([A, D])
        options["steps"] = (1 / np.abs(K).sum(axis=0), 1 / np.abs(K).sum(axis=1))
    result = slra.primal_dual(
        np.zeros(12),
        None,
        lambda x, tau: slra.prox.prox_l1(x, 0.5 * tau),
        lambda u, sigma: (u[0] - sigma_of(sigma, 0) * c, np.clip(u[1], -1, 1)),
        lambda x: (A @ x, D @ x),
        lambda u: A.T @ u[0] + D.T @ u[1],
        max_iter=100_000,
        **options,
    )
    assert result.converged is True
    assert isinstance(result.u, tuple)
    assert np.linalg.norm(A @ result.x - c) <= 1e-4 * np.linalg.norm(c)
    value = np.sum(np.abs(result.x)) / 2 + np.sum(np.abs(np.diff(result.x)))
    assert abs(value - best) <= 1e-4 * best


def sigma_of(sigma, part):
    """Part of a dual step that belongs to four equations or to eleven differences."""
    if np.ndim(sigma) == 0:
        return sigma
    return sigma[:4] if part == 0 else sigma[4:]


def test_options_of_primal_dual():
    def solve(**options):
        given = {"K": lambda x: x, "KT": lambda u: u, **options}
        x0 = np.ones(3)
        return slra.primal_dual(
            x0, None, None, lambda u, sigma: u, given.pop("K"), given.pop("KT"), **given
        )

    with pytest.raises(TypeError, match="K must be callable"):
        solve(K=3)
    with pytest.raises(ValueError, match=r"KT must return an array of shape \(3,\)"):
        solve(KT=lambda u: u[:2])
    with pytest.raises(TypeError, match=r"steps must be a pair \(tau, sigma\)"):
        solve(steps=0.1)
    with pytest.raises(ValueError, match="sigma of steps must be finite and greater than 0"):
        solve(steps=(0.1, 0.0))
    with pytest.raises(TypeError, match="start must be a result of primal_dual"):
        solve(start=3)
