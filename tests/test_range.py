"""Numbers at the ends of their dtype: the answer is right, and nothing warns, where it can be represented."""

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp

MAX = float(np.finfo("float64").max)
EAGER = pytest.mark.eager_only("scaled where values can be looked at")


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def test_balls_of_the_largest_numbers(xp):
    x = np.asarray([MAX, -MAX, MAX, MAX])
    for radius in (1e306, MAX):
        got = slra.prox.project_l1_ball(to_xp(xp, x), radius)
        # The sum of moduli is the radius, up to rounding of the entries.
        np.testing.assert_allclose(to_numpy(got), np.sign(x) * radius / 4, atol=1e-15 * MAX)
    got = slra.prox.project_simplex(to_xp(xp, np.abs(x)), 1.0)
    np.testing.assert_allclose(to_numpy(got), np.full(4, 0.25))


def test_a_radius_larger_than_any_sum(xp):
    x = random(3, 4)
    got = slra.prox.prox_linf(to_xp(xp, x), to_xp(xp, np.full(4, MAX)), axis=0)
    np.testing.assert_array_equal(to_numpy(got), np.zeros((3, 4)))


@EAGER
def test_groups_whose_norm_cannot_be_represented(xp):
    size = MAX / 8  # XLA multiplies by the reciprocal, which may not be denormal
    x = np.full((2, 100), size)
    got = slra.prox.prox_l2(to_xp(xp, x), 5 * size, axis=-1)
    np.testing.assert_allclose(to_numpy(got) / size, np.full((2, 100), 0.5))
    got = slra.prox.project_l2_ball(to_xp(xp, x), 5 * size)
    np.testing.assert_allclose(to_numpy(got) / size, np.full((2, 100), 0.5))


def test_hard_threshold_of_the_largest_price(xp):
    x = np.asarray([1e300, 1.0])
    np.testing.assert_array_equal(to_numpy(slra.prox.prox_l0(to_xp(xp, x), MAX)), [1e300, 0.0])


def test_elastic_net_without_a_square(xp):
    x = to_xp(xp, np.asarray([np.inf, 1.0]))
    assert float(slra.prox.norm_elastic_net(x, l2=0.0)) == np.inf


def test_steps_and_weights_beyond_single_precision():
    x = np.zeros(3, dtype="float32")
    with pytest.raises(ValueError, match="l2 must be from 0 to 3.4e.38 in 32 bits"):
        slra.prox.norm_elastic_net(x, l2=1e300)
    with pytest.raises(ValueError, match="step must be from 1.2e-38 to 3.4e.38 in 32 bits"):
        slra.proximal_gradient(x, lambda x: (0.0, x), slra.prox.prox_l1, step=1e-300)
    found = slra.objective.l1_penalty_prox(x + 1, x, x, 1e30, step=1e300)
    np.testing.assert_array_equal(found, np.zeros((3, 3)))


def test_a_fit_where_one_key_gets_all_the_attention():
    q, k, v = random(3, 2, 4).astype("float32")
    out = slra.low_rank_attention(q, k, v, 1, scale=1000.0)
    assert np.all(np.isfinite(out))


def test_singular_values_of_an_approximation_that_overflow():
    x, u = np.ones((3, 1)), np.full((3, 1), 2.0)
    found = slra.estimate_error(x, (u, np.full(1, MAX), np.zeros((1, 1))), rng=0)
    assert 0 < found.frobenius < 6


@pytest.mark.parametrize("name", ["norm_l1", "norm_nuclear", "norm_l21"])
def test_norms_beyond_the_range_are_infinite_in_silence(name):
    options = {"axis": -1} if name == "norm_l21" else {}
    assert getattr(slra.prox, name)(np.full((3, 4), MAX), **options) == np.inf


@pytest.mark.parametrize("name", ["prox_l1", "prox_huber", "prox_elastic_net", "project_box"])
def test_arrays_of_no_dimensions_stay_arrays(name):
    prox = slra.prox
    call = {
        "prox_l1": lambda x: prox.prox_l1(x, 0.5),
        "prox_huber": lambda x: prox.prox_huber(x, 0.5, delta=1.0),
        "prox_elastic_net": lambda x: prox.prox_elastic_net(x, 0.5, l2=1.0),
        "project_box": lambda x: prox.project_box(x, 0.0, 1.0),
    }[name]
    assert isinstance(call(np.asarray(2.0)), np.ndarray)


def test_solvers_take_arrays_of_no_dimensions():
    def halves(x):
        return 0.5 * float((x - 3) ** 2), x - 3

    def prox(x, step):
        return slra.prox.prox_l1(x, step)

    x = np.asarray(0.0)
    for result in (
        slra.proximal_gradient(x, halves, prox),
        slra.admm(x, lambda v, rho: (3 + rho * v) / (1 + rho), prox),
    ):
        assert isinstance(result.x, np.ndarray)
        np.testing.assert_allclose(result.x, 2.0, atol=1e-5)


@EAGER
@pytest.mark.parametrize("scale", [MAX / 8, 1e-310])
def test_singular_values_at_both_ends(xp, scale):
    a = np.clip(random(4, 3), -1, 1)
    x = to_xp(xp, a * scale)
    if np.max(np.abs(to_numpy(xp.asarray(x) * 1.0))) == 0:
        pytest.skip("denormal numbers are zero here")
    right = np.linalg.svd(to_numpy(x) / scale, compute_uv=False)
    # The spacing of denormal numbers.
    atol = 1e-13 if scale > 1 else 1e-10
    np.testing.assert_allclose(to_numpy(slra.truncated_svd(x).S) / scale, right, atol=atol)
    total = float(slra.prox.norm_nuclear(x))
    np.testing.assert_allclose(total / scale, np.sum(right), atol=atol)
    np.testing.assert_allclose(
        to_numpy(slra.prox.project_rank(x, 3)) / scale, to_numpy(x) / scale, atol=atol
    )
    got = to_numpy(slra.prox.prox_nuclear(x, float(right[2] * scale))) / scale
    shrunk = np.linalg.svd(got, compute_uv=False)
    np.testing.assert_allclose(shrunk, right - right[2], atol=2 * atol)


def test_a_tolerance_where_squares_overflow():
    x = np.diag([3.0, 2.0, 0.01])
    assert slra.truncated_svd(1e200 * x, rtol=0.1).S.shape == (2,)
    assert slra.truncated_svd(1e-200 * x, rtol=0.1).S.shape == (2,)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_only_the_span_of_a_start_counts(scale):
    x, omega = random(120, 110), random(110, 4)
    right = slra.randomized_svd(x, 2, test_matrix=omega).S
    got = slra.randomized_svd(x, 2, test_matrix=scale * omega).S
    np.testing.assert_allclose(got, right, rtol=1e-12)
    start = np.linalg.svd(x)[2][:3]
    got = slra.prox.prox_nuclear(x, 18.0, warm_start=scale * start, rng=0)
    np.testing.assert_allclose(got, slra.prox.prox_nuclear(x, 18.0, rng=0), atol=1e-11)


@pytest.mark.parametrize(
    ("x", "left", "right"),
    [
        (5e-324, 0.1, 0.1),
        (1e300, 0.1, 0.1),
        (0.1, 0.0, MAX),
        (0.1, 1e-300, 1e300),
        (MAX, 0.0, 0.0),
        (5e-324, 0.0, 1e300),
    ],
)
def test_errors_of_approximations_of_another_size(x, left, right):
    found = slra.estimate_error(
        np.full((1, 1), x), (np.full((1, 1), left), np.full((1, 1), right)), rng=0
    )
    error = abs(x - left * right)
    assert 0.2 * error <= found.frobenius / 1.0 <= min(3.0 * error, np.inf)


def test_decompositions_are_as_large_as_what_is_decomposed():
    a = np.outer(np.ones(6), np.arange(5.0))
    a[2, 0] = 7.0
    plain = slra.compress(a, 2, "auto")
    for scale in (2.0**900, 2.0**-900):
        small = slra.compress(scale * a, 2, "auto")
        np.testing.assert_allclose(small.to_dense() / scale, plain.to_dense(), atol=1e-13)
        parts = slra.robust_pca(scale * a, rng=0)
        right = slra.robust_pca(a, rng=0)
        np.testing.assert_allclose(parts.sparse / scale, right.sparse, atol=1e-6)
        found = slra.sparse_low_rank(scale * a, 1, 0.1 * scale)
        expected = slra.sparse_low_rank(a, 1, 0.1)
        np.testing.assert_allclose(found.x / scale, expected.x, atol=1e-6)


def test_a_weight_far_beyond_the_matrix():
    result = slra.sparse_low_rank(np.full((2, 2), 5e-324), 1, 1.0)
    np.testing.assert_array_equal(result.x, np.zeros((2, 2)))
    assert result.converged


@pytest.mark.parametrize("method", ["output", "scores", "svd"])
@pytest.mark.parametrize("scale", [1e-44, 1e30])
def test_bases_of_keys_at_both_ends(method, scale):
    q, k, v = random(3, 2, 6, 4).astype("float32")
    basis = slra.fit_attention(q, (scale * k).astype("float32"), v, 2, method=method)
    for name in ("wq", "wk", "wv", "uv", "c", "mu", "error"):
        assert np.all(np.isfinite(getattr(basis, name))), name
