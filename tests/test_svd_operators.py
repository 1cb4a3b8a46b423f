"""Sparse matrices, operators, centring: against the dense array that they stand for."""

import re

import array_api_compat as compat
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import slra
from tests.backends import to_numpy, to_xp
from tests.matrices import check, make, reference_error


def sparse(dtype="float64", kind="csr_matrix", seed=0):
    rng = np.random.default_rng(seed)
    a = sp.random(400, 300, density=0.05, random_state=seed, format="csr").toarray()
    if np.issubdtype(dtype, np.complexfloating):
        a = a * np.exp(1j * rng.uniform(0, 6, a.shape))
    # Rows and columns that fade give a spectrum that decays.
    a = a * (0.97 ** np.arange(400))[:, None]
    return getattr(sp, kind)(a.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_array"])
@pytest.mark.parametrize("method", ["auto", "subspace"])
def test_sparse(dtype, kind, method):
    s = sparse(dtype, kind)
    for x in (s, s.T):
        a = x.toarray()
        result = slra.randomized_svd(x, 8, method=method, rng=0)
        check(a, 8, result, 1.01, reference_error(a, 8, 3))


@pytest.mark.parametrize("center", [False, True])
def test_low_rank_plus_sparse(center):
    rng = np.random.default_rng(1)
    s, left, right = sparse(), rng.standard_normal((400, 3)), rng.standard_normal((3, 300))
    x = aslinearoperator(s) + aslinearoperator(left) @ aslinearoperator(right)
    a = s.toarray() + left @ right
    a = a - a.mean(axis=0) if center else a
    check(a, 6, slra.randomized_svd(x, 6, center=center, rng=0), 1.01, reference_error(a, 6, 3))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale):
    s = sparse("float32") * np.float32(scale)
    a = s.toarray()
    for x in (s, aslinearoperator(s)):
        check(a, 8, slra.randomized_svd(x, 8, rng=0), 1.01, reference_error(a, 8, 3))


@pytest.mark.parametrize("exponent", [-660, 0, 660])
def test_squares_out_of_range_of_double_precision(exponent):
    scale = 2.0**exponent
    s = sparse()
    a, norm = s.toarray(), sp.linalg.norm(s) * scale
    x = s * scale
    # Two ways to the norm: the stored entries, and what the caller says.
    for y in (x, slra.MatrixOperator(x.__matmul__, x.T.__matmul__, x.shape, x.data, norm)):
        U, S, Vh = slra.randomized_svd(y, 8, rng=0)
        check(a, 8, (U, S / scale, Vh), 1.01, reference_error(a, 8, 3))
        U, S, Vh = slra.randomized_svd(y, rtol=0.1, rng=0)
        assert np.linalg.norm(a - (U * S / scale) @ Vh) <= 0.1 * np.linalg.norm(a)
        U, S, Vh = slra.randomized_svd(y, rtol=0.1, center=True, rng=0)
        c = a - a.mean(axis=0)
        assert np.linalg.norm(c - (U * S / scale) @ Vh) <= 0.1 * np.linalg.norm(c)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_short_sparse_matrices_are_decomposed_exactly(dtype, shape):
    s = sp.random(*shape, density=0.3, random_state=0, format="csr").astype(dtype)
    for x in (s, aslinearoperator(s)):
        check(s.toarray(), 3, slra.randomized_svd(x, 3, rng=0))
        check(s.toarray(), 12, slra.randomized_svd(x, 12, rng=0))


def test_powers_of_two_are_exact_to_the_ends_of_the_range():
    from array_api_compat import numpy as xp

    from slra._backends import backend_of
    from slra.svd._linear_map import power_of_two

    x = np.asarray([[3.0, 1e-300], [5e-324, 1.7e308]])
    exponent = np.asarray([[1070.0, 990.0], [1074.0, -2098.0]])
    with np.errstate(under="ignore"):
        found = power_of_two(x * 0.5**1000, exponent, backend_of(xp))
    np.testing.assert_array_equal(found, np.ldexp(x * 0.5**1000, exponent.astype(int)))


def test_operator_on_every_backend(xp):
    a = make("exponential", (120, 100), "complex128")
    x = to_xp(xp, a)

    def run(x):
        xh = xp.conj(xp.matrix_transpose(x))
        operator = slra.MatrixOperator(lambda v: x @ v, lambda u: xh @ u, x.shape, x)
        return slra.randomized_svd(operator, 5, n_oversamples=3, rng=0)

    # The harness sees no array inside the operator, so this runs eagerly where it can.
    check(a, 5, run(x), 1.01, reference_error(a, 5, 3, 3))


@pytest.mark.parametrize("center", [False, True])
def test_tolerance_by_products(center):
    s = sparse()
    a = s.toarray()
    a = a - a.mean(axis=0) if center else a
    for x in (
        s,
        slra.MatrixOperator(s.__matmul__, s.T.__matmul__, s.shape, s.data, sp.linalg.norm(s)),
    ):
        U, S, Vh = slra.randomized_svd(x, rtol=0.1, center=center, rng=0)
        assert np.linalg.norm(a - (U * S) @ Vh) <= 0.1 * np.linalg.norm(a)
        exact = np.linalg.svd(a, compute_uv=False)
        tails = np.sqrt(np.cumsum(exact[::-1] ** 2)[::-1])
        best = 1 + np.sum(tails[1:] > 0.1 * tails[0])
        assert len(S) <= 1.05 * best + 1
    with pytest.raises(ValueError, match=r"rtol must be at least 5\.5e-03 for float32"):
        slra.randomized_svd(s.astype("float32"), rtol=1e-3)
    with pytest.raises(
        ValueError,
        match="^rtol needs the Frobenius norm of x, which products do not tell; "
        "pass a slra.MatrixOperator with frobenius_norm$",
    ):
        slra.randomized_svd(aslinearoperator(s), rtol=0.1)


def products(a, *args, **options):
    """Columns of each product with A, and less than zero with A^H, that `randomized_svd` takes."""
    taken = []

    def matmat(v):
        taken.append(v.shape[-1])
        return a @ v

    def rmatmat(u):
        taken.append(-u.shape[-1])
        return a.T @ u

    x = slra.MatrixOperator(matmat, rmatmat, a.shape, a, np.linalg.norm(a))
    slra.randomized_svd(x, *args, rng=0, **options)
    # The first two are of one vector each: to find the scale, and whether the adjoint is one.
    assert taken[:2] == [1, -1]
    return taken[2:]


@pytest.mark.parametrize("name", ["steep", "slow"])
def test_how_many_products_are_taken(name):
    tall = make(name, (300, 200), "float64")
    for n_iter in (1, 2, 4):
        krylov = products(tall, 4, n_iter=n_iter, method="krylov")
        assert krylov == [12, -12] * n_iter + [12]
        assert products(tall.T, 4, n_iter=n_iter) == [12, -12] * (n_iter + 1)
        subspace = products(tall, 4, n_iter=n_iter, method="subspace")
        assert subspace == [12, -12] * (n_iter + 1)
    for method in ("krylov", "subspace"):
        assert products(tall, 4, n_iter=0, method=method) == [12, -12]
    assert products(tall, 4, method="subspace") == [12, -12] * 5
    # Three blocks, of which the last moves no value by much.
    assert products(tall, 4) == products(tall, 4, n_oversamples=8) == [12, -12] * 3 + [12]
    assert products(tall.T, 4) == [12, -12] * 4
    assert products(tall, 4, n_oversamples=3) == [7, -7] * 3 + [7]
    # Where values do move, six blocks.
    hard = make("bad Cholesky-QR", (600, 500), "float64")
    assert products(hard, 20, n_oversamples=0) == [20, -20] * 6 + [20]
    # Where the blocks would fill it, the matrix is multiplied out.
    assert products(tall[:, :36], 4) == [36]
    assert products(tall[:36], 4) == [-36]
    assert products(tall[:, :37], 4) == [12, -12] * 3 + [12]
    assert products(tall[:, :24], 4, n_iter=2) == [24]
    assert products(tall[:, :25], 4, n_iter=2) == [12, -12] * 2 + [12]
    assert products(tall[:, :36], 4, method="subspace", n_iter=1) == [12, -12] * 2
    assert products(tall[:, :12], 4, method="subspace", n_iter=1) == [12]
    assert products(tall, 4, method="gram") == [200]


def test_how_many_products_a_tolerance_takes():
    tall = make("exponential", (300, 200), "float64")
    # Blocks of 16 until the rank has settled, and one product with as many vectors to verify it.
    assert products(tall, rtol=0.1) == [16, -16] * 3 + [16, 22]
    assert products(tall.T, rtol=0.1) == [16, -16] * 4 + [22]
    assert products(tall, rtol=0.01) == [16, -16] * 5 + [16, 44]
    # With a cap on the rank, no deeper than a call with this rank.
    assert products(tall, 5, rtol=0.01) == [16, -16] * 4 + [16, 5]
    # A wide space is looked at only once it has grown by a tenth.
    wide = products(make("slow", (600, 500), "float64"), rtol=0.3)
    assert wide == [16, -16] * 28 + [16, 272]
    # Too many to settle in the space: the matrix is multiplied out.
    slow = products(make("slow", (300, 200), "float64"), rtol=0.1)
    assert slow == [16, -16] * 12 + [16, 200, 189]


@pytest.mark.parametrize("shape", [(120, 40), (300, 200), (40, 120)], ids=str)
def test_centering(xp, shape):
    a = make("exponential", shape, "float64") + 10 * np.linspace(-1, 1, shape[1])
    result = slra.randomized_svd(to_xp(xp, a), 4, n_oversamples=3, center=True, rng=0)
    c = a - a.mean(axis=0)
    # The means are known to eps times the entries they cancel.
    S = to_numpy(result.S)
    exact = np.linalg.svd(c, compute_uv=False)[:4]
    allowed = 10 * reference_error(c, 4, 3, 3) + 20 * np.finfo("float64").eps * np.linalg.norm(a)
    assert np.all(np.abs(S - exact) <= allowed)


@pytest.mark.parametrize("exponent", [0, 660])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_products_and_norm_of_what_is_centred(dtype, exponent):
    from slra.svd._inputs import read

    scale = 2.0**exponent
    s = sparse(dtype) * scale
    a = s.toarray() / scale
    c = a - a.mean(axis=0)
    v, u = (np.random.default_rng(0).standard_normal((n, 3)).astype(dtype) for n in (300, 400))
    norm = sp.linalg.norm(s / scale) * scale
    without = slra.MatrixOperator(s.__matmul__, s.conj().T.__matmul__, s.shape, s.data)
    for x in (s, without._replace(frobenius_norm=norm), without):
        A = read(x, center=True).A
        factor = 1 / np.linalg.norm(c @ v) * np.linalg.norm(A.matmat(v))
        np.testing.assert_allclose(A.matmat(v), factor * (c @ v), atol=1e-12 * factor)
        np.testing.assert_allclose(A.rmatmat(u), factor * (np.conj(c).T @ u), atol=1e-12 * factor)
        if x is without:
            assert A.norm is None
            assert read(x).A.norm is None
        else:
            np.testing.assert_allclose(A.norm(), factor * np.linalg.norm(c), rtol=1e-12)


@pytest.mark.eager_only("an operator cannot be traced")
def test_operators_stay_on_their_device(xp, device):
    x = xp.asarray(make("exponential", (120, 90), "float32"), device=device)
    xh = xp.matrix_transpose(x)
    A = slra.MatrixOperator(lambda v: x @ v, lambda u: xh @ u, tuple(x.shape), x)
    for factor in slra.randomized_svd(A, 4, center=True, method="gram", rng=0):
        assert factor.dtype == x.dtype
        assert factor.device == x.device


def test_centering_agrees_with_pca():
    decomposition = pytest.importorskip("sklearn.decomposition")
    a = make("polynomial", (300, 80), "float64") + np.arange(80.0)
    pca = decomposition.PCA(5, svd_solver="full").fit(a)
    _, S, Vh = slra.randomized_svd(a, 5, center=True, method="gram")
    np.testing.assert_allclose(S, pca.singular_values_, rtol=1e-10)
    np.testing.assert_allclose(S**2 / 299, pca.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(Vh * pca.components_, axis=1)), 1, rtol=1e-10)


def test_explained_variance_of_sparse_text():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    rng = np.random.default_rng(0)
    # Zipf's law over words, and topics that prefer some of them.
    weights = 1 / np.arange(1, 801)
    topics = weights * rng.gamma(0.3, size=(12, 800))
    topics /= topics.sum(axis=1, keepdims=True)
    documents = [
        " ".join(f"w{w:03}" for w in rng.choice(800, 60, p=topics[i % 12])) for i in range(600)
    ]
    tfidf = text.TfidfVectorizer().fit_transform(documents)
    assert sp.issparse(tfidf)
    dense = tfidf.toarray()
    dense = dense - dense.mean(axis=0)
    for rank in (5, 20):
        S = slra.randomized_svd(tfidf, rank, center=True, n_iter=8, rng=0).S
        exact = np.linalg.svd(dense, compute_uv=False)[:rank]
        ours, theirs = np.sum(S**2), np.sum(exact**2)
        total = np.linalg.norm(dense) ** 2
        assert abs(ours - theirs) <= 1e-6 * total


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (sp.csr_matrix((3, 0)), ValueError, "no empty axis"),
        (sp.csr_matrix(np.eye(4, dtype="int64")), TypeError, "must have a floating dtype"),
        (sp.csr_matrix(np.diag([1.0, np.nan])), ValueError, "x must be finite"),
        (aslinearoperator(np.diag([1.0, np.inf])), ValueError, "x must be finite"),
        ([[1.0]], TypeError, "x must be an array"),
    ],
)
def test_refusals(x, error, message):
    with pytest.raises(error, match=message), np.errstate(invalid="ignore"):
        slra.randomized_svd(x, 1, rng=0)


def test_refusals_of_what_belongs_to_an_operator():
    s = sparse()
    x = slra.MatrixOperator(s.__matmul__, s.T.__matmul__, s.shape, s.data)
    with pytest.raises(TypeError, match=r"^x\.like must be an array"):
        slra.randomized_svd(x._replace(like=[1.0]), 2)
    with pytest.raises(ValueError, match=r"^x\.frobenius_norm must be finite and 0 or more"):
        slra.randomized_svd(x._replace(frobenius_norm=-1.0), rtol=0.1)
    for y in (s, x):
        with pytest.raises(TypeError, match="^test_matrix must be an array"):
            slra.randomized_svd(y, 2, test_matrix=[[1.0]])


def test_test_matrix_for_products():
    s, omega = sparse(), np.random.default_rng(5).standard_normal((300, 10))
    dense = slra.randomized_svd(s.toarray(), 2, n_iter=3, test_matrix=omega)
    for x in (s, aslinearoperator(s)):
        found = slra.randomized_svd(x, 2, n_iter=3, test_matrix=omega)
        np.testing.assert_allclose(found.U, dense.U, atol=1e-10)


def test_norms_of_products():
    from slra.svd._inputs import read

    zero = sp.csr_matrix((120, 80), dtype="float32")
    one = sp.csr_matrix(([2.0], ([3], [4])), (120, 80), dtype="float32")
    for s, norm in ((zero, 0.0), (one, 2.0)):
        x = slra.MatrixOperator(s.__matmul__, s.T.__matmul__, s.shape, s.data, norm)
        for y in (s.tocsr(), x):
            found = read(y).A.norm()
            assert found.dtype == np.float64
            assert found == norm
            U, S, Vh = slra.randomized_svd(y, rtol=0.1, rng=0)
            np.testing.assert_allclose(S, [norm], rtol=1e-5)
            np.testing.assert_allclose([U.T @ U, Vh @ Vh.T], [[[1]], [[1]]], rtol=1e-5)


def test_stored_zeros_and_duplicates():
    x = sp.coo_matrix(([1.0, 1.0, 2.0, 0.0], ([0, 0, 1, 2], [0, 0, 1, 2])), shape=(5, 4))
    np.testing.assert_allclose(slra.randomized_svd(x, 2, rng=0).S, [2, 2])
    assert slra.randomized_svd(sp.csr_matrix((5, 4)), 2, rng=0).S.tolist() == [0, 0]


def test_inputs_are_left_alone():
    s = sparse()
    before = s.data.copy(), s.indices.copy()
    slra.randomized_svd(s, 4, center=True, rng=0)
    np.testing.assert_array_equal(s.data, before[0])
    np.testing.assert_array_equal(s.indices, before[1])


def reusing(product, n_rows, columns, dtype="float64"):
    """Return a product that hands out parts of one buffer, or what it was given, or writes over that."""
    buffer = np.empty((n_rows, columns), dtype=dtype)

    def call(v):
        out = np.matmul(product, v, out=buffer[:, : v.shape[1]])
        v[...] = np.nan
        return out

    return call


@pytest.mark.parametrize("kind", ["MatrixOperator", "LinearOperator"])
def test_products_that_reuse_a_buffer(kind):
    a = make("exponential", (120, 90), "float64")
    h = a @ a.T
    for x in (a, h):
        (m, n), xh = x.shape, np.ascontiguousarray(x.T)
        matmat, rmatmat = reusing(x, m, 120), reusing(xh, n, 120)
        if kind == "MatrixOperator":
            A = slra.MatrixOperator(matmat, rmatmat, x.shape, x, np.linalg.norm(x))
        else:
            vector = {"matvec": x.__matmul__, "rmatvec": xh.__matmul__}
            A = LinearOperator(x.shape, **vector, matmat=matmat, rmatmat=rmatmat, dtype=x.dtype)
        for options in ({}, {"method": "subspace"}, {"center": True}, {"method": "gram"}):
            dense = slra.randomized_svd(x, 3, n_iter=3, rng=0, **options)
            found = slra.randomized_svd(A, 3, n_iter=3, rng=0, **options)
            np.testing.assert_allclose(found.S, dense.S, rtol=1e-9)
        if kind == "MatrixOperator":
            U, S, Vh = slra.randomized_svd(A, rtol=0.1, rng=0)
            assert np.linalg.norm(x - (U * S) @ Vh) <= 0.1 * np.linalg.norm(x)
        approx = (np.zeros((m, 1)), np.zeros((1, n)))
        errors = slra.estimate_error(A, approx, rng=1), slra.estimate_error(x, approx, rng=1)
        np.testing.assert_allclose(*errors)
    for method in ("krylov", "nystrom"):
        found = slra.randomized_eigh(A, 3, method=method, n_iter=4, rng=0).w
        np.testing.assert_allclose(found, np.linalg.eigvalsh(h)[:-4:-1], rtol=1e-3)


def test_an_operator_that_returns_what_it_is_given():
    one = slra.MatrixOperator(lambda v: v, lambda u: u, (60, 60), np.empty(0), 60**0.5)
    U, S, Vh = slra.randomized_svd(one, 3, rng=0)
    np.testing.assert_allclose(S, 1)
    np.testing.assert_allclose(U.T @ U, np.eye(3), atol=1e-13)
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(3), atol=1e-13)


def bad_operators():
    a = make("exponential", (120, 90), "float64")
    good = slra.MatrixOperator(a.__matmul__, a.T.__matmul__, a.shape, a, np.linalg.norm(a))
    single = a.astype("float32")
    own = {"shape": a.shape, "dtype": a.dtype, "matvec": a.__matmul__}
    z = a + 1j * a[::-1]
    return {
        "no adjoint": (LinearOperator(**own), TypeError, "product with its conjugate transpose"),
        "adjoint not called": (good._replace(rmatmat=None), TypeError, r"^x\.rmatmat must be call"),
        "NaN": (good._replace(matmat=lambda v: np.nan * (a @ v)), ValueError, "x must be finite"),
        "NaN in the adjoint": (
            good._replace(rmatmat=lambda u: np.inf * (a.T @ u)),
            ValueError,
            r"x must be finite, got NaN or infinity in what x\.rmatmat returns",
        ),
        "NaN later on": (
            good._replace(matmat=lambda v: a @ v * (1 if v.shape[1] == 1 else np.nan)),
            ValueError,
            "x must be finite",
        ),
        "dtype": (
            good._replace(matmat=lambda v: (a @ v).astype("float32")),
            TypeError,
            r"^x\.matmat must return an array of float64, .* got float32",
        ),
        "dtype of a LinearOperator": (
            LinearOperator(a.shape, a.__matmul__, a.T.__matmul__, dtype="float32"),
            TypeError,
            r"^x\.matmat must return an array of float32, .* got float64",
        ),
        "dtype of the adjoint": (
            good._replace(like=single, matmat=lambda v: single @ v),
            TypeError,
            r"^x\.rmatmat must return an array of float32, .* got float64",
        ),
        "twice the adjoint": (
            good._replace(rmatmat=lambda u: 2 * (a.T @ u)),
            ValueError,
            r"^x\.rmatmat must multiply by the conjugate transpose",
        ),
        "no conjugate": (
            slra.MatrixOperator(z.__matmul__, z.T.__matmul__, z.shape, z),
            ValueError,
            r"^x\.rmatmat must multiply by the conjugate transpose",
        ),
        "another matrix": (
            good._replace(rmatmat=a[::-1].T.__matmul__),
            ValueError,
            r"^x\.rmatmat must multiply by the conjugate transpose",
        ),
    }


@pytest.mark.parametrize("name", bad_operators())
def test_bad_operators_are_told_so_at_the_door(name):
    x, error, message = bad_operators()[name]
    for options in ({}, {"method": "subspace"}, {"center": True}):
        with pytest.raises(error, match=message):
            slra.randomized_svd(x, 3, rng=0, **options)


@pytest.mark.parametrize("factor", [1e-3, 0.9, 1.1, 1e3])
def test_a_wrong_norm_shows(factor):
    for shape in ((120, 90), (40, 400)):
        a = make("exponential", shape, "float64")
        norm = factor * np.linalg.norm(a)
        x = slra.MatrixOperator(a.__matmul__, a.T.__matmul__, a.shape, a, norm)
        with pytest.raises(ValueError, match=r"^x\.frobenius_norm must be the Frobenius norm of x"):
            slra.randomized_svd(x, rtol=0.1, rng=0)


def test_operators_that_work_in_lower_precision_than_they_say_are_taken():
    a = make("exponential", (300, 200), "float64")
    single = a.astype("float32")
    x = slra.MatrixOperator(
        lambda v: (single @ v.astype("float32")).astype("float64"),
        lambda u: (single.T @ u.astype("float32")).astype("float64"),
        *(a.shape, a),
    )
    S = slra.randomized_svd(x, 3, rng=0).S
    np.testing.assert_allclose(S, slra.randomized_svd(a, 3, rng=0).S, rtol=1e-5)


def test_dask_chunks_that_are_sparse_are_refused():
    da = pytest.importorskip("dask.array")
    x = da.ones((40, 30), chunks=(20, 30)).map_blocks(sp.csr_matrix)
    for function in (slra.randomized_svd, slra.truncated_svd):
        with pytest.raises(TypeError, match=r"^x must have NumPy arrays as chunks, got .*csr"):
            function(x, 2)


def shifted(m=20_000, dtype="float32", mean=1000.0):
    """Columns whose means are large beside their deviations."""
    x = np.random.default_rng(0).standard_normal((m, 3)) * [1, 0.5, 0.25] + mean
    return x.astype(dtype)


def exact_of_centred(a):
    wide = a.astype(np.result_type(a.dtype, "float64"))
    return np.linalg.svd(wide - wide.mean(axis=0), compute_uv=False)


@pytest.mark.parametrize("method", ["gram", "krylov", "subspace"])
def test_means_are_accumulated_in_double_precision(xp, method):
    # A single column of ones would do: 20,000 numbers near 1000 in float32, added one by one, lose three digits.
    a = shifted()
    if method != "gram":
        a = np.concatenate([a, make("exponential", (20_000, 37), "float32")], axis=1)
    S = slra.randomized_svd(to_xp(xp, a), 3, center=True, method=method, n_iter=2, rng=0).S
    np.testing.assert_allclose(to_numpy(S), exact_of_centred(a)[:3], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_means_of_sparse_data(dtype):
    a = np.concatenate([shifted(2000), sparse(kind="csr_array").toarray()[:40].repeat(50, 0)], 1)
    a = (a * (1 + 0.5j) if dtype == "complex64" else a).astype(dtype)
    exact = exact_of_centred(a)
    for x in (sp.csr_matrix(a), sp.csc_array(a)):
        U, S, Vh = slra.randomized_svd(x, 6, center=True, n_iter=6, rng=0)
        np.testing.assert_allclose(S, exact[:6], rtol=1e-5)
        assert (U.dtype, S.dtype, Vh.dtype) == (a.dtype, a.real.dtype, a.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mean", [1e6, 1e9])
def test_a_tolerance_beside_a_column_of_times(mean, dtype):
    def run(x, seed):
        try:
            return slra.randomized_svd(x, rtol=0.1, center=True, rng=seed)
        except ValueError as error:
            return str(error)

    verified = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        noise = sp.random(400, 60, density=0.05, random_state=seed).toarray()
        a = np.concatenate([rng.normal(mean, 1, (400, 1)), noise], axis=1).astype(dtype)
        wide = a.astype("float64")
        c = wide - wide.mean(axis=0)
        operator = slra.MatrixOperator(
            a.__matmul__, a.T.__matmul__, a.shape, a, np.linalg.norm(wide)
        )
        for x in (sp.csr_matrix(a), operator, a):
            cannot = x is operator and not isinstance(run(x, seed), tuple)
            if cannot:
                # What cannot be verified is refused.
                assert re.match("rtol must be (None|at least)", run(x, seed))
                continue
            U, S, Vh = run(x, seed)
            verified += 1
            assert np.linalg.norm(c - (U * S) @ Vh) <= 0.1 * np.linalg.norm(c)
    assert verified >= 20


@pytest.mark.eager_only("an operator cannot be traced")
@pytest.mark.parametrize("has_matrix", [False, True])
def test_linear_operators_of_any_library(xp, has_matrix):
    """What SciPy 1.18's have beside those of before: a namespace, and perhaps the array that they wrap."""
    a = make("exponential", (120, 90), "float64")
    x = to_xp(xp, a)

    class Operator(LinearOperator):
        def __init__(self):
            self.shape, self._xp, self.dtype = (120, 90), xp, x.dtype
            if has_matrix:
                self.A = x

        def matmat(self, v):
            return x @ v

        _matmat = matmat

        def rmatmat(self, u):
            return xp.matrix_transpose(x) @ u

    result = slra.randomized_svd(Operator(), 5, rng=0)
    assert compat.array_namespace(result.U) is compat.array_namespace(x)
    check(a, 5, result, 1.01, reference_error(a, 5, 3))


REPEATED = {
    "all the same": np.ones(400),
    "one more than a block has columns": np.repeat(1 / np.arange(1.0, 26), 17)[:400],
    "copies": np.repeat(1 / np.arange(1.0, 11), 40),
    "copies that decay slowly": np.repeat(np.arange(1.0, 17) ** -0.3, 25),
    "a few times the same, then nothing": np.repeat([1.0, 0.0], [20, 380]),
    "near copies": np.repeat(1 / np.arange(1.0, 11), 40) * (1 + 1e-6 * np.arange(400)),
    "spread by a tenth": np.repeat(1 / np.arange(1.0, 11), 40) * (1 + 2.5e-3 * np.arange(400)),
    "two clusters and a tail": np.concatenate([np.repeat([1.0, 0.5], 40), 0.1 / np.arange(1, 321)]),
}


@pytest.mark.parametrize("shape", [(700, 400), (400, 700)])
@pytest.mark.parametrize("name", REPEATED)
def test_more_copies_of_a_singular_value_than_a_block_has_columns(name, shape):
    """Of a value that is repeated a Krylov space holds as many copies as its blocks have columns."""
    exact = np.sort(REPEATED[name])[::-1]
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0][:, :400] for n in shape)
    a = (left * exact) @ right.T
    operator = slra.MatrixOperator(lambda v: a @ v, lambda u: a.T @ u, shape, like=a)
    diagonal = sp.csr_array(np.diag(exact)[rng.permutation(400)])
    for x, dense in ((operator, a), (diagonal, diagonal.toarray())):
        for rank in (24, 60):
            U, S, Vh = slra.randomized_svd(x, rank, rng=0)
            best = np.linalg.norm(exact[rank:])
            assert np.linalg.norm(dense - (U * S) @ Vh) <= 1.01 * best + 1e-13
            np.testing.assert_allclose(S, exact[:rank], atol=0.01 * exact[0])
            np.testing.assert_allclose(U.T @ U, np.eye(rank), atol=1e-13)
            np.testing.assert_allclose(Vh @ Vh.T, np.eye(rank), atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_sparse_with_a_short_side(dtype, decay):
    """Exact by a sparse Gram matrix, except where this loses the small ones."""
    rng = np.random.default_rng(0)
    a = sp.random(60, 4000, density=0.03, random_state=0, format="csr")
    a = sp.diags_array(decay ** np.arange(60.0)) @ a
    a = (a * (1 + 1j) if dtype == "complex128" else a).astype(dtype)
    exact = np.linalg.svd(a.toarray().astype(np.result_type(dtype, "float64")), compute_uv=False)
    for x in (a.tocsr(), a.T.tocsc()):
        for rank in (2, 15, 55):
            U, S, Vh = slra.randomized_svd(x, rank, rng=rng)
            eps = np.finfo(dtype).eps
            np.testing.assert_allclose(S, exact[:rank], rtol=1e-7, atol=20 * eps * exact[0])
            for Q in (U, np.conj(Vh).T):
                np.testing.assert_allclose(np.conj(Q).T @ Q, np.eye(rank), atol=100 * eps)
            error = np.linalg.norm(x.toarray() - (U * S) @ Vh)
            assert error <= 1.001 * np.linalg.norm(exact[rank:]) + 100 * eps * exact[0]
