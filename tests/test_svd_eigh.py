"""Hermitian eigenpairs against LAPACK."""

import numpy as np
import pytest

import slra
from tests.backends import to_numpy, to_xp
from tests.test_svd_never_wrong import eps_of, orthonormal


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


def test_small_is_exact(xp):
    a = hermitian(np.asarray([3.0, -2, 1, 0.5]), "float64")
    check(a, 2, slra.randomized_eigh(to_xp(xp, a), 2, rng=0))


def test_nystrom(xp):
    a = hermitian(0.6 ** np.arange(100), "float64")
    result = slra.randomized_eigh(
        to_xp(xp, a), 4, n_oversamples=4, method="nystrom", n_iter=8, rng=0
    )
    w, V = (to_numpy(x) for x in result)
    exact = 0.6 ** np.arange(4)
    # After q products the part of the ninth direction in the sample has shrunk by (0.6^5)^q.
    np.testing.assert_allclose(w, exact, rtol=1e-10)
    np.testing.assert_allclose(V.T @ V, np.eye(4), atol=50 * eps_of("float64") * 2)


def test_sparse_operator_agrees_with_the_array():
    sp = pytest.importorskip("scipy.sparse")
    a = hermitian(0.6 ** np.arange(120), "float64")
    for x in (sp.csr_matrix(a), sp.linalg.aslinearoperator(a)):
        check(a, 5, slra.randomized_eigh(x, 5, rng=0))


def test_refusals():
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
