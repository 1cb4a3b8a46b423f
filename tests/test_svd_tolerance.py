"""The residual is within the tolerance, always, and the rank is about the smallest that does it."""

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp
from tests.matrices import make


def smallest_ranks(a, rtol):
    squares = np.linalg.svd(a.astype(np.result_type(a.dtype, "float64")), compute_uv=False) ** 2
    tails = np.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    return 1 + np.sum(tails[..., 1:] > rtol**2 * tails[..., :1], axis=-1)


def check_tolerance(a, rtol, result):
    U, S, Vh = (to_numpy(x) for x in result)
    wide = a.astype(np.result_type(a.dtype, "float64"))
    error = np.linalg.norm(wide - (U.astype(wide.dtype) * S[..., None, :]) @ Vh, axis=(-2, -1))
    assert np.all(error <= rtol * np.linalg.norm(wide, axis=(-2, -1)))
    ranks, best = np.sum(S > 0, axis=-1), smallest_ranks(a, rtol)
    assert np.all(ranks <= 1.05 * best + 1)
    assert S.shape[-1] == np.max(ranks)
    for Q in (U, np.conj(Vh).swapaxes(-1, -2)):
        gram = np.conj(Q).swapaxes(-1, -2) @ Q
        k = S.shape[-1]
        assert np.max(np.abs(gram - np.eye(k))) <= 50 * np.finfo(a.dtype).eps * np.sqrt(k)


CASES = [("float32", 0.3), ("float32", 0.1), ("float32", 1e-2), ("float64", 1e-6)]


@pytest.mark.parametrize(
    ("name", "dtype", "rtol"),
    [
        ("polynomial", "float32", 0.3),
        ("exponential", "float32", 0.1),
        ("polynomial", "float32", 0.01),
        ("exponential", "float64", 1e-6),
    ],
)
def test_a_hundred_seeds(dtype, rtol, name):
    # Ranks from 7 to nearly full: Krylov spaces that settle, and the exact way.
    a = make(name, (180, 150), dtype)
    for seed in range(100):
        check_tolerance(a, rtol, slra.randomized_svd(a, rtol=rtol, rng=seed))


@pytest.mark.parametrize(
    "name", ["polynomial", "slow", "exponential", "step", "gaussian", "rank 7"]
)
@pytest.mark.parametrize(("dtype", "rtol"), [*CASES, ("complex128", 1e-10), ("complex64", 1e-5)])
@pytest.mark.parametrize("shape", [(250, 160), (160, 250)], ids=str)
def test_spectra(shape, dtype, rtol, name):
    a = make(name, shape, dtype)
    check_tolerance(a, rtol, slra.randomized_svd(a, rtol=rtol, rng=0))
    check_tolerance(a, rtol, slra.truncated_svd(a, rtol=rtol))


@pytest.mark.eager_only("rtol needs values")
@pytest.mark.parametrize("function", ["randomized_svd", "truncated_svd"])
def test_batch_is_padded_with_zeros(xp, function):
    a = np.stack([make(name, (130, 110), "float64") for name in ("rank 7", "zero", "exponential")])
    options = {"rng": 0} if function == "randomized_svd" else {}
    result = getattr(slra, function)(to_xp(xp, a), rtol=0.01, **options)
    check_tolerance(a[2], 0.01, [x[2, ...] for x in result])
    S = to_numpy(result.S)
    assert np.all(S[0, 7:] == 0)
    assert np.all(S[1] == 0)
    U = to_numpy(result.U)
    np.testing.assert_allclose(
        U.swapaxes(-1, -2) @ U,
        np.broadcast_to(np.eye(S.shape[1]), (3, *[S.shape[1]] * 2)),
        atol=1e-12,
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale):
    a = make("exponential", (200, 150), "float32") * np.float32(scale)
    check_tolerance(a, 0.05, slra.randomized_svd(a, rtol=0.05, rng=0))


@pytest.mark.parametrize("exponent", [-660, 660])
@pytest.mark.parametrize("function", ["randomized_svd", "truncated_svd"])
def test_squares_out_of_range_of_double_precision(function, exponent):
    a, scale = make("exponential", (140, 110), "float64"), 2.0**exponent
    options = {"rng": 0} if function == "randomized_svd" else {}
    U, S, Vh = getattr(slra, function)(a * scale, rtol=0.05, **options)
    check_tolerance(a, 0.05, (U, S / scale, Vh))


def test_scales_of_a_batch_are_apart():
    a = make("polynomial", (2, 60, 40), "float64") * np.asarray([1.0, 2.0**-600])[:, None, None]
    S = slra.truncated_svd(a, rtol=0.1).S
    for i in range(2):
        assert np.count_nonzero(S[i]) == len(slra.truncated_svd(a[i], rtol=0.1).S)


def test_a_batch_grows_together(monkeypatch):
    from slra.svd import tolerance

    monkeypatch.setattr(tolerance, "_by_gram", None)
    a = np.stack([make(name, (250, 200), "float64") for name in ("rank 7", "steep", "exponential")])
    for x in (a, np.conj(a).swapaxes(-1, -2)):
        U, S, Vh = slra.randomized_svd(x, rtol=0.1, rng=0)
        ranks = np.count_nonzero(S, axis=-1)
        assert ranks.tolist() == [len(slra.randomized_svd(y, rtol=0.1, rng=0).S) for y in x]
        for i, rank in enumerate(ranks):
            check_tolerance(x[i], 0.1, (U[i, :, :rank], S[i, :rank], Vh[i, :rank]))


@pytest.mark.parametrize(
    ("shape", "rtol", "ways"),
    [
        ((300, 200), 0.1, ["krylov"]),
        ((200, 300), 0.1, ["krylov"]),
        # What three blocks would fill is decomposed.
        ((300, 49), 0.7, ["krylov", "gram"]),
        ((300, 48), 0.7, ["gram"]),
        ((48, 300), 0.7, ["gram"]),
        # The Gram matrix squares: it is not asked for less than sqrt(16 n eps), nor the difference of two sums of
        # squares for less than sqrt(1000 eps).
        ((300, 200), 8.5e-7, ["krylov", "gram"]),
        ((300, 200), 5e-7, ["krylov", "svd"]),
        ((200, 300), 4e-7, ["svd"]),
    ],
    ids=str,
)
def test_which_way_is_taken(monkeypatch, shape, rtol, ways):
    from slra.svd import tolerance

    taken = []

    def record(name, function):
        def call(*args):
            taken.append(name)
            return function(*args)

        return call

    for name, inside in (("krylov", "_grow"), ("gram", "cut_at_tolerance"), ("svd", "thin_svd")):
        monkeypatch.setattr(tolerance, inside, record(name, getattr(tolerance, inside)))
    a = make("exponential", shape, "float64")
    check_tolerance(a, rtol, slra.randomized_svd(a, rtol=rtol, rng=0))
    assert taken == ways


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_residual_norm(monkeypatch, dtype):
    from slra.svd import tolerance
    from slra.svd._inputs import read

    # Tiles of seven rows, and one of what is left.
    monkeypatch.setattr("slra._backends.standard.Backend.n_at_once", 7 * 30)
    a = make("polynomial", (2, 50, 30), dtype)
    U, S, Vh = slra.truncated_svd(a, 4)
    V = np.conj(Vh).swapaxes(-1, -2)
    # Values that are not the best, too.
    for values in (S, S * S.dtype.type(0.5)):
        exact = np.linalg.norm(a - (U * values[:, None, :]) @ Vh, axis=(-2, -1))
        A = read(a).A
        found = tolerance.residual_norm(A, U, values, V, A.norm())
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, exact, rtol=20 * np.finfo(dtype).eps)
        for i in range(2):
            A = read(
                slra.MatrixOperator(
                    a[i].__matmul__, a[i].conj().T.__matmul__, (50, 30), a, np.linalg.norm(a[i])
                )
            ).A
            found = tolerance.residual_norm(A, U[i], values[i], V[i], A.norm())
            np.testing.assert_allclose(found, exact[i], rtol=100 * np.finfo(dtype).eps)


@pytest.mark.eager_only("rtol needs values")
def test_result_stays_on_the_device_of_the_input(xp, device):
    a = xp.asarray(make("exponential", (30, 20), "float64"), device=device)
    for result in (slra.truncated_svd(a, rtol=0.5), slra.randomized_svd(a, rtol=0.5, rng=0)):
        assert all(x.device == a.device for x in result)


def test_rank_is_a_cap():
    a = make("polynomial", (400, 300), "float64")
    S = slra.randomized_svd(a, 12, rtol=1e-3, rng=0).S
    exact = np.linalg.svd(a, compute_uv=False)[:12]
    assert S.shape == (12,)
    np.testing.assert_allclose(S, exact, rtol=1e-3)
    assert slra.truncated_svd(a, 12, rtol=1e-3).S.shape == (12,)
    assert slra.randomized_svd(a, 300, rtol=0.3, rng=0).S.shape[0] < 12


@pytest.mark.parametrize("function", ["randomized_svd", "truncated_svd"])
def test_what_cannot_be_promised_is_an_error(function):
    a = make("polynomial", (60, 40), "float32")
    run = getattr(slra, function)
    with pytest.raises(ValueError, match=r"rtol must be at least 1\.9e-06 for float32"):
        run(a, rtol=1e-7)
    with pytest.raises(ValueError, match="less than 1"):
        run(a, rtol=1.0)


def test_options_that_contradict_a_tolerance():
    a = np.ones((60, 40))
    with pytest.raises(ValueError, match="rank or rtol must be given"):
        slra.randomized_svd(a)
    with pytest.raises(ValueError, match="n_iter must be 'auto' where rtol is given, got 3"):
        slra.randomized_svd(a, rtol=0.1, n_iter=3)
    with pytest.raises(
        ValueError,
        match="^method must be 'auto' or 'krylov' where rtol is given, got 'gram'; "
        "for a deterministic answer use truncated_svd$",
    ):
        slra.randomized_svd(a, rtol=0.1, method="gram")
    assert slra.randomized_svd(a, rtol=0.1, method="krylov", rng=0).S.shape == (1,)
    with pytest.raises(ValueError, match="^test_matrix must be None .*: the width is not known$"):
        slra.randomized_svd(a, rtol=0.1, test_matrix=np.ones((40, 3)))


def test_rtol_is_refused_where_values_cannot_be_looked_at():
    jax = pytest.importorskip("jax")
    with pytest.raises(ValueError, match="rtol must be None where values cannot be looked at"):
        jax.jit(lambda x: slra.randomized_svd(x, rtol=0.1, rng=0))(jax.numpy.ones((30, 20)))


@pytest.mark.eager_only("rtol needs values")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_tolerance_that_half_precision_cannot_keep(xp, dtype):
    if not hasattr(xp, dtype):
        pytest.skip("not a dtype of this library")
    left, right = np.random.default_rng(0).standard_normal((2, 300, 8))
    x = xp.astype(to_xp(xp, left @ right[:200].T), getattr(xp, dtype))
    eps = float(xp.finfo(x.dtype).eps)
    least = rf"^rtol must be at least {2 * eps:.1e} for .*{dtype} and less than 1, got 0.0001$"
    for function in (slra.randomized_svd, slra.truncated_svd):
        with pytest.raises(ValueError, match=least.replace("+", r"\+")):
            function(x, rtol=1e-4)
        for rtol in (2.1 * eps, 20 * eps):
            U, S, Vh = (to_numpy(xp.astype(y, xp.float64)) for y in function(x, rtol=rtol))
            a = to_numpy(xp.astype(x, xp.float64))
            assert np.linalg.norm(a - (U * S) @ Vh) <= rtol * np.linalg.norm(a)
            assert len(S) == 8
