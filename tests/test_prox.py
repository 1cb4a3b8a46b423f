"""Proximal operators: Moreau's identity, firm non-expansiveness and optimality, against formulas of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import slra
from slra import prox
from tests.backends import to_numpy, to_xp

EPS = {"float32": np.finfo("float32").eps, "float64": np.finfo("float64").eps}
EPS |= {"complex64": EPS["float32"], "complex128": EPS["float64"]}

# The shape of one example: several points at once, so that a compiled backend compiles once for all.
SHAPE = (2, 3, 4)


# What each operator is checked against, written in NumPy without a look at the library.


def resize(x, modulus):
    """Give entries a new modulus and keep their phase."""
    old = np.abs(x)
    return np.where(old == 0, 0, x / np.where(old == 0, 1, old)) * modulus


def resize_vectors(x, norm, axis):
    old = np.sqrt(np.sum(np.abs(x) ** 2, axis=axis, keepdims=True))
    return x / np.where(old == 0, 1, old) * norm(old)


def bisect_level(x, total):
    """Theta with sum(max(x - theta, 0)) == total along the last axis, by bisection."""
    low = np.min(x, axis=-1, keepdims=True) - total
    high = np.max(x, axis=-1, keepdims=True)
    for _ in range(200):
        middle = (low + high) / 2
        too_low = np.sum(np.maximum(x - middle, 0), axis=-1, keepdims=True) > total
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    return (low + high) / 2


def l1_ball(x, radius):
    modulus = np.abs(x)
    inside = np.sum(modulus, axis=-1, keepdims=True) <= radius
    level = np.where(inside, 0, bisect_level(modulus, radius))
    return resize(x, np.maximum(modulus - level, 0))


def spectral_ball(x, radius):
    U, S, Vh = np.linalg.svd(x, full_matrices=False)
    return (U * np.minimum(S, radius)[..., None, :]) @ Vh


def elastic_net_dual(x, tau, l2=0.5):
    """Return tau * prox of f*/tau at x/tau, for f*(y) = max(|y| - 1, 0)^2 / (2 l2)."""
    z, step = np.abs(x) / tau, 1 / (tau * l2)
    return resize(x, tau * np.where(z <= 1, z, (z + step) / (1 + step)))


def huber_dual(x, tau, delta=0.7):
    """For f*(y) = y^2/2 on |y| <= delta."""
    return resize(x, tau * np.minimum(np.abs(x) / tau / (1 + 1 / tau), delta))


@dataclass(frozen=True)
class Operator:
    """A convex operator: itself, its function (None for a projection) and the other half of Moreau's identity."""

    apply: Callable[..., Any]
    value: Callable[..., Any] | None
    dual: Callable[..., Any]
    is_complex: bool = True
    # Axes of one point: the batch is what remains.
    n_axes: int = 1


CONVEX = {
    "l1": Operator(
        lambda x, tau: prox.prox_l1(x, tau),
        lambda x: prox.norm_l1(x, axis=-1),
        lambda x, tau: resize(x, np.minimum(np.abs(x), tau)),
    ),
    "nonneg_l1": Operator(
        lambda x, tau: prox.prox_nonneg_l1(x, tau),
        lambda x: prox.norm_nonneg_l1(x, axis=-1),
        np.minimum,
        is_complex=False,
    ),
    "elastic_net": Operator(
        lambda x, tau: prox.prox_elastic_net(x, tau, l2=0.5),
        lambda x: prox.norm_elastic_net(x, l2=0.5, axis=-1),
        elastic_net_dual,
    ),
    "huber": Operator(
        lambda x, tau: prox.prox_huber(x, tau, delta=0.7),
        lambda x: prox.norm_huber(x, delta=0.7, axis=-1),
        huber_dual,
    ),
    "l2": Operator(
        lambda x, tau: prox.prox_l2(x, tau, axis=-1),
        lambda x: prox.norm_l2(x, axis=-1),
        lambda x, tau: resize_vectors(x, lambda norm: np.minimum(norm, tau), -1),
    ),
    "l21": Operator(
        lambda x, tau: prox.prox_l21(x, tau, axis=-2),
        lambda x: prox.norm_l21(x, axis=-2),
        lambda x, tau: resize_vectors(x, lambda norm: np.minimum(norm, tau), -2),
        n_axes=2,
    ),
    "linf": Operator(
        lambda x, tau: prox.prox_linf(x, tau),
        lambda x: prox.norm_linf(x),
        l1_ball,
    ),
    "nuclear": Operator(
        lambda x, tau: prox.prox_nuclear(x, tau),
        lambda x: prox.norm_nuclear(x),
        spectral_ball,
        n_axes=2,
    ),
    "l1_ball": Operator(
        lambda x, tau: prox.project_l1_ball(x, tau), None, lambda x, tau: x - l1_ball(x, tau)
    ),
    "l2_ball": Operator(
        lambda x, tau: prox.project_l2_ball(x, tau),
        None,
        lambda x, tau: resize_vectors(x, lambda norm: np.maximum(norm - tau, 0), -1),
    ),
    "simplex": Operator(
        lambda x, tau: prox.project_simplex(x, tau),
        None,
        lambda x, tau: np.minimum(x, bisect_level(x, tau)),
        is_complex=False,
    ),
    "box": Operator(
        lambda x, tau: prox.project_box(x, -0.5, tau),
        None,
        lambda x, tau: np.where(x > tau, x - tau, np.where(x < -0.5, x + 0.5, 0)),
        is_complex=False,
    ),
}
CASES = [
    pytest.param(operator, dtype, id=f"{name}-{dtype}")
    for name, operator in CONVEX.items()
    for dtype in ("float32", "complex128" if operator.is_complex else "float64")
]


def points(dtype):
    """Arrays with zeros, ties and a few orders of magnitude in them."""
    real = np.empty(0, dtype).real.dtype
    entries = st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 2.0]),
        st.floats(-100, 100, width=real.itemsize * 8, allow_subnormal=False),
    )
    drawn = arrays(real, SHAPE, elements=entries)
    if real == dtype:
        return drawn
    return st.builds(lambda re, im: (re + 1j * im).astype(dtype), drawn, drawn)


def for_examples(request, *strategies):
    """Run a function on examples: many where a call is cheap, few where each is compiled or scheduled."""
    is_slow = request.node.callspec.params["xp"] in ("jax", "jax-jit", "dask")
    profile = settings(
        max_examples=3 if is_slow else 12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda body: profile(given(*strategies)(body))()


TAUS = st.sampled_from([0.125, 1.0, 2.5, 40.0])


def tolerance(dtype, *xs):
    """Rounding of sums of this many numbers of this size, with the spectral factorisation in mind."""
    return 60 * EPS[dtype] * max([1.0, *(float(np.max(np.abs(x))) for x in xs)])


def norms_and_inner(x, y, n_axes):
    """Squared norm of x, real inner product of x and y, and norm of y, for each point of a batch."""
    axes = tuple(range(-n_axes, 0))
    x, y = x.astype("complex128"), y.astype("complex128")
    square, inner, other = (
        np.sum((np.conj(a) * b).real, axes) for a, b in ((x, x), (x, y), (y, y))
    )
    return square, inner, np.sqrt(other)


@pytest.mark.parametrize(("operator", "dtype"), CASES)
def test_the_three_properties_of_a_proximal_operator(xp, request, operator, dtype):
    """Check Moreau's identity, firm non-expansiveness, and that x - p is in tau times the subdifferential at p."""

    @for_examples(request, points(dtype), points(dtype), TAUS)
    def check(x, y, tau):
        both = np.concatenate([x, y])
        result = operator.apply(to_xp(xp, both), tau)
        p, q = np.split(to_numpy(result), 2)
        assert p.dtype == dtype
        wide = both.astype(np.result_type(both, "float64"))
        moreau = to_numpy(result) + operator.dual(wide, tau)
        np.testing.assert_allclose(moreau, both, rtol=0, atol=tolerance(dtype, both))

        tol = tolerance(dtype, both)
        square, inner, apart = norms_and_inner(p - q, x - y, operator.n_axes)
        assert np.all(square <= inner + tol * (apart + tol))

        # tau f(q) >= tau f(p) + <x - p, q - p>: the rounding of p and f(p) is what may be missing.
        gain = np.zeros(1)
        if operator.value is not None:
            f_p, f_q = np.split(to_numpy(operator.value(result)).astype("float64"), 2)
            gain = tau * (f_q - f_p)
            tol = tol * (1 + tau) + 60 * EPS[dtype] * tau * (f_p + f_q)
        _, inner, apart = norms_and_inner(x - p, q - p, operator.n_axes)
        assert np.all(gain - inner >= -tol * (1 + tau + apart))


@pytest.mark.parametrize(("operator", "dtype"), CASES)
def test_tau_may_be_an_array(xp, operator, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE).astype(dtype)
    if np.iscomplexobj(x):
        x = x + 1j * rng.standard_normal(SHAPE)
    tau = np.asarray([0.1, 1.5]).reshape(2, 1, 1)
    result = to_numpy(operator.apply(to_xp(xp, x), to_xp(xp, tau)))
    assert result.dtype == dtype
    one_by_one = [operator.apply(row, float(t)) for row, t in zip(x, tau.ravel(), strict=True)]
    np.testing.assert_allclose(result, np.stack(one_by_one), atol=tolerance(dtype, x))


def test_price_of_an_entry_may_be_an_array(xp):
    x = np.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    y = prox.prox_l0(to_xp(xp, x), to_xp(xp, np.asarray([[0.5], [2.0]])))
    # At |x| = sqrt(2 tau) both are right; this one is zero.
    np.testing.assert_array_equal(to_numpy(y), [[0, 2, 3], [0, 0, 3]])


def test_threshold_may_be_an_array_without_axes(xp):
    x = np.diag([3.0, 2.0, 1.0])
    y = to_numpy(prox.prox_nuclear(to_xp(xp, x), to_xp(xp, np.asarray(1.5))))
    np.testing.assert_allclose(y, np.diag([1.5, 0.5, 0]), atol=8 * EPS["float64"])


@pytest.mark.parametrize("name", list(CONVEX))
def test_half_precision_is_computed_in_single(xp, name):
    if not hasattr(xp, "float16"):
        pytest.skip("no float16 here")
    x = np.random.default_rng(0).standard_normal(SHAPE).astype("float16")
    result = CONVEX[name].apply(to_xp(xp, x), 0.5)
    assert result.dtype == xp.float16
    exact = CONVEX[name].apply(x.astype("float64"), 0.5)
    np.testing.assert_allclose(to_numpy(result), exact, atol=2e-3)
    if CONVEX[name].value is not None:
        assert CONVEX[name].value(to_xp(xp, x)).dtype == xp.float32


@pytest.mark.eager_only("one shape a call")
def test_half_precision_where_nothing_is_convex(xp):
    if not hasattr(xp, "float16"):
        pytest.skip("no float16 here")
    x = np.random.default_rng(0).standard_normal(SHAPE).astype("float16")
    wide = x.astype("float64")
    rank_1 = prox.project_rank(to_xp(xp, x), 1)
    assert rank_1.dtype == xp.float16
    np.testing.assert_allclose(to_numpy(rank_1), prox.project_rank(wide, 1), atol=2e-3)
    kept = prox.prox_l0(to_xp(xp, x), 0.5)
    assert kept.dtype == xp.float16
    np.testing.assert_array_equal(to_numpy(kept), np.where(np.abs(x) > 1, x, 0))
    factors = prox.prox_nuclear(to_xp(xp, x), 0.5, return_factors=True)
    assert all(factor.dtype == xp.float16 for factor in factors)


# Operators of vectors, and what makes a scalar of one.
ALONG_AN_AXIS = {
    "linf": lambda x, tau, axis: prox.prox_linf(x, tau, axis=axis),
    "norm_linf": lambda x, tau, axis: prox.norm_linf(x, axis=axis),
    "l1_ball": lambda x, tau, axis: prox.project_l1_ball(x, tau, axis=axis),
    "l2_ball": lambda x, tau, axis: prox.project_l2_ball(x, tau, axis=axis),
    "simplex": lambda x, tau, axis: prox.project_simplex(x, tau, axis=axis),
}


@pytest.mark.parametrize("axis", [0, -2])
@pytest.mark.parametrize("name", ALONG_AN_AXIS)
def test_vectors_along_any_axis(xp, name, axis):
    apply = ALONG_AN_AXIS[name]
    x = np.random.default_rng(0).standard_normal(SHAPE)
    result = to_numpy(apply(to_xp(xp, x), 0.75, axis))
    last = apply(np.moveaxis(x, axis, -1), 0.75, -1)
    expected = np.moveaxis(last, -1, axis) if last.ndim == x.ndim else last
    np.testing.assert_allclose(result, expected, rtol=0, atol=16 * EPS["float64"])


@pytest.mark.parametrize("name", list(CONVEX))
def test_result_stays_on_the_device_of_the_input(xp, device, name):
    x = xp.asarray(np.random.default_rng(0).standard_normal(SHAPE), device=device)
    assert CONVEX[name].apply(x, 0.5).device == x.device


@pytest.mark.parametrize("shape", [SHAPE, (120, 110)], ids=str)
def test_nan_fills_the_result_of_what_is_spectral(xp, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    x.reshape(-1, *shape[-2:])[0, 1, 2] = np.nan
    for y in (prox.prox_nuclear(to_xp(xp, x), 0.5, rng=0), prox.project_rank(to_xp(xp, x), 1)):
        is_bad = np.isnan(to_numpy(y)).reshape(-1, *shape[-2:])
        assert np.all(is_bad[0])
        assert not np.any(is_bad[1:])


@pytest.mark.parametrize("name", sorted(set(CONVEX) - {"box"}))
def test_nan_propagates(xp, name):
    x = np.random.default_rng(0).standard_normal(SHAPE)
    x[0, 1, 2] = np.nan
    y = to_numpy(CONVEX[name].apply(to_xp(xp, x), 0.5))
    assert np.isnan(y[0, 1, 2])
    assert np.all(np.isfinite(y[1:]))


# Those that are not convex: the best of all candidates.


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_prox_l0_takes_the_better_of_zero_and_x(xp, request, dtype):
    @for_examples(request, points(dtype), TAUS)
    def check(x, tau):
        y = to_numpy(prox.prox_l0(to_xp(xp, x), tau))
        assert np.all((y == x) | (y == 0))
        price = tau * (y != 0) + np.abs(x - y).astype("float64") ** 2 / 2
        best = np.minimum(tau * (x != 0), np.abs(x).astype("float64") ** 2 / 2)
        np.testing.assert_allclose(price, best, rtol=8 * EPS[dtype])
        count = to_numpy(prox.norm_l0(to_xp(xp, y), axis=-1))
        np.testing.assert_array_equal(count, np.count_nonzero(y, axis=-1))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_project_rank_is_nearest(xp, request, dtype, rank):
    @for_examples(request, points(dtype))
    def check(x):
        y = to_numpy(prox.project_rank(to_xp(xp, x), rank))
        assert y.dtype == dtype
        tail = np.linalg.svd(x.astype("complex128"), compute_uv=False)[..., rank:]
        error = np.linalg.norm(x - y, axis=(-2, -1))
        tol = tolerance(dtype, x) * 4
        np.testing.assert_allclose(error, np.linalg.norm(tail, axis=-1), atol=tol)
        assert np.all(np.linalg.svd(y, compute_uv=False)[..., rank:] <= tol)


# Edges.


def test_soft_threshold_equals_the_textbook_form_and_has_no_signed_zeros(xp):
    x = np.random.default_rng(0).standard_normal((3, 200_000)).astype("float32")
    x[0, :3] = 0.0, -0.0, 1.0
    y = to_numpy(slra.soft_threshold(to_xp(xp, x), 1.0))
    np.testing.assert_array_equal(y, np.sign(x) * np.maximum(np.abs(x) - np.float32(1), 0))
    assert not np.any(np.signbit(y[y == 0]))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x,
        np.transpose,
        lambda x: x[::2],
        lambda x: x[:, ::-1],
        lambda x: x[:0],
        lambda x: x[0, 0],
    ],
    ids=["c", "transposed", "strided", "reversed", "empty", "scalar"],
)
def test_blocked_soft_threshold_equals_the_reference(arrange):
    from array_api_compat import numpy as xp

    from slra._backends import Backend, backend_of

    x = np.asarray(arrange(np.random.default_rng(0).standard_normal((300, 1000))))
    for tau in (0.5, np.full(x.shape, 0.5)):
        result = backend_of(xp).soft_threshold(x, tau)
        assert result.shape == x.shape
        np.testing.assert_array_equal(result, Backend(xp).soft_threshold(x, tau))


def test_torch_soft_threshold_equals_the_reference():
    torch = pytest.importorskip("torch")
    from array_api_compat import torch as xp

    from slra._backends import Backend, backend_of

    x = torch.randn((50, 40), generator=torch.Generator().manual_seed(0))
    for tau in (0.5, torch.full((40,), 0.5)):
        assert torch.equal(
            backend_of(xp).soft_threshold(x, tau), Backend(xp).soft_threshold(x, tau)
        )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_underflow(xp, scale):
    x = (np.random.default_rng(0).standard_normal((3, 5)) * scale).astype("float32")
    norm = np.linalg.norm(x.astype("float64"), axis=-1, keepdims=True)
    rtol = 8 * EPS["float32"]
    np.testing.assert_allclose(to_numpy(prox.norm_l2(to_xp(xp, x), axis=-1)), norm[:, 0], rtol=rtol)
    y = to_numpy(prox.prox_l2(to_xp(xp, x), 0.5 * scale, axis=-1))
    np.testing.assert_allclose(y, x * np.maximum(1 - 0.5 * scale / norm, 0), rtol=4 * rtol)


def test_long_single_precision_vectors_meet_the_simplex(xp):
    x = np.random.default_rng(0).standard_normal(100_000).astype("float32") + 50
    y = to_numpy(prox.project_simplex(to_xp(xp, x), 1e6)).astype("float64")
    # Each of the 1e5 entries, of size about 50, is rounded on its own.
    assert abs(np.sum(y) - 1e6) <= 1e5 * 60 * EPS["float32"]
    assert np.all(y >= 0)


@pytest.mark.parametrize("name", ["project_simplex", "project_l1_ball"])
def test_sum_is_right_to_the_rounding_of_the_level(xp, name):
    """The running sum of the entries is off by more, and the level must not come out above all of them."""
    # Two values in one row, of which the larger is kept; seven; one. No entry is near the level.
    index = np.arange(100_000)
    x = np.stack([50.1 + index % 2, 10.1 + index % 7, 0.1 + 0 * index]).astype("float32")
    radius = np.asarray([[2e4], [1.0], [1.0]], "float32")
    y = to_numpy(getattr(prox, name)(to_xp(xp, x), to_xp(xp, radius))).astype("float64")
    n_above = np.count_nonzero(y, axis=-1)
    assert n_above.tolist() == [50_000, 14_285, 100_000]
    error = np.abs(np.sum(y, axis=-1) - radius[:, 0])
    # The level, and the sum of what exceeds it, are rounded to a few units in the last place.
    assert np.all(error <= 4 * EPS["float32"] * (n_above * np.max(x, axis=-1) + radius[:, 0]))


def test_simplex_sum_does_not_depend_on_where_the_entries_lie():
    # Two of three entries of the first row are kept, at two heights; a running sum of them drifts.
    index = np.arange(100_000)
    x = np.stack([50.1 + (index % 3 > 0) + 0.3 * (index % 3 > 1), 10.1 + index % 7])
    x, radius = x.astype("float32"), np.asarray([[2e4], [1.0]], "float32")
    y = prox.project_simplex(x, radius).astype("float64")
    n_above = np.count_nonzero(y, axis=-1)
    assert n_above.tolist() == [66_666, 14_285]
    # Heights above the level, and their sum, are rounded to a few units in the last place.
    allowed = 4 * EPS["float32"] * (n_above * np.max(y, axis=-1) + radius[:, 0])
    assert np.all(np.abs(np.sum(y, axis=-1) - radius[:, 0]) <= allowed)


def test_functions_at_the_edge_of_their_domain():
    x = np.asarray([0.0, 0.5, 2.0])
    assert prox.norm_nonneg_l1(x) == 2.5
    assert prox.norm_nonneg_l1(-x) == np.inf
    assert prox.norm_elastic_net(x, l2=0) == 2.5
    np.testing.assert_array_equal(prox.prox_elastic_net(x, 1.0, l2=0), [0, 0, 1])
    # A vector on the sphere, and one at the level itself.
    np.testing.assert_array_equal(prox.project_l2_ball(np.asarray([3.0, 4.0]), 5.0), [3, 4])
    np.testing.assert_array_equal(prox.project_box(x, 0.5, 0.5), [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(prox.project_box(x, np.zeros(3), np.asarray(1.0)), [0, 0.5, 1])


@pytest.mark.parametrize("tau", [0.0, 1e-3])
def test_points_inside_stay_as_they_are(xp, tau):
    x = np.asarray([[0.0, 0.25, -0.5], [0.0, 0.0, 0.0]])
    for name in ("project_l1_ball", "project_l2_ball"):
        np.testing.assert_array_equal(to_numpy(getattr(prox, name)(to_xp(xp, x), 1.0)), x)
    for name in ("prox_linf", "prox_l1"):
        y = to_numpy(getattr(prox, name)(to_xp(xp, x), tau))
        assert np.max(np.abs(y - x)) <= tau + 2 * EPS["float64"]
        assert np.all(y[1] == 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: prox.prox_l1(x, -1.0), ValueError, "tau must be finite and 0 or more"),
        (
            lambda x: prox.prox_l1(x, np.ones(3)),
            ValueError,
            r"tau must broadcast to x, whose shape is \(2, 5\), got \(3,\)",
        ),
        (lambda x: prox.prox_l1(x, "1"), TypeError, "tau must be a real number"),
        (lambda x: prox.prox_l1(x, x + 0j), TypeError, "tau must have a real floating dtype"),
        (
            lambda x: prox.prox_l2(x, x[:1], axis=-1),
            ValueError,
            r"tau must broadcast to x.*to \(2, 1\), got \(1, 5\)",
        ),
        (lambda x: prox.prox_l2(x, 1.0, axis=2), ValueError, "axis must be among the 2 axes of x"),
        (lambda x: prox.prox_l2(x, 1.0, axis=(0, -2)), ValueError, "axis must name different axes"),
        (lambda x: prox.prox_l2(x, 1.0, axis=0.0), TypeError, "axis must be an int"),
        (lambda x: prox.prox_l2(x[:, :0], 1.0, axis=1), ValueError, "x must not be empty along"),
        (lambda x: prox.prox_l21(x[None], 1.0, axis=0), ValueError, r"axis must be -1 \(groups"),
        (
            lambda x: prox.prox_nonneg_l1(x + 0j, 1.0),
            TypeError,
            "x must have a real floating dtype",
        ),
        (lambda x: prox.project_simplex(x + 0j, 1.0), TypeError, "x must have a real floating"),
        (lambda x: prox.project_box(x, 1.0, 0.0), ValueError, "lo must be at most hi"),
        (lambda x: prox.project_box(x, x, x[:, ::-1]), ValueError, "lo must be at most hi"),
        (
            lambda x: prox.prox_huber(x, 1.0, delta=0.0),
            ValueError,
            "delta must be finite and greater",
        ),
        (lambda x: prox.prox_elastic_net(x, 1.0, l2=-1.0), ValueError, "l2 must be finite and 0"),
        (lambda x: prox.project_rank(x, 3), ValueError, "rank must be between 1 and 2"),
        (lambda x: prox.prox_nuclear(x[0], 1.0), ValueError, "x must have at least 2 dimensions"),
        (
            lambda x: prox.prox_nuclear(x, 1.0, warm_start=x[:, :2]),
            ValueError,
            "warm_start must have",
        ),
        (lambda x: prox.prox_l1([1.0], 1.0), TypeError, "x must be an array"),
        (lambda x: prox.norm_huber(x, delta=0.0), ValueError, "delta must be finite and greater"),
        (lambda x: prox.norm_elastic_net(x, l2=-1.0), ValueError, "l2 must be finite and 0"),
        (lambda x: prox.norm_nonneg_l1(x + 0j), TypeError, "x must have a real floating dtype"),
        (lambda x: prox.project_box(x + 0j, 0.0, 1.0), TypeError, "x must have a real floating"),
        (lambda x: prox.project_box(x, "0", 1.0), TypeError, "lo must be a real number"),
        (lambda x: prox.project_box(x, 0.0, None), TypeError, "hi must be a real number"),
        (
            lambda x: prox.project_box(x, 1.0, 0.0),
            ValueError,
            "lo must be at most hi everywhere, and neither may be NaN$",
        ),
        (lambda x: prox.project_box(x, np.nan, 1.0), ValueError, "lo must be at most hi"),
        (lambda x: prox.norm_l21(x[0], axis=0), ValueError, "x must have at least 2 dimensions"),
        (lambda x: prox.norm_nuclear(x[0]), ValueError, "x must have at least 2 dimensions"),
        (lambda x: prox.project_rank(x[0], 1), ValueError, "x must have at least 2 dimensions"),
        (
            lambda x: prox.project_rank(x, 0),
            ValueError,
            r"rank must be between 1 and 2 \(min of the last two axes of x\), got 0",
        ),
        (
            lambda x: prox.prox_nuclear(x, 1.0, warm_start=x[:, :2]),
            ValueError,
            r"warm_start must have shape \(k, 5\) for x of shape \(2, 5\), got \(2, 2\)",
        ),
        (
            lambda x: prox.prox_nuclear(x, 1.0, warm_start=[[1.0]]),
            TypeError,
            "warm_start must be an array",
        ),
        (lambda x: prox.prox_nuclear(x, 1.0, rng="0"), TypeError, "rng must be an int"),
        (lambda x: prox.prox_linf(x, -1.0), ValueError, "tau must be finite and 0 or more"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    x = np.random.default_rng(0).standard_normal((2, 5))
    with pytest.raises(error, match=f"^{message}"):
        call(x)


@pytest.mark.parametrize(
    ("call", "name", "alone"),
    [
        (lambda x, tau: prox.prox_l2(x, tau, axis=-1), "tau", (2, 1)),
        (lambda x, tau: prox.prox_l21(x, tau, axis=-2), "tau", (1, 5)),
        (lambda x, tau: prox.prox_linf(x, tau), "tau", (2, 1)),
        (lambda x, tau: prox.prox_nuclear(x, tau), "tau", (1, 1)),
        (lambda x, tau: prox.project_l1_ball(x, tau), "radius", (2, 1)),
        (lambda x, tau: prox.project_l2_ball(x, tau), "radius", (2, 1)),
        (lambda x, tau: prox.project_simplex(x, tau), "radius", (2, 1)),
    ],
)
def test_one_threshold_for_each_vector_or_matrix(call, name, alone):
    x = np.random.default_rng(0).standard_normal((2, 5))
    assert call(x, np.ones(alone)).shape == x.shape
    for shape in {(2, 1), (1, 5), (2, 5)} - {alone}:
        with pytest.raises(ValueError, match=f"^{name} must broadcast to x"):
            call(x, np.ones(shape))
    with pytest.raises(ValueError, match=f"^{name} must be finite and 0 or more"):
        call(x, -1.0)


# prox_nuclear where it is partial.


def low_rank_plus_noise(m, n, rank, noise, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)

    def gaussian(*shape):
        g = rng.standard_normal(shape)
        return g + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else g

    x = gaussian(m, rank) @ gaussian(rank, n) + noise * gaussian(m, n)
    return x.astype(dtype)


def full_prox(x, tau):
    U, S, Vh = np.linalg.svd(x.astype("complex128"), full_matrices=False)
    return (U * np.maximum(S - tau, 0)) @ Vh


@pytest.mark.parametrize(
    ("rank", "noise", "tau", "dtype"),
    [
        pytest.param(10, 0.01, 30.0, "float32", id="few-float32"),
        pytest.param(10, 0.01, 30.0, "complex128", id="few-complex128"),
        pytest.param(10, 0.01, 0.0, "float64", id="all"),
        pytest.param(30, 0.01, 20.0, "float64", id="grows"),
        pytest.param(3, 1.0, 17.0, "float64", id="inside-the-noise"),
        pytest.param(10, 0.01, 1e6, "float64", id="none"),
        pytest.param(10, 0.0, 1e-3, "float32", id="exact"),
    ],
)
def test_prox_nuclear_equals_the_full_one(xp, rank, noise, tau, dtype):
    x = low_rank_plus_noise(160, 140, rank, noise, dtype)
    y = to_numpy(prox.prox_nuclear(to_xp(xp, x), tau, rng=0))
    # Backward error of the residual check, and of the SVD it is compared with.
    tol = 20 * EPS[dtype] * np.sqrt(160) * np.linalg.norm(x, 2)
    assert np.linalg.norm(y - full_prox(x, tau)) <= tol


def test_prox_nuclear_starts_warm(xp):
    x = low_rank_plus_noise(160, 140, 10, 0.01)
    first = prox.prox_nuclear(to_xp(xp, x), 30.0, return_factors=True, rng=0)
    moved = x + 0.01 * low_rank_plus_noise(160, 140, 2, 0.0, seed=1)
    for start in (first.Vh, to_xp(xp, np.zeros((1, 140))), to_xp(xp, np.eye(140)[:90])):
        y = to_numpy(prox.prox_nuclear(to_xp(xp, moved), 30.0, warm_start=start, rng=1))
        assert np.linalg.norm(y - full_prox(moved, 30.0)) <= 1e-13 * np.linalg.norm(moved)


def test_a_batch_takes_a_warm_start_and_ignores_it():
    x = np.random.default_rng(0).standard_normal((2, 9, 6))
    y = prox.prox_nuclear(x, 1.0, warm_start=np.eye(6)[:2])
    np.testing.assert_array_equal(y, prox.prox_nuclear(x, 1.0))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_prox_nuclear_at_extreme_scales(xp, scale):
    # In single precision the squares of both are out of range.
    x = low_rank_plus_noise(160, 140, 10, 0.01, "float32") * np.float32(scale)
    y = to_numpy(prox.prox_nuclear(to_xp(xp, x), 30.0 * scale, rng=0))
    tol = 20 * EPS["float32"] * np.sqrt(160) * np.linalg.norm(x.astype("float64"), 2)
    assert np.linalg.norm(y.astype("float64") - full_prox(x, 30.0 * scale)) <= tol


@pytest.mark.parametrize("shape", [(160, 140), (9, 6), (2, 9, 6)], ids=str)
def test_factors_of_prox_nuclear(xp, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    x[..., 0] += 40
    U, S, Vh = map(to_numpy, prox.prox_nuclear(to_xp(xp, x), 20.0, return_factors=True, rng=0))
    whole = to_numpy(prox.prox_nuclear(to_xp(xp, x), 20.0, rng=0))
    np.testing.assert_allclose((U * S[..., None, :]) @ Vh, whole, atol=1e-12)
    assert np.max(np.abs(np.conj(U).swapaxes(-1, -2) @ U - np.eye(S.shape[-1]))) <= 1e-13


def test_a_partial_svd_is_what_prox_nuclear_takes(monkeypatch):
    """The short cut is taken where it should be, and left where the spectrum is flat at tau."""
    from slra.prox import nuclear

    def refuse(x, backend):
        raise AssertionError("full SVD")

    monkeypatch.setattr(nuclear, "masked_svd", refuse)
    prox.prox_nuclear(low_rank_plus_noise(160, 140, 10, 0.01), 30.0, rng=0)
    with pytest.raises(AssertionError, match="full SVD"):
        prox.prox_nuclear(low_rank_plus_noise(160, 140, 3, 1.0), 17.0, rng=0)
    prox.prox_nuclear(np.zeros((160, 140)), 1.0, rng=0)


@pytest.mark.parametrize("rank", [10, 25])
def test_a_partial_svd_is_reproducible(rank):
    x = low_rank_plus_noise(160, 140, rank, 1e-4)
    first, again, other = (prox.prox_nuclear(x, 20.0, rng=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def blocks(monkeypatch, x, tau, **options):
    """Widths of the blocks that the iteration multiplies by x, in turn."""
    from slra.prox import nuclear

    widths = []

    def count(image, backend):
        widths.append(image.shape[-1])
        return orthonormal(image, backend)

    orthonormal = nuclear.orthonormal
    with monkeypatch.context() as patch:
        patch.setattr(nuclear, "orthonormal", count)
        result = prox.prox_nuclear(x, tau, return_factors=True, rng=0, **options)
    return widths, result


def test_what_a_partial_svd_costs(monkeypatch):
    """From a warm start few columns and few iterations; without hope, no more than a full SVD."""
    x = low_rank_plus_noise(160, 140, 10, 0.01)
    cold, first = blocks(monkeypatch, x, 30.0)
    assert set(cold) == {16}
    warm, _ = blocks(monkeypatch, x, 30.0, warm_start=first.Vh)
    assert set(warm) == {18}
    assert len(warm) < len(cold)
    none_yet, _ = blocks(monkeypatch, x, 30.0, warm_start=first.Vh[:0])
    assert none_yet == cold
    # Wider while the smallest Ritz value is wanted, up to a quarter of the matrix.
    wider, _ = blocks(monkeypatch, low_rank_plus_noise(160, 140, 30, 0.01), 20.0)
    assert wider[:2] == [16, 32]
    assert max(wider) <= 35
    everything, _ = blocks(monkeypatch, x, 0.0)
    assert everything == [16, 32]
    hopeless, _ = blocks(monkeypatch, low_rank_plus_noise(160, 140, 3, 1.0), 17.0)
    assert 140 - 16 <= sum(hopeless) <= 140 + 16


@pytest.mark.parametrize(
    ("errors", "is_found"),
    [
        ((0.0, 0.0, 0.0), True),
        # Of the kept triplets, relative to the largest value, together: 0.00075, 0.0055 and 0.0011 for 0.001 allowed.
        ((0.0015, 0.0, 0.0), True),
        ((0.011, 0.0, 0.0), False),
        ((0.0016, 0.0016, 0.0), False),
        # Of the other, whose value of 0.9 may be off by as much and must stay below 1.
        ((0.0, 0.0, 0.04), True),
        ((0.0, 0.0, 0.16), False),
    ],
)
def test_what_ends_the_iteration(errors, is_found):
    from array_api_compat import numpy as xp

    from slra._backends import backend_of
    from slra.prox.nuclear import _is_found
    from slra.svd import SVDResult

    U, S = np.eye(6)[:, :3], np.asarray([2.0, 1.5, 0.9])
    image = U * S
    image[3:] = np.diag(errors)
    found = SVDResult(U, S, np.eye(3))
    assert _is_found(image, found, 1.0, 1e-3, backend_of(xp)) == is_found
