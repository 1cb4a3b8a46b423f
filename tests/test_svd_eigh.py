"""Hermitian eigenpairs against LAPACK."""

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp
from tests.matrices import eps_of, orthonormal


def hermitian(lam, dtype, batch=()):
    rng = np.random.default_rng(0)
    q = orthonormal(rng, (*batch, len(lam)), len(lam), dtype)
    a = (q * lam) @ np.conj(q).swapaxes(-1, -2)
    return ((a + np.conj(a).swapaxes(-1, -2)) / 2).astype(dtype)


def check(a, rank, result):
    eps = eps_of(a.dtype)
    w, V = (to_numpy(x) for x in result)
    wide = a.astype(np.result_type(a.dtype, "float64"))
    exact = np.linalg.eigvalsh(wide)
    exact = np.take_along_axis(exact, np.argsort(-np.abs(exact), axis=-1, stable=True), -1)
    top = np.abs(exact[..., :1])
    assert w.dtype == a.real.dtype
    assert V.dtype == a.dtype
    assert np.all(np.abs(w - exact[..., :rank]) <= 20 * eps * top)
    best = np.linalg.norm(exact[..., rank:], axis=-1)
    rebuilt = (V * w[..., None, :]) @ np.conj(V).swapaxes(-1, -2)
    error = np.linalg.norm(wide - rebuilt, axis=(-2, -1))
    assert np.all(error <= 1.01 * best + 100 * eps * np.linalg.norm(exact, axis=-1))
    gram = np.conj(V).swapaxes(-1, -2) @ V
    assert np.max(np.abs(gram - np.eye(rank))) <= 50 * eps * np.sqrt(rank)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_indefinite(xp, dtype):
    a = hermitian(0.6 ** np.arange(100) * (-1) ** np.arange(100), dtype)
    check(a, 4, slra.randomized_eigh(to_xp(xp, a), 4, n_oversamples=4, rng=0))


@pytest.mark.parametrize("n_iter", ["auto", 2])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_dtypes_and_batches(dtype, batch, n_iter):
    a = hermitian(0.5 ** np.arange(120) * np.cos(np.arange(120)), dtype, batch)
    check(a, 6, slra.randomized_eigh(a, 6, n_iter=n_iter, rng=0))


@pytest.mark.parametrize(
    "lam", [np.zeros(90), np.ones(90), np.eye(90)[0]], ids=["zero", "eye", "one"]
)
def test_degenerate(lam):
    a = hermitian(lam, "float64")
    check(a, 3, slra.randomized_eigh(a, 3, n_oversamples=2, rng=0))


def test_order_of_equal_moduli_and_of_each_element():
    # Of equal moduli the smaller value comes first, as LAPACK gives them; each matrix has its own order.
    lam = np.asarray([[3.0, -3.0, 2.0, 1.0], [1.0, -2.0, 3.0, -4.0]])
    a = np.stack([np.diag(row) for row in lam])
    w, V = slra.randomized_eigh(a, 3, rng=0)
    np.testing.assert_allclose(w, [[-3, 3, 2], [-4, 3, -2]], atol=1e-14)
    np.testing.assert_allclose(np.argmax(np.abs(V), axis=1), [[1, 0, 2], [3, 2, 1]])


def test_eigenpairs_stay_on_the_device_of_the_input(xp, device):
    a = xp.asarray(hermitian(np.asarray([3.0, -2, 1, 0.5]), "float64"), device=device)
    for x in slra.randomized_eigh(a, 2, rng=0):
        assert x.device == a.device


def test_small_is_exact(xp):
    a = hermitian(np.asarray([3.0, -2, 1, 0.5]), "float64")
    check(a, 2, slra.randomized_eigh(to_xp(xp, a), 2, rng=0))


def test_nystrom(xp):
    # Long enough for the sample not to fill it.
    a = hermitian(0.6 ** np.arange(200), "float64")
    result = slra.randomized_eigh(
        to_xp(xp, a), 4, n_oversamples=4, method="nystrom", n_iter=8, rng=0
    )
    w, V = (to_numpy(x) for x in result)
    exact = 0.6 ** np.arange(4)
    # After q products the part of the ninth direction in the sample has shrunk by (0.6^5)^q.
    np.testing.assert_allclose(w, exact, rtol=1e-10)
    np.testing.assert_allclose(V.T @ V, np.eye(4), atol=50 * eps_of("float64") * 2)


@pytest.mark.parametrize("n_iter", ["auto", 1])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_nystrom_of_every_kind(dtype, n_iter):
    # Of rank 5, so that one product finds all of it; a batch, of which one is zero.
    a = hermitian(np.where(np.arange(120) < 5, 0.5 ** np.arange(120), 0), dtype, (2,))
    a[1] = 0
    w, V = slra.randomized_eigh(a, 6, n_oversamples=2, method="nystrom", n_iter=n_iter, rng=0)
    assert w.dtype == a.real.dtype
    assert V.dtype == a.dtype
    assert np.all(w >= 0)
    # The shift that is put in and taken out again is eps times the norm.
    np.testing.assert_allclose(
        w, [[1, 0.5, 0.25, 0.125, 0.0625, 0], [0] * 6], atol=20 * eps_of(dtype)
    )
    gram = np.conj(V).swapaxes(-1, -2) @ V
    np.testing.assert_allclose(gram, np.stack([np.eye(6)] * 2), atol=100 * eps_of(dtype))
    rebuilt = (V * w[:, None, :]) @ np.conj(V).swapaxes(-1, -2)
    np.testing.assert_allclose(rebuilt, a, atol=100 * eps_of(dtype))


@pytest.mark.parametrize("method", ["krylov", "nystrom"])
@pytest.mark.parametrize("exponent", [-660, 660])
def test_squares_out_of_range_of_double_precision(method, exponent):
    a, scale = hermitian(0.3 ** np.arange(100), "float64"), 2.0**exponent
    w, V = slra.randomized_eigh(a * scale, 4, method=method, n_iter=3, rng=0)
    check(a, 4, (w / scale, V))


@pytest.mark.parametrize("method", ["krylov", "nystrom"])
def test_test_matrix_replaces_the_draw(method):
    a = hermitian(0.6 ** np.arange(100), "float64")
    options = {"n_iter": 2, "method": method}
    omega = np.random.default_rng(5).standard_normal((100, 8))
    w, V = slra.randomized_eigh(a, 2, test_matrix=omega, **options)
    same = slra.randomized_eigh(a, 2, test_matrix=omega, n_oversamples=50, **options)
    np.testing.assert_array_equal(V, same.V)
    other = slra.randomized_eigh(a, 2, test_matrix=omega[:, :4], **options)
    assert np.any(V != other.V)
    np.testing.assert_allclose(w, [1, 0.6], rtol=1e-3)
    with pytest.raises(ValueError, match=r"^test_matrix must have shape \(\.\.\., 100, 2 or more"):
        slra.randomized_eigh(a, 2, test_matrix=omega[:, :1], **options)


@pytest.mark.parametrize("method", ["krylov", "nystrom"])
def test_draws_follow_the_seed(method):
    a = hermitian(0.9 ** np.arange(150), "float64")
    options = {"n_iter": 2, "method": method}
    first, again, other = (slra.randomized_eigh(a, 4, rng=seed, **options) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.V, again.V)
    assert np.any(first.w != other.w)
    default = slra.randomized_eigh(a, 4, n_oversamples=8, rng=0, **options)
    np.testing.assert_array_equal(first.w, default.w)


def products(lam, **options):
    """Products with blocks that `randomized_eigh` takes."""
    a, taken = hermitian(lam, "float64"), []

    def matmat(v):
        taken.append(v.shape[-1])
        return a @ v

    operator = slra.MatrixOperator(matmat, matmat, a.shape, a)
    slra.randomized_eigh(operator, 4, rng=0, **options)
    # The first two are of one vector: to find the scale, and whether it is Hermitian.
    assert taken[:2] == [1, 1]
    return taken[2:]


def test_how_many_products_are_taken():
    lam = 0.1 ** np.arange(400)
    # One for the sample, which the first two blocks begin with.
    for n_iter in (0, 1, 2, 4):
        assert products(lam, n_iter=n_iter) == [12] * (1 + 2 * max(1, n_iter))
        assert products(lam, n_iter=n_iter, method="nystrom") == [12] * (2 + n_iter)
    # Five blocks, and one more to see that nothing moves.
    assert products(lam) == [12] * 7
    assert products(lam, n_oversamples=3) == [7] * 7
    assert products(lam, method="nystrom") == [12] * 6
    # Where the space would be as long as the matrix, the matrix is multiplied out.
    assert products(lam[:72]) == [72]
    assert products(lam[:73]) == [12] * 7
    assert products(lam[:24], n_iter=1) == [24]
    assert products(lam[:25], n_iter=1) == [12] * 3


def test_sparse_operator_agrees_with_the_array():
    sp = pytest.importorskip("scipy.sparse")
    a = hermitian(0.6 ** np.arange(120), "float64")
    for x in (sp.csr_matrix(a), sp.linalg.aslinearoperator(a)):
        check(a, 5, slra.randomized_eigh(x, 5, rng=0))


def test_refusals():
    with pytest.raises(ValueError, match=r"^method must be one of 'krylov', 'nystrom', got 'qr'"):
        slra.randomized_eigh(np.eye(5), 2, method="qr")
    with pytest.raises(
        ValueError, match=r"^rank must be between 1 and 5 \(the last axis of x\), got 6"
    ):
        slra.randomized_eigh(np.eye(5), 6)
    with pytest.raises(ValueError, match="^n_oversamples must be 0 or more, got -1"):
        slra.randomized_eigh(np.eye(5), 2, n_oversamples=-1)
    with pytest.raises(ValueError, match="^n_iter must be 0 or more, got -1"):
        slra.randomized_eigh(np.eye(5), 2, n_iter=-1)
    with pytest.raises(ValueError, match="x must be Hermitian"):
        slra.randomized_eigh(np.triu(np.ones((5, 5))), 2)
    with pytest.raises(ValueError, match="x must be square"):
        slra.randomized_eigh(np.ones((5, 4)), 2)
    with pytest.raises(ValueError, match="x must be positive semidefinite for method='nystrom'"):
        slra.randomized_eigh(hermitian(-(0.9 ** np.arange(100)), "float64"), 4, method="nystrom")


# The error estimate is the same kind of product.


def test_estimate_error(xp):
    a = hermitian(1 / np.arange(1.0, 101), "float64")
    U, S, Vh = slra.truncated_svd(a, 10)
    exact = np.linalg.norm(1 / np.arange(11.0, 101))
    factors = tuple(to_xp(xp, x) for x in (U, S, Vh))
    found = slra.estimate_error(to_xp(xp, a), factors, n_probes=20, rng=1)
    # The square has a relative variance of 2/20 times sum(sigma^4)/sum(sigma^2)^2: six deviations.
    s2 = 1 / np.arange(11.0, 101) ** 2
    spread = 6 * np.sqrt(0.1 * np.sum(s2**2)) / np.sum(s2)
    assert abs(float(to_numpy(found.frobenius)) ** 2 / exact**2 - 1) <= spread
    pair = tuple(to_xp(xp, x) for x in (U * S, Vh))
    same = slra.estimate_error(to_xp(xp, a), pair, n_probes=20, rng=1)
    np.testing.assert_allclose(to_numpy(same.frobenius), to_numpy(found.frobenius), rtol=1e-10)


def test_estimate_error_is_what_its_notes_say():
    from array_api_compat import numpy as xp

    from slra._backends import backend_of

    x = np.stack([np.diag([3.0, 1.0]), np.diag([0.5, 2.0])])
    nothing = np.zeros((2, 2, 1)), np.zeros((2, 1, 2))
    for p in (1, 10):
        w = backend_of(xp).test_matrix((2, 2, p), np.random.default_rng(7), x)
        norms = np.linalg.norm(x @ w, axis=-2)
        found = slra.estimate_error(x, nothing, n_probes=p, rng=7)
        np.testing.assert_allclose(found.frobenius, np.sqrt(np.mean(norms**2, axis=-1)), rtol=1e-14)
        bound = 100 ** (1 / p) * np.sqrt(2 / np.pi) * np.max(norms, axis=-1)
        np.testing.assert_allclose(found.spectral, bound, rtol=1e-14)
    default = slra.estimate_error(x, nothing, rng=7)
    np.testing.assert_array_equal(default.frobenius, found.frobenius)


def test_confidence_of_the_spectral_bound():
    # The worst case for the estimate: an error of rank one.
    a = np.zeros((60, 50))
    a[3, 4] = 2.0
    nothing = np.zeros((60, 1)), np.zeros((1, 50))
    missed = sum(
        float(slra.estimate_error(a, nothing, n_probes=5, rng=seed).spectral) < 2.0
        for seed in range(500)
    )
    # Five expected; thirteen or more have a probability of 0.002.
    assert missed < 13


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_estimate_error_at_extreme_scales(scale):
    a = hermitian(1 / np.arange(1.0, 61), "float32") * np.float32(scale)
    approx = slra.truncated_svd(a, 5)
    exact = scale * np.linalg.norm(1 / np.arange(6.0, 61))
    assert 0.5 * exact <= slra.estimate_error(a, approx, rng=0).frobenius <= 1.6 * exact


def test_estimate_error_refuses_what_does_not_fit():
    a = np.ones((6, 5))
    with pytest.raises(ValueError, match=r"approx must have shapes .* to fit x"):
        slra.estimate_error(a, (np.ones((6, 2)), np.ones((3, 5))))
    with pytest.raises(TypeError, match=r"approx must be a tuple"):
        slra.estimate_error(a, a)
    with pytest.raises(ValueError, match="n_probes must be between 1"):
        slra.estimate_error(a, (np.ones((6, 2)), np.ones((2, 5))), n_probes=0)


def graph(n=300, k=5):
    """Neighbours of points on a plane: who is near is not mutual."""
    sp = pytest.importorskip("scipy.sparse")
    points = np.random.default_rng(0).standard_normal((n, 2))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    nearest = np.argsort(distance, axis=1)[:, 1 : k + 1]
    rows = np.repeat(np.arange(n), k)
    return sp.csr_matrix((np.ones(n * k), (rows, nearest.ravel())), (n, n))


def test_sparse_matrices_must_be_hermitian():
    g = graph()
    message = r"^x must be Hermitian, .* pass \(x \+ x\^H\) / 2$"
    for x in (g, g.tocsc(), g.tocoo(), 1j * g, 1j * (g + g.T)):
        with pytest.raises(ValueError, match=message):
            slra.randomized_eigh(x, 3, rng=0)
    operator = slra.MatrixOperator(g.__matmul__, g.T.__matmul__, g.shape, g.data)
    with pytest.raises(ValueError, match="^x must be Hermitian, got an operator that is not"):
        slra.randomized_eigh(operator, 3, rng=0)
    for x in ((g + g.T) / 2, 1j * (g - g.T)):
        w, V = slra.randomized_eigh(x.tocsr(), 3, n_iter=20, rng=0)
        assert np.linalg.norm(x @ V - V * w) <= 1e-2 * np.abs(w[0])
    slra.randomized_eigh(graph() * 0, 3, rng=0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_hermitian_to_rounding_in_the_dtype_of_the_input(dtype):
    points = np.random.default_rng(0).standard_normal((200, 3))
    affinity = np.exp(-((points[:, None] - points) ** 2).sum(axis=-1))
    eps = np.finfo(dtype).eps
    off = 1 + eps * np.random.default_rng(1).uniform(-1, 1, affinity.shape)
    x = (affinity * off).astype(dtype)
    w = slra.randomized_eigh(x, 3, rng=0).w
    assert w.dtype == ("float32" if dtype == "float16" else dtype)
    exact = np.linalg.eigvalsh((x + x.T).astype("float64") / 2)[:-4:-1]
    np.testing.assert_allclose(w, exact, rtol=1e-4 if dtype != "float64" else 1e-6)
    wrong = x.copy()
    wrong[0, 1] += np.asarray(200 * eps if dtype != "float16" else 0.05, dtype)
    with pytest.raises(
        ValueError, match=rf"^x must be Hermitian, .* in {dtype} .*\(x \+ x\^H\) / 2$"
    ):
        slra.randomized_eigh(wrong, 3, rng=0)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_both_ends_of_a_spectrum(xp, dtype):
    lam = np.concatenate([-5 * 0.6 ** np.arange(60), 0.5 * 0.6 ** np.arange(60)])
    a = hermitian(lam, dtype)
    ends = {"LM": [-5, -3, -1.8], "LA": [0.5, 0.3, 0.18], "SA": [-5, -3, -1.8]}
    for which, exact in ends.items():
        options = {"which": which, "n_oversamples": 5, "n_iter": 4, "rng": 0}
        w, V = map(to_numpy, slra.randomized_eigh(to_xp(xp, a), 3, **options))
        np.testing.assert_allclose(w, exact, atol=2e-3 * abs(exact[0]))
        np.testing.assert_allclose(a @ V, V * w, atol=0.05 * abs(exact[0]))


def test_the_ends_that_are_found_are_named():
    x = np.diag(np.arange(1.0, 201))
    with pytest.raises(ValueError, match="^which must be 'LM', 'LA' or 'SA', got 'SM': products"):
        slra.randomized_eigh(x, 2, which="SM")
    with pytest.raises(ValueError, match="^which must be one of 'LM', 'LA', 'SA', got 'BE'"):
        slra.randomized_eigh(x, 2, which="BE")
    with pytest.raises(ValueError, match="^which must be 'LM' or 'LA' for method='nystrom'"):
        slra.randomized_eigh(x, 2, which="SA", method="nystrom")
    w = slra.randomized_eigh(x[:10, :10], 2, which="SA", rng=0).w
    np.testing.assert_allclose(w, [1, 2])
