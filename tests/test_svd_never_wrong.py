"""The answer is near the best there is, or there is an error: dtypes x spectra x shapes x ranks, default arguments."""

import numpy as np
import pytest

import slra
from tests.backends import to_xp
from tests.matrices import SCALED, SPECTRA, check, eps_of, make, reference_error

DTYPES = ["float32", "float64", "complex64", "complex128"]
SHAPES = {"tall": (400, 220), "wide": (220, 400), "square": (300, 300), "batch": (2, 260, 200)}
RANKS = [1, 5, 60]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SPECTRA, *SCALED, "kahan", "gaussian"])
def test_never_wrong(name, dtype, shape, rank):
    a = make(name, SHAPES[shape], dtype)
    near = 1.02 if name in ("gaussian", "flat", "spiked") else 1.01
    # The default takes three iterations or more.
    check(a, rank, slra.randomized_svd(a, rank, rng=0), near, reference_error(a, rank, 3))


def along_axes(name, dtype):
    """Matrices whose products are zero but for a few entries, so that a basis is completed with unit vectors."""
    rng, a = np.random.default_rng(0), np.zeros((300, 200))
    if name == "one entry":
        a[3, 4] = 2
    elif name == "diagonal":
        a[:5, :5] = np.diag([5, 4, 3, 2, 1])
    elif name == "two columns":
        a[:, [0, 7]] = rng.standard_normal((300, 2))
    elif name == "two rows":
        a[[0, 7]] = rng.standard_normal((2, 200))
    elif name == "classes":
        a[np.arange(300), rng.integers(8, size=300)] = 1
    elif name == "fading":
        # Down to where single precision ends.
        np.fill_diagonal(a, 2.0 ** -np.arange(200))
    else:
        a[:20, :20] = rng.standard_normal((20, 20))
    return a.astype(dtype) * (1 + 1j if np.dtype(dtype).kind == "c" else 1)


AXES = ["one entry", "diagonal", "two columns", "two rows", "classes", "fading", "padded"]


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("name", AXES)
def test_what_lies_along_few_axes(name, dtype):
    for a in (along_axes(name, dtype), along_axes(name, dtype).T):
        for options in ({}, {"n_iter": 5}, {"method": "subspace"}, {"method": "gram"}):
            result = slra.randomized_svd(a, 6, rng=0, **options)
            check(a, 6, result, 1.01, reference_error(a, 6, 3))
        U, S, Vh = slra.randomized_svd(a, rtol=0.3, rng=0)
        assert np.linalg.norm(a - (U * S) @ Vh) <= 0.3 * np.linalg.norm(a)
        gram = a @ np.conj(a).T
        w, V = slra.randomized_eigh(gram, 6, rng=0)
        exact = np.linalg.eigvalsh(gram.astype("complex128"))[::-1][:6]
        np.testing.assert_allclose(w, exact, atol=1e-2 * exact[5] + 20 * eps_of(dtype) * exact[0])
        np.testing.assert_allclose(np.conj(V).T @ V, np.eye(6), atol=100 * eps_of(dtype))


def structured(name, dtype):
    """Matrices as they come from graphs, labels, sensors and logs, rather than from a spectrum."""
    rng, i, j = np.random.default_rng(0), np.arange(300)[:, None], np.arange(200)
    noise = rng.standard_normal((300, 200))
    if name == "graded rows":
        a = noise * 10.0 ** (-8 * i / 300)
    elif name == "near-ties":
        a = np.cos(2 * np.pi * i * j / 64) / (1 + j)
    elif name == "graph":
        a = ((i * 7 + 3 * j) % 31 == 0) * 1.0
    elif name == "one-hot":
        a = (rng.integers(200, size=(300, 1)) == j) * 1.0
    elif name == "mean":
        a = noise * 0.9**j + 1000
    else:
        a = np.where(j == 0, rng.normal(1e6, 1, (300, 1)), (rng.random((300, 200)) < 0.05) * noise)
    return (a * (1 + 1j) if np.dtype(dtype).kind == "c" else a).astype(dtype)


STRUCTURED = ["graded rows", "near-ties", "graph", "one-hot", "mean", "time"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_matrices(name, dtype):
    sparse = pytest.importorskip("scipy.sparse")
    a = structured(name, dtype)
    wide = a.astype(np.result_type(dtype, "float64"))
    for center in (False, True):
        c = wide - center * wide.mean(axis=0)
        exact, norm = np.linalg.svd(c, compute_uv=False), np.linalg.norm(c)
        # Entries are known to eps, and so are deviations from a mean that is no larger.
        eps = eps_of(dtype)
        for x in (a, sparse.csr_array(a)):
            for options in ({}, {"method": "subspace"}, {"method": "gram"}):
                U, S, Vh = slra.randomized_svd(x, 6, center=center, rng=0, **options)
                error = np.linalg.norm(c - (U.astype(wide.dtype) * S) @ Vh)
                near = 1.02 if options.get("method") != "subspace" else 1.05
                assert error <= near * np.linalg.norm(exact[6:]) + 100 * eps * norm
                for Q in (U, np.conj(Vh).T):
                    assert np.max(np.abs(np.conj(Q).T @ Q - np.eye(6))) <= 50 * eps * 6**0.5
            U, S, Vh = slra.randomized_svd(x, rtol=0.3, center=center, rng=0)
            assert np.linalg.norm(c - (U.astype(wide.dtype) * S) @ Vh) <= 0.3 * norm


def test_few_axes_on_every_backend(xp):
    a = along_axes("diagonal", "float32")
    check(a, 6, slra.randomized_svd(to_xp(xp, a), 6, rng=0))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("exponential", "float32"),
        ("rank 7", "float64"),
        ("zero", "float32"),
        ("bad Cholesky-QR", "complex128"),
        ("1e30", "complex64"),
    ],
)
def test_never_wrong_on_every_backend(xp, name, dtype):
    a = make(name, (140, 110), dtype)
    result = slra.randomized_svd(to_xp(xp, a), 6, n_oversamples=4, rng=0)
    check(a, 6, result, 1.01, reference_error(a, 6, 3, 4))


@pytest.mark.eager_only("lazily, the method is the same for the whole batch")
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_elements_of_a_batch_fail_alone(xp, dtype):
    names = ["exponential", "zero", "1e-30", "rank 7", "1e30", "polynomial"]
    a = np.stack([make(name, (140, 110), dtype) for name in names])
    result = slra.randomized_svd(to_xp(xp, a), 6, n_oversamples=4, rng=0)
    for i in range(len(names)):
        one = tuple(x[i, ...] for x in result)
        check(a[i], 6, one, 1.01, reference_error(a[i], 6, 3, 4))


@pytest.mark.parametrize("method", ["krylov", "subspace", "gram"])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("name", ["polynomial", "bad Cholesky-QR", "zero", "1e30"])
def test_every_method_is_never_wrong(name, dtype, method):
    # scikit-learn at the same n_iter has a singular value off by 0.73 on such a matrix in float32.
    a = make(name, (300, 200), dtype)
    result = slra.randomized_svd(a, 20, n_iter=3, method=method, rng=0)
    check(a, 20, result, 1.01, reference_error(a, 20, 3))


@pytest.mark.parametrize("exponent", [-660, 660])
@pytest.mark.parametrize("method", ["krylov", "subspace", "gram"])
def test_squares_out_of_range_of_double_precision(method, exponent):
    # Times a power of two, which is exact, the answer is the same.
    a, scale = make("exponential", (140, 110), "complex128"), 2.0**exponent
    U, S, Vh = slra.randomized_svd(a * scale, 6, method=method, rng=0)
    check(a, 6, (U, S / scale, Vh), 1.01, reference_error(a, 6, 3))


@pytest.mark.parametrize("n_iter", [0, 1, 2, 4])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_no_worse_than_subspace_iteration_at_the_same_depth(shape, n_iter):
    a = make("polynomial", SHAPES[shape], "float32")
    S = slra.randomized_svd(a, 20, n_iter=n_iter, method="krylov", rng=0).S
    exact = np.linalg.svd(a.astype("float64"), compute_uv=False)
    error = np.max(np.abs(S - exact[:20]))
    assert error <= 10 * reference_error(a, 20, n_iter)[0] + 20 * eps_of("float32") * exact[0]


@pytest.mark.parametrize("value", [1.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_space_that_is_full_after_one_block(value, dtype):
    """What the first block leaves of the second is zero to the last bit."""
    x = np.full((40, 40), value, dtype=dtype)
    eps = np.finfo(dtype).eps
    w, V = slra.randomized_eigh(x, 2, n_oversamples=0, n_iter=2, rng=0)
    np.testing.assert_allclose(w, [40 * value, 0.0], atol=200 * eps * value * 40)
    np.testing.assert_allclose(V.T @ V, np.eye(2), atol=200 * eps)
    U, S, Vh = slra.randomized_svd(x, 2, n_oversamples=0, n_iter=3, method="krylov", rng=0)
    np.testing.assert_allclose(S, [40 * value, 0.0], atol=200 * eps * value * 40)
    np.testing.assert_allclose(U.T @ U, np.eye(2), atol=200 * eps)
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(2), atol=200 * eps)


def test_eigenvectors_of_a_small_constant_matrix():
    w, V = slra.randomized_eigh(np.full((4, 4), 0.3), 1, n_oversamples=0, n_iter=0, rng=0)
    np.testing.assert_allclose(w, [1.2])
    np.testing.assert_allclose(V[:, 0], np.full(4, 0.5))
