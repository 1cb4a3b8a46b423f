"""Operators that are sums, sorts, strings and sets, and their calculus: against references of their own in NumPy."""

import functools

import numpy as np
import pytest

from slra import prox
from tests.backends import to_numpy, to_xp

EPS = np.finfo("float64").eps
RNG = np.random.default_rng(0)
X = 2 * RNG.standard_normal((3, 8))
Z = X + 2j * RNG.standard_normal((3, 8))
X[0, :3] = 0.0, 1.0, -1.0
GROUPS = [[0, 3], [1], [2, 4, 5, 7]]
WEIGHTS = [1.0, 0.5, 2.0]
SLOPE = np.asarray([2.0, 1.5, 1.5, 1.0, 0.5, 0.2, 0.0, 0.0])
M = RNG.standard_normal((8, 8))
A, B = M.T @ M / 8, RNG.standard_normal(8)
ROWS, AIM = M[:3], RNG.standard_normal(3)


def soft(x, tau):
    modulus = np.abs(x)
    return x * np.maximum(1 - tau / np.where(modulus == 0, 1, modulus), 0)


def groups_one_by_one(x, tau):
    y = x.copy()
    for members, weight in zip(GROUPS, WEIGHTS, strict=True):
        norm = np.linalg.norm(x[:, members], axis=1, keepdims=True)
        y[:, members] *= np.maximum(1 - tau * weight / np.where(norm == 0, 1, norm), 0)
    return y


def logistic_by_bisection(x, tau):
    low, high = x, x + tau
    for _ in range(200):
        y = (low + high) / 2
        is_low = y - x - tau / (1 + np.exp(y)) < 0
        low, high = np.where(is_low, y, low), np.where(is_low, high, y)
    return y


def slope_by_means(x, tau):
    y = np.zeros_like(x)
    for row, out in zip(x, y, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")
        z = np.abs(row)[order] - tau * SLOPE
        n = len(z)
        fit = [
            min(max(np.mean(z[a : b + 1]) for b in range(i, n)) for a in range(i + 1))
            for i in range(n)
        ]
        phase = row[order] / np.where(row[order] == 0, 1, np.abs(row[order]))
        out[order] = phase * np.maximum(fit, 0)
    return y


def tv_by_bounded_least_squares(x, tau):
    from scipy.optimize import lsq_linear

    D = np.diff(np.eye(x.shape[-1]), axis=0)
    return np.stack(
        [row - D.T @ lsq_linear(D.T, row, (-tau, tau), method="bvls", tol=1e-15).x for row in x]
    )


def affine_by_least_squares(x, tau):
    shift = np.linalg.lstsq(ROWS, ROWS @ x.T - AIM[:, None], rcond=None)[0]
    return x - shift.T


def quadratic_by_solve(x, tau):
    return np.linalg.solve(np.eye(8) + tau * A, (x + tau * B).T).T


def psd(x, tau):
    w, V = np.linalg.eigh((x + x.conj().T) / 2)
    return (V * np.maximum(w, 0)) @ V.conj().T


def nuclear_ball(x, radius):
    U, S, Vh = np.linalg.svd(x, full_matrices=False)
    levels = np.maximum((np.cumsum(S) - radius) / np.arange(1, len(S) + 1), 0)
    return (U * np.maximum(S - np.max(levels), 0)) @ Vh


def weighted_nuclear(x, tau):
    U, S, Vh = np.linalg.svd(x, full_matrices=False)
    return (U * np.maximum(S - tau * np.asarray([0.0, 1.0, 2.0]), 0)) @ Vh


def largest(x, k):
    y = np.zeros_like(x)
    at = np.argsort(-np.abs(x), axis=-1)[:, : int(k)]
    np.put_along_axis(y, at, np.take_along_axis(x, at, -1), -1)
    return y


def constants(xp, *arrays):
    return [to_xp(xp, a) for a in arrays]


# For each: the operator with its options on a namespace, the reference, an input, complex too, and tolerance.
CASES = {
    "squared_l2": (lambda xp: prox.prox_squared_l2, lambda x, tau: x / (1 + tau), Z),
    "quadratic": (
        lambda xp: (
            lambda x, tau: prox.prox_quadratic(x, tau, A=constants(xp, A)[0], b=constants(xp, B)[0])
        ),
        quadratic_by_solve,
        X,
    ),
    "logistic": (lambda xp: prox.prox_logistic, logistic_by_bisection, X),
    "groups": (
        lambda xp: functools.partial(prox.prox_groups, groups=GROUPS, weights=WEIGHTS),
        groups_one_by_one,
        Z,
    ),
    "sparse_group": (
        lambda xp: functools.partial(
            prox.prox_sparse_group, groups=GROUPS, weights=WEIGHTS, l1=0.3
        ),
        lambda x, tau: groups_one_by_one(soft(x, 0.3 * tau), tau),
        Z,
    ),
    "slope": (lambda xp: functools.partial(prox.prox_slope, weights=SLOPE), slope_by_means, Z),
    "psd": (lambda xp: lambda x, tau: prox.project_psd(x), psd, Z[:, :3]),
    "nuclear_ball": (lambda xp: prox.project_nuclear_ball, nuclear_ball, Z),
    "weighted_nuclear": (
        lambda xp: functools.partial(prox.prox_nuclear, weights=[0.0, 1.0, 2.0]),
        weighted_nuclear,
        Z,
    ),
    "l0_ball": (lambda xp: lambda x, k: prox.project_l0_ball(x, int(k)), largest, Z),
    "affine": (
        lambda xp: lambda x, tau: prox.project_affine(x, *constants(xp, ROWS, AIM)),
        affine_by_least_squares,
        X,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_equal_references_of_their_own(xp, name):
    make, reference, x = CASES[name]
    for tau in (0.7, 2.0):
        y = to_numpy(make(xp)(to_xp(xp, x), tau))
        np.testing.assert_allclose(y, reference(x, tau), rtol=0, atol=500 * EPS * 8)
    single = make(xp)(to_xp(xp, x.real.astype("float32")), 1.0)
    if name not in ("quadratic", "affine"):
        assert to_numpy(single).dtype == "float32"


def test_tv_along_one_axis_is_exact_where_values_can_be_looked_at(xp):
    x = np.stack([X[0], np.arange(8.0), np.repeat([0.0, 3.0], 4)])
    y = prox.prox_tv(to_xp(xp, x), 0.6, n_iter=400)
    # The string of double precision; where values are traced, 400 steps.
    np.testing.assert_allclose(to_numpy(y), tv_by_bounded_least_squares(x, 0.6), atol=1e-4)
    exact = prox.prox_tv(x, np.asarray([[0.6], [0.0], [50.0]]))
    np.testing.assert_allclose(exact[:1], tv_by_bounded_least_squares(x[:1], 0.6), atol=1e-12)
    np.testing.assert_array_equal(exact[1], x[1])
    np.testing.assert_allclose(exact[2], 1.5, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_taut_string_equals_bounded_least_squares(seed):
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.standard_normal((2, 60)), axis=1).round(seed % 2)
    for tau in (0.1, 1.0, 7.0):
        np.testing.assert_allclose(
            prox.prox_tv(x, tau), tv_by_bounded_least_squares(x, tau), atol=1e-9
        )


def test_tv_of_an_image_closes_its_duality_gap():
    x = np.kron(RNG.standard_normal((3, 4)), np.ones((5, 6))) + 0.2 * RNG.standard_normal((15, 24))
    for tau in (0.1, 1.0):
        p = prox.prox_tv(x, tau, axis=(0, 1), n_iter=2000)
        # With x - p = D^T u and |u| <= tau, <x - p, p> <= tau TV(p), with equality at the solution alone.
        gap = tau * float(prox.norm_tv(p, axis=(0, 1))) - np.sum((x - p) * p)
        assert -1e-9 <= gap <= 1e-5 * np.sum(x * x)
        assert abs(np.sum(x) - np.sum(p)) <= 1e-9


@pytest.mark.parametrize("name", ["mcp", "scad"])
@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0, 2.9, 5.0])
def test_nonconvex_operators_are_the_best_of_a_grid(xp, name, tau):
    """The penalties written out again; tau on both sides of where the objective turns concave."""

    def mcp(y, lam=1.0, gamma=3.0):
        return np.where(y <= gamma * lam, lam * y - y**2 / (2 * gamma), gamma * lam**2 / 2)

    def scad(y, lam=1.0, gamma=3.7):
        middle = (2 * gamma * lam * y - y**2 - lam**2) / (2 * (gamma - 1))
        flat = lam**2 * (gamma + 1) / 2
        return np.where(y <= lam, lam * y, np.where(y <= gamma * lam, middle, flat))

    value = {"mcp": mcp, "scad": scad}[name]
    x = np.concatenate([np.linspace(-6, 6, 23), [1.0, 3.0, 3.7]])
    y = to_numpy(getattr(prox, f"prox_{name}")(to_xp(xp, x), tau))
    grid = np.linspace(0, 8, 40_001)
    least = np.min(tau * value(grid) + (grid - np.abs(x)[:, None]) ** 2 / 2, axis=1)
    price = tau * value(np.abs(y)) + (y - x) ** 2 / 2
    assert np.all(price <= least + 1e-12)
    assert np.all(x * y >= 0)
    total = getattr(prox, f"norm_{name}")(to_xp(xp, x))
    np.testing.assert_allclose(float(to_numpy(total)), np.sum(value(np.abs(x))), rtol=1e-13)


def test_values_are_those_of_the_definitions(xp):
    x, z = to_xp(xp, X), to_xp(xp, Z)
    by_group = [w * np.linalg.norm(Z[:, g], axis=1) for g, w in zip(GROUPS, WEIGHTS, strict=True)]
    expected = {
        "norm_squared_l2": ({}, np.sum(np.abs(Z) ** 2) / 2),
        "norm_groups": ({"groups": GROUPS, "weights": WEIGHTS}, sum(by_group)),
        "norm_sparse_group": (
            {"groups": GROUPS, "weights": WEIGHTS, "l1": 0.3},
            sum(by_group) + 0.3 * np.sum(np.abs(Z), axis=1),
        ),
        "norm_slope": ({"weights": SLOPE}, np.sort(np.abs(Z), axis=1)[:, ::-1] @ SLOPE),
        "norm_tv": ({}, np.sum(np.abs(np.diff(Z, axis=1)), axis=1)),
        "norm_nuclear": (
            {"weights": [0.0, 1.0, 2.0]},
            np.linalg.svd(Z, compute_uv=False) @ [0.0, 1.0, 2.0],
        ),
    }
    for name, (options, value) in expected.items():
        got = to_numpy(getattr(prox, name)(z, **options))
        np.testing.assert_allclose(got, value, rtol=1e-12)
    logistic = to_numpy(prox.norm_logistic(x))
    np.testing.assert_allclose(logistic, np.sum(np.log1p(np.exp(-X))), rtol=1e-13)
    form = to_numpy(prox.norm_quadratic(x, A=to_xp(xp, A), b=to_xp(xp, B)))
    np.testing.assert_allclose(form, np.einsum("bi,ij,bj->b", X, A, X) / 2 - X @ B, atol=1e-12)


def test_logistic_from_everywhere():
    x = np.concatenate([[0.0], np.logspace(-8, 10, 60), -np.logspace(-8, 10, 60)])
    for tau in np.logspace(-10, 10, 41):
        y = prox.prox_logistic(x, float(tau))
        with np.errstate(over="ignore"):
            off = y - x - tau / (1 + np.exp(y))
        # The slope of the equation is 1 or more; what it consists of is rounded.
        assert np.all(np.abs(off) <= 16 * EPS * (np.abs(x) + np.abs(y) + tau * (1 + np.abs(y))))
    assert np.isnan(prox.prox_logistic(np.asarray([np.nan]), 1.0)[0])


def test_hundreds_of_unequal_groups():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(244), rng.integers(1, 60, 244))
    rng.shuffle(labels)
    x, weights = rng.standard_normal((2, labels.size)), rng.random(244)
    weights[7], weights[9] = np.inf, 0.0
    y = prox.prox_groups(x, 3.0, groups=labels, weights=weights)
    for g in range(244):
        at = labels == g
        norm = np.linalg.norm(x[:, at], axis=1, keepdims=True)
        np.testing.assert_allclose(
            y[:, at], x[:, at] * np.maximum(1 - 3 * weights[g] / norm, 0), atol=1e-14
        )
    lists = [np.flatnonzero(labels == g) for g in range(244)]
    np.testing.assert_array_equal(y, prox.prox_groups(x, 3.0, groups=lists, weights=weights))
    np.testing.assert_array_equal(
        y.T, prox.prox_groups(x.T, 3.0, groups=lists, weights=weights, axis=0)
    )


INFINITE = {
    "l1": prox.prox_l1,
    "nonneg_l1": prox.prox_nonneg_l1,
    "elastic_net": functools.partial(prox.prox_elastic_net, l2=0.0),
    "elastic_net with a square": functools.partial(prox.prox_elastic_net, l2=2.0),
    "l0": prox.prox_l0,
}


# Dask computes when asked, outside of what keeps NumPy from telling of an infinite denominator.
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("name", INFINITE)
def test_an_infinite_weight_keeps_an_entry_at_zero(xp, name):
    x = np.asarray([3.0, -2.0, 0.0, 1e300])
    tau = np.asarray([np.inf, 0.5, np.inf, np.inf])
    y = to_numpy(INFINITE[name](to_xp(xp, x), to_xp(xp, tau)))
    np.testing.assert_array_equal(y[[0, 2, 3]], 0)
    np.testing.assert_array_equal(y[1], INFINITE[name](x[1:2], 0.5)[0])
    np.testing.assert_array_equal(to_numpy(INFINITE[name](to_xp(xp, x), np.inf)), 0)


def test_an_infinite_weight_keeps_a_vector_or_matrix_at_zero(xp):
    x, inf = to_xp(xp, X), np.asarray([[np.inf], [0.5], [np.inf]])
    y = to_numpy(prox.prox_l2(x, to_xp(xp, inf)))
    assert np.all(y[[0, 2]] == 0)
    np.testing.assert_allclose(y[1], prox.prox_l2(X[1], 0.5), atol=1e-15)
    assert np.all(to_numpy(prox.prox_nuclear(x, np.inf)) == 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: prox.prox_l1(x, np.nan), "tau must be finite and 0 or more"),
        (
            lambda x: prox.prox_l1(x, np.full(8, np.nan)),
            "tau must be 0 or more, finite in the dtype of x or infinite, everywhere",
        ),
        (lambda x: prox.prox_linf(x, np.inf), "tau must be finite and 0 or more"),
        (lambda x: prox.prox_mcp(x, 1.0, gamma=1.0), "gamma must be greater than 1, got 1.0"),
        (lambda x: prox.prox_scad(x, 1.0, gamma=2.0), "gamma must be greater than 2, got 2.0"),
        (lambda x: prox.prox_groups(x, 1.0, groups=[0, 1]), "groups must have 8 numbers"),
        (lambda x: prox.prox_groups(x, 1.0, groups=[[0], [0]]), "groups must not overlap"),
        (lambda x: prox.prox_groups(x, 1.0, groups=[[8]]), "groups must have indices of the 8"),
        (lambda x: prox.prox_groups(x, 1.0, groups=[[0]], weights=[1, 2]), "weights must be 1"),
        (lambda x: prox.prox_groups(x, 1.0, groups=[[0]], weights=[-1]), "weights must be 0 or"),
        (lambda x: prox.prox_slope(x, 1.0, weights=[1.0]), "weights must be 8 numbers"),
        (lambda x: prox.prox_slope(x, 1.0, weights=np.arange(8)), "weights must be finite, 0"),
        (lambda x: prox.prox_nuclear(x, 1.0, weights=[3, 2, 1]), "weights must be 0 or more and"),
        (lambda x: prox.project_psd(x), "x must be square in its last two axes"),
        (lambda x: prox.project_affine(x, np.ones((2, 8)), np.ones(2)), "A must have full row"),
        (lambda x: prox.project_affine(x, np.ones((2, 7)), np.ones(2)), "A must have shape"),
        (lambda x: prox.prox_quadratic(x, 1.0, A=np.eye(7)), r"A must have shape \(8, 8\)"),
        (lambda x: prox.separable([prox.prox_l1], [7])(x, 1.0), "sizes must add up to the length"),
        (lambda x: prox.separable([prox.prox_l1], [7, 1]), "sizes must be one for each of 1"),
        (lambda x: prox.envelope(prox.prox_l1, 0.0), "mu must be finite and greater than 0"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(X)


SEVERAL = {
    "linf": prox.prox_linf,
    "l1_ball": prox.project_l1_ball,
    "l2_ball": prox.project_l2_ball,
    "simplex": prox.project_simplex,
    "l0_ball": lambda x, k, axis: prox.project_l0_ball(x, int(k), axis=axis),
}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("axis", [(0, 2), (2, 0), (-1, -2)], ids=str)
def test_a_vector_may_lie_along_several_axes(xp, name, axis):
    x = np.random.default_rng(3).standard_normal((2, 3, 4))
    y = to_numpy(SEVERAL[name](to_xp(xp, x), 2.0, axis=axis))
    axes = [a % 3 for a in axis]
    (batch,) = {0, 1, 2} - set(axes)
    flat = np.moveaxis(x, [batch, *axes], [0, 1, 2]).reshape(x.shape[batch], -1)
    expected = SEVERAL[name](flat, 2.0, axis=-1)
    shape = [x.shape[batch], *(x.shape[a] for a in axes)]
    expected = np.moveaxis(expected.reshape(shape), [0, 1, 2], [batch, *axes])
    np.testing.assert_allclose(y, expected, rtol=0, atol=16 * EPS)


def test_short_calls():
    row = X[1]
    np.testing.assert_array_equal(prox.prox_l2(X, 1.0), prox.prox_l2(X, 1.0, axis=-1))
    np.testing.assert_array_equal(prox.prox_l21(X, 1.0), prox.prox_l21(X, 1.0, axis=-1))
    for project in (prox.project_l1_ball, prox.project_l2_ball, prox.project_simplex):
        np.testing.assert_array_equal(project(row), project(row, 1.0))
    assert prox.soft_threshold is prox.prox_l1


# Calculus: each rule by the definition, as an operator whose objective nothing near lowers.


def lowers_nothing(value, p, x, tau):
    here = tau * value(p) + np.sum((p - x) ** 2) / 2
    rng = np.random.default_rng(0)
    for size in (1.0, 0.1, 1e-3):
        for _ in range(60):
            q = p + size * rng.standard_normal(p.shape)
            assert here <= tau * value(q) + np.sum((q - x) ** 2) / 2 + 1e-12


def test_calculus_by_the_definition():
    x, shift = X[1], X[2]
    l1 = prox.norm_l1
    p = prox.translate(prox.prox_l1, shift)(x, 0.7)
    lowers_nothing(lambda y: l1(y - shift), p, x, 0.7)
    p = prox.scale(prox.prox_l2, 2.0, argument=3.0)(x, 0.2)
    lowers_nothing(lambda y: 2 * prox.norm_l2(3 * y), p, x, 0.2)
    both = prox.separable([prox.prox_l1, prox.prox_squared_l2], [3, 5])
    lowers_nothing(lambda y: l1(y[:3]) + prox.norm_squared_l2(y[3:]), both(x, 0.7), x, 0.7)
    smooth = prox.envelope(prox.prox_l2, 0.5)

    def envelope(y):
        nearest = prox.prox_l2(y, 0.5)
        return prox.norm_l2(nearest) + np.sum((nearest - y) ** 2)

    lowers_nothing(envelope, smooth(x, 0.7), x, 0.7)


def test_conjugates_are_those_that_are_known(xp):
    x = to_xp(xp, X)
    for tau in (0.5, 2.0):
        dual = to_numpy(prox.conjugate(prox.prox_l1)(x, tau))
        np.testing.assert_allclose(dual, np.clip(X, -1, 1), atol=8 * EPS)
        dual = to_numpy(prox.conjugate(prox.prox_l2)(x, tau))
        np.testing.assert_allclose(dual, prox.project_l2_ball(X), atol=8 * EPS)
        dual = to_numpy(prox.conjugate(prox.prox_squared_l2)(x, tau))
        np.testing.assert_allclose(dual, X / (1 + tau), atol=8 * EPS)


# Derivatives where an autodiff of the formulas divides by zero.


def at(kind):
    """A matrix with a vector of zeros in it, of zeros only, with equal singular values, square and not."""
    rng = np.random.default_rng(1)
    Q, P = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (4, 3))
    some = rng.standard_normal((4, 3))
    some[1] = 0
    values = {"equal": [2.0, 2.0, 2.0], "two equal": [3.0, 2.0, 2.0], "rank one": [3.0, 0.0, 0.0]}
    if kind in values:
        return (Q[:, :3] * values[kind]) @ P
    return {"zero": np.zeros((4, 3)), "a zero row": some}[kind]


C = np.random.default_rng(2).standard_normal((4, 3))
SMOOTHED = {
    "norm_l2": lambda x, c: prox.norm_l2(x).sum(),
    "norm_l21": lambda x, c: prox.norm_l21(x),
    "norm_linf": lambda x, c: prox.norm_linf(x).sum(),
    "norm_elastic_net": lambda x, c: prox.norm_elastic_net(x, l2=0.5),
    "norm_nuclear": lambda x, c: prox.norm_nuclear(x),
    "prox_l2": lambda x, c: (c * prox.prox_l2(x, 0.3)).sum(),
    "prox_l2 by nothing": lambda x, c: (c * prox.prox_l2(x, 0.0)).sum(),
    "prox_l21": lambda x, c: (c * prox.prox_l21(x, 0.3)).sum(),
    "project_l2_ball": lambda x, c: (c * prox.project_l2_ball(x, 0.9)).sum(),
    "prox_linf": lambda x, c: (c * prox.prox_linf(x, 0.3)).sum(),
    "prox_groups": lambda x, c: (c * prox.prox_groups(x, 0.3, groups=[[0, 2], [1]])).sum(),
    "prox_nuclear": lambda x, c: (c * prox.prox_nuclear(x, 0.7)).sum(),
    "prox_nuclear, wide": lambda x, c: (c.T * prox.prox_nuclear(x.T, 0.7)).sum(),
    "prox_nuclear by nothing": lambda x, c: (c * prox.prox_nuclear(x, 0.0)).sum(),
}


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("name", SMOOTHED)
def test_gradients_are_those_of_differences_at_zero_and_at_equal_values(library, name):
    module = pytest.importorskip(library)
    function = SMOOTHED[name]
    for kind in ("zero", "a zero row", "equal", "two equal", "rank one"):
        x, h = at(kind), 1e-6
        right = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[i] = h
            right[i] = (function(x + step, C) - function(x - step, C)) / (2 * h)
        if library == "torch":
            leaf = module.tensor(x, requires_grad=True)
            function(leaf, module.tensor(C)).backward()
            gradient = leaf.grad.numpy()
        else:
            gradient = module.grad(function)(module.numpy.asarray(x), module.numpy.asarray(C))
        np.testing.assert_allclose(gradient, right, atol=1e-6, err_msg=kind)


# Forward mode calls torch.jit.script inside torch, which some versions warn about.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_prox_nuclear_passes_gradcheck_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((2, 4, 3)), requires_grad=True)
    z = torch.tensor(rng.standard_normal((4, 3)) + 1j * rng.standard_normal((4, 3)))
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(prox.prox_nuclear, (x, tau), check_forward_ad=True)
    assert check(lambda z: prox.prox_nuclear(z, 0.5), (z.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda x: prox.prox_nuclear(x, 0.5), (x,))


@pytest.mark.parametrize("name", ["l1", "nonneg_l1", "elastic_net", "huber", "squared_l2", "l2"])
def test_sums_of_many_single_numbers_keep_their_digits(xp, name):
    x = np.random.default_rng(0).random((200_000, 2)).astype("float32")
    if "float64" not in str(to_xp(xp, np.zeros(1)).dtype):
        pytest.skip("no double precision")
    options = {"elastic_net": {"l2": 1.0}, "huber": {"delta": 0.3}}.get(name, {})
    norm = getattr(prox, f"norm_{name}")
    right = norm(x.astype(float), axis=0, **options)
    got = to_numpy(norm(to_xp(xp, x), axis=0, **options))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, right, rtol=3e-7)


def test_the_simplex_of_many_single_numbers(xp):
    x = np.random.default_rng(0).random((200_000, 2)).astype("float32")
    if "float64" not in str(to_xp(xp, np.zeros(1)).dtype):
        pytest.skip("no double precision")
    got = to_numpy(prox.project_simplex(to_xp(xp, x), 5e4, axis=0))
    right = prox.project_simplex(x.astype(float), 5e4, axis=0)
    np.testing.assert_allclose(got, right, atol=3e-7)


def test_a_derivative_for_the_step_of_total_variation_is_not_lost():
    """The string has none; ``x`` alone asks for nothing here."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(X[0])
    tau = torch.tensor([0.3], dtype=x.dtype, requires_grad=True)
    prox.prox_tv(x, tau, n_iter=2000).square().sum().backward()
    ahead, behind = (np.sum(prox.prox_tv(X[0], 0.3 + d) ** 2) for d in (1e-4, -1e-4))
    np.testing.assert_allclose(tau.grad.item(), (ahead - behind) / 2e-4, rtol=1e-5)


# Numbers of 0.3 to 3 as options: functions of x and the number, and the name of the option.
NUMBERS = {
    "elastic_net": (lambda x, n: prox.prox_elastic_net(x, 0.7, l2=n), "l2"),
    "norm_elastic_net": (lambda x, n: prox.norm_elastic_net(x, l2=n), "l2"),
    "huber": (lambda x, n: prox.prox_huber(x, 0.7, delta=n), "delta"),
    "norm_huber": (lambda x, n: prox.norm_huber(x, delta=n), "delta"),
    "sparse_group": (lambda x, n: prox.prox_sparse_group(x, 0.7, groups=GROUPS, l1=n), "l1"),
    "norm_sparse_group": (lambda x, n: prox.norm_sparse_group(x, groups=GROUPS, l1=n), "l1"),
    "mcp": (lambda x, n: prox.prox_mcp(x, 0.7, l1=n, gamma=1.5 + n), "l1"),
    "norm_mcp": (lambda x, n: prox.norm_mcp(x, l1=n, gamma=1.5 + n), "l1"),
    "scad": (lambda x, n: prox.prox_scad(x, 0.7, l1=n, gamma=2.5 + n), "l1"),
    "norm_scad": (lambda x, n: prox.norm_scad(x, l1=n, gamma=2.5 + n), "l1"),
    "scale factor": (lambda x, n: prox.scale(prox.prox_l1, n)(x, 0.7), "factor"),
    "scale argument": (lambda x, n: prox.scale(prox.prox_l1, argument=n)(x, 0.7), "argument"),
    "envelope": (lambda x, n: prox.envelope(prox.prox_l1, n)(x, 0.7), "mu"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_be_an_array_without_dimensions(xp, name):
    function, option = NUMBERS[name]
    x = to_xp(xp, X)
    right = to_numpy(function(x, 0.4))
    got = to_numpy(function(x, xp.asarray(0.4, dtype=x.dtype)))
    np.testing.assert_allclose(got, right, rtol=8 * np.finfo(right.dtype).eps, atol=0)
    with pytest.raises(ValueError, match=f"{option} must have no dimensions"):
        function(x, xp.asarray([0.4], dtype=x.dtype))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_negative_is_refused_where_it_can_be_looked_at(name):
    function, option = NUMBERS[name]
    with pytest.raises(ValueError, match=f"{option} must be finite"):
        function(X, np.asarray(-0.4))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_be_learned_and_traced(name):
    torch, function = pytest.importorskip("torch"), NUMBERS[name][0]
    # Away from kinks.
    x = torch.tensor(X[1:], requires_grad=True)
    number = torch.tensor(0.4137, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, number), fast_mode=True)
    (slope,) = torch.autograd.grad(function(x, number).sum(), number)
    assert slope != 0
    narrow = torch.tensor(0.4137, requires_grad=True)
    assert function(x, narrow).dtype == torch.float64
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        value, got = jax.jit(
            jax.value_and_grad(lambda n: function(jax.numpy.asarray(X[1:]), n).sum())
        )(0.4137)
        np.testing.assert_allclose(value, function(x, number).sum().item(), rtol=1e-13)
        np.testing.assert_allclose(got, slope.item(), rtol=1e-12)
