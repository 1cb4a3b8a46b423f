"""Singular value decompositions against LAPACK in double precision."""

import itertools
import re

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp

EPS = {"float32": np.finfo("float32").eps, "float64": np.finfo("float64").eps}
EPS |= {"complex64": EPS["float32"], "complex128": EPS["float64"]}


def with_spectrum(sigma, m, n, dtype, batch=(), seed=0):
    """Return matrices with the given singular values and random singular vectors."""
    rng = np.random.default_rng(seed)

    def orthonormal(rows):
        g = rng.standard_normal((*batch, rows, len(sigma)))
        if np.issubdtype(dtype, np.complexfloating):
            g = g + 1j * rng.standard_normal(g.shape)
        return np.linalg.qr(g)[0]

    return ((orthonormal(m) * sigma) @ np.conj(orthonormal(n)).swapaxes(-1, -2)).astype(dtype)


def relative_gap(sigma, rank):
    """Smallest gap between the first ``rank`` singular values and their neighbours, over sigma_1."""
    return np.min(-np.diff(sigma[: rank + 1])) / sigma[0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (2, 3, 40, 30)], ids=str)
def test_randomized_svd_is_near_optimal(xp, shape, dtype):
    sigma = 0.5 ** np.arange(30)
    a = with_spectrum(sigma, *shape[-2:], dtype, shape[:-2])
    U, S, Vh = map(to_numpy, slra.randomized_svd(to_xp(xp, a), 5, rng=0))
    assert U.dtype == Vh.dtype == a.dtype
    assert S.dtype == a.real.dtype
    assert U.shape == (*shape[:-1], 5)
    error = np.linalg.norm(a - (U * S[..., None, :]) @ Vh, axis=(-2, -1))
    best = np.linalg.norm(sigma[5:])
    assert np.all(error <= 1.01 * best + 100 * EPS[dtype] * np.linalg.norm(sigma))
    # The spectrum is known exactly up to the rounding of the input, which is eps * sigma_1.
    np.testing.assert_allclose(S, np.broadcast_to(sigma[:5], S.shape), atol=20 * EPS[dtype])
    eye = np.eye(5)
    for Q in (U, np.conj(Vh).swapaxes(-1, -2)):
        gram = np.conj(Q).swapaxes(-1, -2) @ Q
        assert np.max(np.abs(gram - eye)) <= 50 * EPS[dtype] * np.sqrt(5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("function", ["randomized_svd", "truncated_svd"])
def test_same_factors_on_every_backend(xp, function, dtype):
    sigma = 1 / np.arange(1.0, 31)
    a = with_spectrum(sigma, 50, 30, dtype)
    options = {"rng": 7} if function == "randomized_svd" else {}
    result = getattr(slra, function)(to_xp(xp, a), 4, **options)
    reference = getattr(slra, function)(a, 4, **options)
    U, S, Vh = map(to_numpy, result)
    tol = 100 * EPS[dtype] / relative_gap(sigma, 4)
    np.testing.assert_allclose(S, reference.S, atol=100 * EPS[dtype])
    np.testing.assert_allclose(U, reference.U, atol=tol)
    np.testing.assert_allclose(Vh, reference.Vh, atol=tol)


def test_same_product_where_the_spectrum_has_no_gap(xp):
    a = with_spectrum(np.asarray([1.0, 1, 1, 1e-3, 1e-3, 1e-4]), 40, 25, "float64")
    U, S, Vh = map(to_numpy, slra.randomized_svd(to_xp(xp, a), 3, n_oversamples=2, rng=3))
    reference = slra.randomized_svd(a, 3, n_oversamples=2, rng=3)
    np.testing.assert_allclose(
        (U * S) @ Vh, (reference.U * reference.S) @ reference.Vh, atol=1000 * EPS["float64"]
    )


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_sign_rule(xp, dtype):
    a = with_spectrum(0.7 ** np.arange(12), 30, 20, dtype)
    U = to_numpy(slra.randomized_svd(to_xp(xp, a), 6, n_oversamples=2, rng=1).U)
    pivots = U[np.argmax(np.abs(U), axis=0), np.arange(6)]
    assert np.all(pivots.real > 0)
    assert np.all(np.abs(pivots.imag) <= 4 * EPS[dtype])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 7)], ids=str)
def test_full_rank_is_exact(xp, shape):
    a = np.random.default_rng(0).standard_normal(shape)
    for U, S, Vh in (
        map(to_numpy, slra.truncated_svd(to_xp(xp, a))),
        map(to_numpy, slra.randomized_svd(to_xp(xp, a), min(shape), rng=0)),
    ):
        np.testing.assert_allclose((U * S) @ Vh, a, atol=50 * EPS["float64"])
        np.testing.assert_allclose(S, np.linalg.svd(a, compute_uv=False), atol=50 * EPS["float64"])


def test_zero_matrix_has_orthonormal_vectors(xp):
    U, S, Vh = map(to_numpy, slra.randomized_svd(to_xp(xp, np.zeros((20, 15))), 3, rng=0))
    assert np.all(S == 0)
    np.testing.assert_allclose(U.T @ U, np.eye(3), atol=50 * EPS["float64"])
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(3), atol=50 * EPS["float64"])


def test_half_precision_is_computed_in_single(xp):
    if not hasattr(xp, "float16"):
        pytest.skip("no float16 here")
    a = with_spectrum(0.5 ** np.arange(8), 20, 12, "float64").astype("float16")
    U, S, Vh = slra.randomized_svd(to_xp(xp, a), 3, rng=0)
    # Singular values leave the range of half precision long before the entries of a matrix do.
    assert (U.dtype, S.dtype, Vh.dtype) == (xp.float16, xp.float32, xp.float16)
    exact = np.linalg.svd(a.astype("float64"), compute_uv=False)[:3]
    np.testing.assert_allclose(to_numpy(S), exact, rtol=1e-5)
    for one, other in zip(slra.truncated_svd(to_xp(xp, a), 3), (U, S, Vh), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=2e-3)


@pytest.mark.parametrize("function", ["randomized_svd", "truncated_svd"])
def test_ranks_out_of_range(function):
    message = r"^rank must be between 1 and 3 \(min of the last two axes of x\), got "
    for shape in ((3, 5), (5, 3)):
        for rank in (0, 4):
            with pytest.raises(ValueError, match=f"{message}{rank}$"):
                getattr(slra, function)(np.ones(shape), rank)


def test_test_matrix_replaces_the_draw(xp):
    a = with_spectrum(1 / np.arange(1.0, 21), 40, 20, "float64")
    omega = np.random.default_rng(5).standard_normal((20, 6))
    result = slra.randomized_svd(to_xp(xp, a), 2, test_matrix=to_xp(xp, omega))
    reference = slra.randomized_svd(a, 2, test_matrix=omega)
    np.testing.assert_allclose(to_numpy(result.U), reference.U, atol=1e-12)


def test_batches_share_a_test_matrix_or_have_their_own():
    a = with_spectrum(1 / np.arange(1.0, 41), 60, 40, "float64", batch=(2,))
    omega = np.random.default_rng(5).standard_normal((2, 40, 2))
    own = slra.randomized_svd(a, 2, n_iter=2, test_matrix=omega)
    for i in range(2):
        alone = slra.randomized_svd(a[i], 2, n_iter=2, test_matrix=omega[i])
        np.testing.assert_allclose(own.U[i], alone.U, atol=1e-12)
        shared = slra.randomized_svd(a, 2, n_iter=2, test_matrix=omega[i])
        np.testing.assert_allclose(shared.U[i], alone.U, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ((), ()),
        ((), (40,)),
        ((), (60, 6)),
        ((), (40, 1)),
        ((), (2, 40, 6)),
        ((2,), (3, 40, 6)),
        ((2,), (2, 60, 6)),
        ((2,), (60, 6)),
    ],
)
def test_test_matrices_that_do_not_fit(batch, shape):
    message = (
        rf"^test_matrix must have shape \(\.\.\., 40, 2 or more\) for x of shape "
        rf"{re.escape(str((*batch, 60, 40)))} and rank 2, got {re.escape(str(shape))}$"
    )
    with pytest.raises(ValueError, match=message):
        slra.randomized_svd(np.ones((*batch, 60, 40)), 2, test_matrix=np.ones(shape))


@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [(60, 40, 3), (1000, 100, 2), (1797, 64, 2), (5000, 100, 2), (3000, 120, 12), (100, 5000, 5)],
)
def test_exact_where_that_is_as_fast(m, n, rank):
    """Noise, which no iteration gets right."""
    a = np.random.default_rng(0).standard_normal((m, n))
    exact = np.linalg.svd(a, compute_uv=False)[:rank]
    for x in (a, a.T):
        np.testing.assert_allclose(slra.randomized_svd(x, rank, rng=0).S, exact, rtol=1e-12)


@pytest.mark.parametrize("depth", [None, 1, 5])
@pytest.mark.parametrize("rank", [4, 52])
@pytest.mark.parametrize("long", [2_000, 100_000])
def test_a_short_side_makes_it_exact(long, rank, depth):
    from array_api_compat import numpy as xp

    from slra._backends import backend_of
    from slra.svd._linear_map import dense_map
    from slra.svd.randomized import _cheapest

    def chosen(short):
        x = np.broadcast_to(np.zeros(()), (long, short))
        maps = dense_map(x, backend_of(xp)), dense_map(x.T, backend_of(xp))
        (method,) = {_cheapest(A, rank, rank + 8, depth) for A in maps}
        return method

    methods = [chosen(short) for short in range(rank + 8, 2_000)]
    changes = sum(a != b for a, b in itertools.pairwise(methods))
    assert (methods[0], methods[-1], changes) == ("gram", "krylov", 1)


def test_result_stays_on_the_device_of_the_input(xp, device):
    a = xp.asarray(with_spectrum(0.5 ** np.arange(8), 20, 12, "float64"), device=device)
    for x in slra.randomized_svd(a, 3, n_oversamples=2, rng=0):
        assert x.device == a.device


def test_batch_elements_meet_different_test_matrices():
    from array_api_compat import numpy as xp

    from slra._backends import backend_of

    omega = backend_of(xp).test_matrix((2, 9, 3), np.random.default_rng(0), np.zeros(1))
    assert np.max(np.abs(omega[0] - omega[1])) > 0.1


def test_a_draw_inside_jit_must_be_repeatable():
    jax = pytest.importorskip("jax")
    a = jax.numpy.ones((200, 100))
    with pytest.raises(ValueError, match="test_matrix must be given, or rng be an int"):
        jax.jit(lambda x: slra.randomized_svd(x, 2))(a)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_that_leave_the_range_of_half_precision(xp, dtype):
    if not hasattr(xp, dtype):
        pytest.skip("not a dtype of this library")
    x = xp.astype(to_xp(xp, np.full((300, 300), 300.0)), getattr(xp, dtype))
    # 9e4, where the largest number in float16 is 65504.
    results = [
        slra.randomized_svd(x, 1, rng=0).S,
        slra.truncated_svd(x, 1).S,
        slra.randomized_eigh(x, 1, rng=0).w,
        slra.estimate_error(x, (x[:, :1] * 0, x[:1, :]), rng=0).spectral,
    ]
    for found in results:
        assert found.dtype == xp.float32
        assert np.all(np.isfinite(to_numpy(found)))
    for found in results[:3]:
        np.testing.assert_allclose(to_numpy(found), [9e4], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_signs_where_moduli_tie(xp, dtype):
    i, j = np.meshgrid(np.arange(64), np.arange(48), indexing="ij")
    for a in (
        np.cos(2 * np.pi * i * j / 64) / (1 + j),
        np.cos(np.pi * (i + 0.5) * j / 64) * 0.8**j,
    ):
        a = a.astype(dtype)
        U, _, Vh = map(to_numpy, slra.truncated_svd(to_xp(xp, a), 10))
        right = slra.truncated_svd(a, 10)
        assert np.min(-np.diff(right.S)) > 1e-3
        np.testing.assert_allclose(U, right.U, atol=1e4 * EPS[dtype])
        np.testing.assert_allclose(Vh, right.Vh, atol=1e4 * EPS[dtype])


@pytest.mark.parametrize("function", ["randomized_svd", "truncated_svd"])
def test_a_centred_result_has_the_means(xp, function):
    a = with_spectrum(0.5 ** np.arange(12), 40, 30, "float64") + np.linspace(-3, 3, 30)
    options = {"rng": 0} if function == "randomized_svd" else {}
    x = to_xp(xp, a)
    result = getattr(slra, function)(x, 3, center=True, **options)
    U, S, Vh = map(to_numpy, result)
    exact = np.linalg.svd(a - a.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(S, exact[:3], atol=1e-8)
    np.testing.assert_allclose(to_numpy(result.mean), a.mean(axis=0), atol=1e-14)
    error = np.linalg.norm(a - a.mean(axis=0) - (U * S) @ Vh)
    for approx, center in ((result, False), (tuple(result), True)):
        found = slra.estimate_error(x, approx, center=center, rng=1)
        assert 0.4 * error <= float(to_numpy(found.frobenius)) <= 1.7 * error


def test_a_centred_result_is_copied_whole():
    import copy
    import pickle

    x = np.arange(12.0).reshape(4, 3) ** 2
    result = slra.truncated_svd(x, 2, center=True)
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), result._replace()):
        np.testing.assert_array_equal(again.mean, x.mean(axis=0))
        np.testing.assert_array_equal(again.S, result.S)
    assert not hasattr(slra.truncated_svd(x, 2), "mean")


def test_small_sparse_matrices_are_decomposed_exactly(monkeypatch):
    sp = pytest.importorskip("scipy.sparse")
    x = sp.random(60, 40, density=0.1, random_state=0)
    for center in (False, True):
        a = x.toarray() - center * x.toarray().mean(axis=0)
        S = slra.truncated_svd(x, 5, center=center).S
        np.testing.assert_allclose(S, np.linalg.svd(a, compute_uv=False)[:5], rtol=1e-12)
    with pytest.raises(
        ValueError, match=r"^x must have at most 16777216 entries where it is sparse"
    ):
        slra.truncated_svd(sp.csr_matrix((100_000, 1000)), 2)
    with pytest.raises(TypeError, match="^x must be an array, got .*; use randomized_svd"):
        slra.truncated_svd(sp.linalg.aslinearoperator(x), 2)


@pytest.mark.eager_only("tol needs values")
@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-4), ("complex128", 1e-9)])
def test_triplets_converged_to_a_tolerance(xp, dtype, tol):
    sigma = np.concatenate([np.ones(12), 0.9 + 0.0 * np.arange(4), 0.8 / np.arange(1, 105)])
    for shape in ((200, 120), (120, 200)):
        a = with_spectrum(sigma, *shape, dtype)
        # 16 values with blocks of 18 and a space that must be restarted.
        for rank, oversamples in ((5, 4), (16, 2)):
            result = slra.randomized_svd(
                to_xp(xp, a), rank, tol=tol, n_oversamples=oversamples, rng=0
            )
            U, S, Vh = map(to_numpy, result)
            V = np.conj(Vh).T
            np.testing.assert_allclose(S, sigma[:rank], atol=10 * tol)
            assert np.max(np.linalg.norm(a @ V - U * S, axis=0)) <= 1.1 * tol
            assert np.max(np.linalg.norm(np.conj(a).T @ U - V * S, axis=0)) <= 1.1 * tol


def test_a_tolerance_of_triplets_where_it_does_not_belong():
    x = np.diag(1 / np.arange(1.0, 201))
    for options, message in (
        ({"rtol": 0.1, "tol": 1e-3}, "^tol needs rank"),
        ({"rank": 2, "rtol": 0.1, "tol": 1e-3}, "^tol needs rank"),
        ({"rank": 2, "tol": 1e-3, "n_iter": 3}, "^n_iter must be 'auto', method"),
        ({"rank": 2, "tol": 1e-3, "method": "gram"}, "^n_iter must be 'auto', method"),
        ({"rank": 2, "tol": 1e-16}, r"^tol must be at least 2.2e-14 for float64"),
    ):
        with pytest.raises(ValueError, match=message):
            slra.randomized_svd(x, **options)


@pytest.mark.parametrize("method", ["auto", "gram"])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((10_000, 500), 50), ((500, 10_000), 50), ((50_000, 50), 20)],
)
def test_memory_is_about_that_of_the_matrix(shape, rank, method):
    tracemalloc = pytest.importorskip("tracemalloc")
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    tracemalloc.start()
    try:
        slra.randomized_svd(x, rank, method=method, rng=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Products of all slabs, or of integers as large as U, took more.
    assert peak < 1.5 * x.nbytes
